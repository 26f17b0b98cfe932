"""Dropout on: one seed is one set of masks, whatever is left out and whoever reads first."""

import pytest
from draw import cases, covering, drawn
from hypothesis import given
from judge import check_dropout
from legal import OWN_ATTENTION
from readers import every_position, padding_alone

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
COVERING = covering(**OWN_ATTENTION)


@pytest.mark.parametrize("case", COVERING, ids=repr)
def test_every_value_of_every_dimension(case):
    check_dropout(case)


@drawn
@given(case=cases(**OWN_ATTENTION))
def test_drawn(case):
    check_dropout(case)


@drawn
@given(case=cases(**OWN_ATTENTION))
def test_another_reader_first_changes_nothing(case):
    check_dropout(case, first=(padding_alone, every_position))
