"""A varying batch or sequence compiles nothing new, and no launcher looks at values that lie on the device."""

import aot
import gpu_cases
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from fasttune.kernels import (
    activation,
    attention,
    cross_entropy,
    dropout,
    embedding,
    layer_norm,
    linear_cross_entropy,
    linear_log_prob,
    linear_max,
    packing,
    rotary,
)
from fasttune.ops._attention_call import Call

empty, new_seed = gpu_cases.empty, gpu_cases.new_seed
DTYPE = torch.bfloat16
# One row, one token, odd sizes, a multiple of the alignment that Triton specialises on, and what overflows 32 bits.
SIZES = [(1, 1), (1, 16), (3, 37), (16, 128), (8, 512), (2, 1024)]


def attention_step(batch, tokens, packed=False):
    shape = (batch * tokens, 12, 64) if packed else (batch, tokens, 12, 64)
    query = empty(*shape, dtype=DTYPE)
    offsets = empty(batch + 1, dtype=torch.int32) if packed else None
    call = Call(offsets, seed=new_seed(), causal=True, scale=0.125, dropout_p=0.1)
    out, lse = attention.forward(query, query, query, call)
    gradients = [*(torch.empty_like(query) for _ in range(3)), None, None, None]
    attention.backward(out, (query, query, query, out, lse), gradients, call)


def attention_of_chosen_queries(batch, tokens):
    chosen = max(1, batch * tokens // 3)
    query, key = (empty(rows, 12, 64, dtype=DTYPE) for rows in (chosen, batch * tokens))
    offsets, positions = empty(batch + 1, dtype=torch.int32), empty(chosen, dtype=torch.int32)
    call = Call(offsets, offsets, positions, None, new_seed(), True, 0.125, 0.1)
    out, lse = attention.forward(query, key, key, call)
    gradients = [*map(torch.empty_like, (query, key, key)), None, None, None]
    attention.backward(out, (query, key, key, out, lse), gradients, call)


def attention_of_views(batch, tokens):
    qkv = empty(batch, tokens, 3, 12, 64, dtype=DTYPE)
    call = Call(scale=0.125)
    out, lse = attention.forward(*qkv.unbind(-3), call)
    attention.backward(out, (*qkv.unbind(-3), out, lse), [*torch.empty_like(qkv).unbind(-3), None, None, None], call)


def attention_with_terms(batch, tokens):
    query, places = (empty(batch, tokens, 12, columns, dtype=DTYPE) for columns in (64, 512))
    terms = empty(12, 257, dtype=torch.float32), places, places, empty(1025, dtype=torch.int32)
    call = Call(None, None, None, None, new_seed(), False, 0.125, 0.1, None, *terms)
    out, lse = attention.forward(query, query, query, call)
    gradients = list(map(torch.empty_like, (query, query, query, *terms[:3])))
    attention.backward(out, (query, query, query, out, lse), gradients, call)


def norms(batch, tokens):
    x, weight, seed = empty(batch, tokens, 768, dtype=DTYPE), empty(768, dtype=DTYPE), new_seed()
    _, total, statistics = layer_norm.dropout_add_layer_norm(x, x, weight, weight, None, seed, 0.1, 1e-5, True)
    layer_norm.layer_norm_backward(x, None, total, weight, weight, statistics, None, seed, 0.1, DTYPE, *[True] * 4)


def elementwise(batch, tokens):
    x, bias = empty(batch, tokens, 3072, dtype=DTYPE), empty(3072, dtype=DTYPE)
    activation.forward(x, None, bias, x, batch * tokens, 3072, (3072, 0), 2)
    activation.backward(x, x, None, bias, x, None, bias, batch * tokens, 3072, (3072, 0, 3072), 2)
    dropout.dropout(x, x, None, new_seed(), 0.1)


def gates(batch, tokens):
    out = empty(batch, tokens, 3072, dtype=DTYPE)
    a, gate = empty(batch, tokens, 6144, dtype=DTYPE).chunk(2, -1)
    activation.forward(a, gate, None, out, batch * tokens, 3072, (6144, 6144), 1)
    activation.backward(out, a, gate, None, a, gate, None, batch * tokens, 3072, (6144,) * 3, 1)


def losses(batch, tokens):
    logits, target = empty(batch * tokens, 30522, dtype=DTYPE), empty(batch * tokens, dtype=torch.int64)
    loss, *kept = cross_entropy.cross_entropy(logits, target, None, -100, 0.0, 1)
    cross_entropy.cross_entropy_backward(loss, logits, target, None, *kept, -100, 0.0, 1)


def linear_loss(batch, tokens):
    rows = batch * tokens
    x, weight = empty(rows, 768, dtype=DTYPE), empty(30522, 768, dtype=DTYPE)
    options = (empty(rows, dtype=torch.int64), None, None, None, 1.0, -100, 0.0, 1, True, True, False)
    _, dinput, dweight, _ = linear_cross_entropy.linear_cross_entropy(x, weight, *options)
    for gradient in (dinput, dweight):
        linear_cross_entropy.scale_in_place(gradient, empty(1, dtype=torch.float32))


def log_probs(batch, tokens):
    rows = batch * tokens
    options = (empty(rows, 768, dtype=DTYPE), empty(30522, 768, dtype=DTYPE), empty(rows, dtype=torch.int64), None)
    *found, _, statistics = linear_log_prob.linear_log_prob(*options, 0.7, -100)
    linear_log_prob.linear_log_prob_backward(*found, *options, statistics, 0.7, -100, True, True, False)


def pooled_maxima(batch, tokens):
    x, weight, bias = empty(batch * tokens, 768, dtype=DTYPE), empty(30522, 768, dtype=DTYPE), empty(30522, dtype=DTYPE)
    offsets = empty(batch + 1, dtype=torch.int32)
    out, token = linear_max.linear_max(x, weight, bias, offsets)
    linear_max.linear_max_backward(out, x, weight, bias, offsets, token, True, True, True)


def lookups(batch, tokens):
    ids = empty(batch, tokens, dtype=torch.int64)
    tables = [empty(size, 768, dtype=DTYPE) for size in (30522, 2, 512)]
    out = embedding.embedding_sum(ids, tables[0], ids, tables[1], ids, tables[2], None, False)
    embedding.embedding_gradient(out, ids, 30522, 0)


def packing_both_ways(batch, tokens):
    rows, indices = empty(batch * tokens, 768, dtype=DTYPE), empty(max(1, batch * tokens // 2), dtype=torch.int64)
    packing.scatter_rows(packing.gather_rows(rows, indices, rows.shape[0]), indices, rows.shape[0])


def turned_rows(batch, tokens):
    table = empty(1024, 64, dtype=torch.float32)
    for shape, rotated in (((1, batch * tokens, 3, 12, 64), 2), ((batch, tokens, 1, 12, 64), 1)):
        x, out = (empty(*shape, dtype=DTYPE) for _ in range(2))
        row_ids = empty(batch * tokens, dtype=torch.int64)
        rotary.rotary(x, out, table, table, row_ids, rotated, inverse=False)


STEPS = [
    attention_step,
    lambda batch, tokens: attention_step(batch, tokens, packed=True),
    attention_of_chosen_queries,
    attention_of_views,
    attention_with_terms,
    norms,
    elementwise,
    gates,
    losses,
    linear_loss,
    log_probs,
    pooled_maxima,
    lookups,
    packing_both_ways,
    turned_rows,
]


def variants(steps_and_sizes):
    """Kernel -> how many versions of it these calls would compile."""
    found = {}
    for step, size in steps_and_sizes:
        for name, version in aot.specialisations(lambda step=step, size=size: step(*size), "sm90"):
            found.setdefault(name, set()).add(version)
    return {name: len(versions) for name, versions in found.items()}


# Fake tensors have no values, so a launcher that reads one back (item, tolist, nonzero) raises: the same calls also
# prove that nothing synchronises.
@pytest.mark.parametrize("step", STEPS, ids=lambda step: getattr(step, "__name__", "step").strip("<>"))
def test_batch_and_sequence_compile_nothing_new(step):
    found = variants((step, size) for size in SIZES)
    assert found
    several = {name: count for name, count in found.items() if count > allowed(name)}
    assert not several, f"versions for {len(SIZES)} batch and sequence sizes: {several}"


def allowed(name):
    # scale_kernel: of float32 and of 16-bit gradients; loss_sums_kernel: a mean's divisor, then the loss.
    return 2 if name in ("scale_kernel", "loss_sums_kernel") else 1


def test_another_width_is_another_version():
    """Of the tester: what ought to compile anew does."""

    def norm(columns):
        x = empty(4, columns, dtype=DTYPE)
        layer_norm.layer_norm(x, None, None, 1e-5)

    found = variants([(norm, (768,)), (norm, (1600,))])
    assert found == {"layer_norm_forward_kernel": 2}


def test_reading_a_value_back_is_noticed():
    def reads():
        packing.gather_rows(empty(4, int(new_seed()), dtype=DTYPE), new_seed(), 4)

    # A CPU build of torch stops earlier than the fake tensor does.
    with pytest.raises((DataDependentOutputException, RuntimeError), match="item|not linked with support for cuda"):
        aot.specialisations(reads, "sm90")
