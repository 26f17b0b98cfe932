"""One line makes Hugging Face GPT-2 and BERT fine-tuning cheaper: `fasttune.patch(model)`. Transformers is imported
only when `patch` is called."""

from importlib.metadata import PackageNotFoundError, version

from fasttune.patching import UnsupportedModelError, patch, patched, report, unpatch
from fasttune.verification import Verification, verify

try:
    __version__ = version("fasttune")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

__all__ = [
    "UnsupportedModelError",
    "Verification",
    "__version__",
    "patch",
    "patched",
    "report",
    "unpatch",
    "verify",
]
