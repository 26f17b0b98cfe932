"""Combinations that were wrong once, and that a short search may miss."""

import pytest
from between import half_frozen, nothing, saved
from calls import keywords, positional, the_second_time
from case import Case
from judge import check_values
from modes import INFERENCE, LAYERS, TRAINING
from paddings import no_mask, right
from readers import all_hidden_states, every_position, hooked, masked_mean
from structures import as_it_is, shared, wrapped

from fasttune.patching.padding.layout import unpadded

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")


def _case(head, padding, mode, between, *readers, structure=as_it_is, call=keywords):
    return Case(head, "sdpa", structure, padding, call, mode, between, readers)


FOUND = (
    # A checkpointed layer whose input was read in full before it ran again.
    _case("BertForSequenceClassification", right, LAYERS, saved, all_hidden_states),
    _case("GPT2Model", right, LAYERS, nothing, masked_mean, structure=wrapped),
    # Hooks on a promise: of views, of layers that share weights, of weights that were frozen meanwhile.
    _case("BertModel", no_mask, TRAINING, nothing, hooked),
    _case("GPT2Model", right, TRAINING, nothing, hooked, structure=shared),
    _case("RobertaForMaskedLM", right, TRAINING, half_frozen, hooked, call=the_second_time),
    # Arguments by position, as the signature names them.
    _case("GPT2Model", right, TRAINING, nothing, every_position, call=positional),
)


@pytest.mark.parametrize("case", FOUND, ids=repr)
def test_found(case):
    check_values(case)


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2LMHeadModel"])
@pytest.mark.parametrize("padding", [no_mask, right])
def test_training_after_evaluation_in_inference_mode(head, padding):
    """Of a batch of the same shape, whose layout is remembered."""
    unpadded.cache_clear()
    for mode in (INFERENCE, TRAINING):
        check_values(_case(head, padding, mode, nothing, every_position))
