"""nn.SelfAttention against nn.MultiheadAttention, nn.CausalSelfAttention against scaled_dot_product_attention."""

import pytest
import torch
from nn_checks import assert_module_parity, assert_same_keys
from oracle import DTYPES, assert_parity
from torch import nn

from fasttune import nn as fnn

E, H = 48, 3


def stock_forward(causal=False):
    def forward(module, x):
        length = x.shape[-2 if module.batch_first or x.dim() == 2 else 0]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
        return module(x, x, x, need_weights=False, attn_mask=mask)[0]

    return forward


class First(nn.Module):
    """The first result of a module, its parameters under their own names."""

    def __init__(self, module, **options):
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x):
        return self.module(x, **self.options)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_is_torchs(dtype, causal, batch_first):
    ours, stock = (kind(E, H, batch_first=batch_first) for kind in (fnn.SelfAttention, nn.MultiheadAttention))
    assert_same_keys(ours, stock)
    assert_module_parity(
        First(ours, is_causal=causal),
        First(stock),
        [torch.randn(7, 5, E) / 4],
        dtype,
        stock_forward=lambda first, x: stock_forward(causal)(first.module, x),
    )


def test_self_attention_unbatched():
    ours, stock = fnn.SelfAttention(E, H, bias=False), nn.MultiheadAttention(E, H, bias=False)
    assert_same_keys(ours, stock)
    x = torch.randn(7, E)
    torch.testing.assert_close(ours(x)[0], stock(x, x, x)[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_left_out(batch_first, causal):
    ours, stock = (kind(E, H, batch_first=batch_first) for kind in (fnn.SelfAttention, nn.MultiheadAttention))
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6, E, requires_grad=True)
    padding = torch.rand(4, 6) < 0.4  # anywhere, not only at the end
    padding[:, 0] = False  # else causal attention has rows without a key, NaN in the stock module
    real = (~padding).unsqueeze(-1)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None

    def run(module, **options):
        given = x if batch_first else x.transpose(0, 1)
        out = module(given, given, given, key_padding_mask=padding, need_weights=False, attn_mask=mask, **options)[0]
        out = out if batch_first else out.transpose(0, 1)
        (grad,) = torch.autograd.grad((out * real).square().sum(), x)
        return out, grad

    (out, grad), (expected, expected_grad) = run(ours, is_causal=causal), run(stock)
    torch.testing.assert_close(out * real, expected * real)
    torch.testing.assert_close(grad, expected_grad)
    assert (out[padding] == 0).all()


def test_a_sequence_of_padding_alone_gives_zeros():
    attention, x = fnn.SelfAttention(E, H, batch_first=True), torch.randn(2, 3, E, requires_grad=True)
    padding = torch.tensor([[False, False, True], [True, True, True]])
    out = attention(x, key_padding_mask=padding)[0]
    out.sum().backward()
    assert (out[1] == 0).all()
    assert (x.grad[1] == 0).all()
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 2\); expected \(2, 3\)"):
        attention(x, key_padding_mask=padding[:, :2])


def test_what_the_kernel_does_not_cover_runs_the_stock_module():
    ours, stock = (kind(E, H, batch_first=True) for kind in (fnn.SelfAttention, nn.MultiheadAttention))
    stock.load_state_dict(ours.state_dict())
    x, other = torch.randn(2, 5, E), torch.randn(2, 4, E)
    for args, options in [
        ((x, x, x), {}),  # weights wanted, as the stock module does unasked
        ((x, other, other), {"need_weights": False}),
        ((x, x, x), {"need_weights": False, "attn_mask": torch.randn(5, 5)}),
        ((x, x, x), {"need_weights": False, "key_padding_mask": torch.randn(2, 5)}),
    ]:
        for actual, expected in zip(ours(*args, **options), stock(*args, **options), strict=True):
            torch.testing.assert_close(actual, expected)
    ours, stock = (kind(E, H, add_bias_kv=True, kdim=E) for kind in (fnn.SelfAttention, nn.MultiheadAttention))
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x)[0], stock(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("training", [True, False])
def test_it_serves_inside_torchs_encoder_layer(training):
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True).train(training)
    x, padding = torch.randn(3, 6, E), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    before = layer(x, src_key_padding_mask=padding)
    attention = fnn.SelfAttention(E, H, batch_first=True)
    attention.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = attention.train(training)
    after = layer(x, src_key_padding_mask=padding)
    torch.testing.assert_close(after[~padding], before[~padding])


class StockCausal(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(E, 3 * E, bias=bias), nn.Linear(E, E, bias=bias)

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (3, H, E // H)).movedim(-3, 0).transpose(-3, -2)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(-3, -2).flatten(-2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_self_attention(dtype, bias):
    ours, stock = fnn.CausalSelfAttention(E, H, bias=bias), StockCausal(bias)
    assert_same_keys(ours, stock)
    assert_module_parity(ours, stock, [torch.randn(3, 7, E) / 4], dtype)


def test_packed_sequences_do_not_see_each_other():
    attention, stock = fnn.CausalSelfAttention(E, H), StockCausal(True)
    stock.load_state_dict(attention.state_dict())
    x = torch.randn(9, E)
    out = attention(x, cu_seqlens=torch.tensor([0, 4, 4, 9], dtype=torch.int32), max_seqlen=5)
    exact = stock.double()
    for first, last in ((0, 4), (4, 9)):
        part = x[None, first:last]
        assert_parity(out[None, first:last], stock.float()(part), exact.double()(part.double()))


@pytest.mark.parametrize("kind", [fnn.CausalSelfAttention, fnn.SelfAttention])
def test_dropout_acts_in_training_alone_and_follows_the_seed(kind):
    attention, x = kind(E, H, dropout=0.5), torch.randn(4, 6, E)

    def out(seed):
        torch.manual_seed(seed)
        result = attention(x)
        return result[0] if isinstance(result, tuple) else result

    assert torch.equal(out(1), out(1))
    assert not torch.equal(out(1), out(2))
    attention.eval()
    assert torch.equal(out(1), out(2))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="embed_dim is 10 and num_heads 3; expected"):
        fnn.CausalSelfAttention(10, 3)
    for attention in (fnn.CausalSelfAttention(E, H), fnn.SelfAttention(E, H)):
        with pytest.raises(ValueError, match=r"has shape \(2, 4, 5\); expected 2 or 3 dimensions, the last of size 48"):
            attention(torch.randn(2, 4, 5))
