"""With dropout 0, the loss and every gradient of every patched head against float64 (model_parity.py)."""

import pytest
import torch
from model_parity import check_parity
from models import BERT_HEADS, ENCODERS, GPT2_HEADS, RELATIVES

# Padding is dropped only where nobody reads it, which is each head's own affair.
BATCHES = {
    "odd length": {},
    "one sequence": {"batch": 1, "length": 7},
    "one token": {"batch": 2, "length": 1},
    "padded right": {"batch": 4, "padding": "right"},
    "padded left": {"batch": 4, "padding": "left"},
    "padded anywhere": {"batch": 4, "padding": "scattered"},
}


# Of the other encoders one head each meets every batch and dtype: what differs between their heads is stock's own code.
ONE_OF_EACH = [head for head in ENCODERS if head.endswith(("ForMaskedLM", "ForCausalLM"))]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("head", [*GPT2_HEADS, *BERT_HEADS, *ONE_OF_EACH])
def test_loss_and_gradients_in_float32(head, batch):
    check_parity(head, torch.float32, BATCHES[batch])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", [*GPT2_HEADS, *BERT_HEADS, *ONE_OF_EACH])
def test_loss_and_gradients_in_half_precision(head, dtype):
    check_parity(head, dtype, BATCHES["padded right"])


@pytest.mark.parametrize("head", [*RELATIVES, *ENCODERS])
def test_relatives(head):
    check_parity(head, torch.float32, BATCHES["padded right"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_both_stock_attentions(head, attention):
    check_parity(head, torch.float32, BATCHES["padded right"], _attn_implementation=attention)


# "tanh" has no fused pass; the others do.
@pytest.mark.parametrize(
    "activation",
    [
        *("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        *("relu", "silu", "swish", "quick_gelu", "relu2", "tanh"),
    ],
)
def test_activations(activation):
    check_parity("BertForMaskedLM", torch.float32, BATCHES["odd length"], hidden_act=activation)
    check_parity("GPT2LMHeadModel", torch.float32, BATCHES["odd length"], activation_function=activation)


def test_scaled_and_cross_attention_configs():
    check_parity("GPT2LMHeadModel", torch.float32, BATCHES["odd length"], scale_attn_by_inverse_layer_idx=True)
    check_parity("GPT2LMHeadModel", torch.float32, BATCHES["odd length"], scale_attn_weights=False)
    check_parity("GPT2ForSequenceClassification", torch.float32, BATCHES["one sequence"], pad_token_id=None)
