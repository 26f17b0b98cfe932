"""A pytest plugin: the library named by FASTTUNE_MUTANT stands in for fasttune._cpu."""

import importlib.util
import os
import sys

sys.setdlopenflags(os.RTLD_LAZY)  # functions of instruction sets that were not built are never called
spec = importlib.util.spec_from_file_location("fasttune._cpu", os.environ["FASTTUNE_MUTANT"])
sys.modules["fasttune._cpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fasttune._cpu"])
