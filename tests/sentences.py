"""What an error that fasttune raises on purpose looks like."""

import dis
from pathlib import Path

import pytest

import fasttune

PACKAGE = (Path(fasttune.__file__).parent, Path(fasttune.__file__).parent.parent / "kernels")


def assert_sentence(function, *parts, kind=(RuntimeError, TypeError, ValueError)):
    """`function` raises one sentence with these parts, by a `raise` in fasttune's own code."""
    with pytest.raises(kind) as caught:
        function()
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert text.endswith("."), text
    assert len(text.split()) >= 5, text
    assert len(text) < 600, text
    assert "\n" not in text, text
    last = caught.value.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    assert any(Path(code.co_filename).is_relative_to(place) for place in PACKAGE), code.co_filename
    assert dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
