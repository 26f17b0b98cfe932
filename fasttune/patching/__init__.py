"""Patching of live Transformers models: the only code that knows Transformers, imported when `patch` is called.

Rooms, each importing only from those below it:

engine     patch, unpatch, patched, report: which modules change their class, and back
families   one declarative spec per model family, and its replacement classes
layers     a layer's output as promised rows; torch's own modules
promises   tensors whose rows are computed when somebody reads them
padding    who attends to whom, read off the mask
premises   whether a module does what its class was shipped to do
"""

from fasttune.patching.engine.patch import UnsupportedModelError, patch, patched, unpatch
from fasttune.patching.engine.report import PatchReport, Row, report

__all__ = ["PatchReport", "Row", "UnsupportedModelError", "patch", "patched", "report", "unpatch"]
