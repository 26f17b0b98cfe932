"""Dropout off: whatever a patched model is put into and whoever reads it, the numbers are stock's."""

import pytest
from draw import cases, covering, drawn
from hypothesis import given
from judge import check_values

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
# Whoever reads, and whatever happened before: that pair is where promises break.
COVERING = covering(("between", "readers"))


@pytest.mark.parametrize("case", COVERING, ids=repr)
def test_every_value_of_every_dimension(case):
    check_values(case)


@drawn
@given(case=cases())
def test_drawn(case):
    check_values(case)
