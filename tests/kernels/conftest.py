"""These tests run the Triton kernels in its interpreter, so they need a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels

`make test` does that after the other tests; without the variable nothing here is collected.
"""

import os

collect_ignore_glob = []

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]
