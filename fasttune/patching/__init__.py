"""Patching of live Transformers models: the only code that knows Transformers, imported when `patch` is called.

engine     patch, unpatch, patched: which modules change their class, and back
families/  one declarative spec per model family, and the replacement classes
attention  the attention and mask functions registered with Transformers
rows       which rows of the last hidden state a head reads
lazy_rows  tensors whose rows are computed when somebody reads them (logits)
report     what runs now
"""

from fasttune.patching.engine import UnsupportedModelError, patch, patched, unpatch
from fasttune.patching.report import PatchReport, Row, report

__all__ = ["PatchReport", "Row", "UnsupportedModelError", "patch", "patched", "report", "unpatch"]
