"""softmax(scale q kᵀ) v for each sequence and head, dense (N, Q, H, D) or packed (T, H, D) with cu_seqlens.

Forward (online softmax, Milakov and Gimelshein 2018, Dao et al. 2022): a program owns BLOCK_M queries of one head and
walks over the keys in tiles; the running maximum m and sum l rescale the accumulator, and lse = m + log l is kept
(to base 2, as exp2 wants it).
Backward, P = exp(s - lse) recomputed, M the dropout mask times its scale, δ_i = Σ_d dO_id O_id:
    dV = (P M)ᵀ dO,   dP = (dO Vᵀ) M,   dS = P (dP - δ),   dQ = scale dS K,   dK = scale dSᵀ Q.
dQ and dK, dV come from two kernels, so that every output has one writer: no atomics, the same bits every time. The
dK, dV kernel works on transposed tiles, whose P and dS are then first operands of a product and stay in registers.

Bytes: q, k, v, out and lse once for each tile of the other axis, most of it from L2. Operations: 4 Q K D forward,
10 Q K D backward (14 with what both kernels recompute) a head, half of it if causal: tiles above the diagonal are never
touched, those below it carry no mask. Matrix instructions are the bound; with dropout it is the generator (11 integer
operations a weight), so forward and dQ walk in steps of 128 keys and use all that a counter gives; the dK, dV kernel
does where its tile has 128 keys, and with fewer throws the rest away, as float32 does everywhere. A sequence's queries
run from the last to the first: causal work is longest first.
Tiles: tables at the end. Registers decide them: an accumulator of BLOCK_M x D and a tile of BLOCK_M x BLOCK_N must fit.

A query that sees no key has l = 0: it gives 0, and lse = +inf makes its P 0 in backward. Padding up to the tile is
masked by the same rule: lse reads as +inf there.

Queries of some positions only (the rows of a last layer that somebody reads) carry their positions, never falling in a
sequence: causality and dropout go by them, so a row is what it would be among all. A tile's first and last position
say which keys it sees; a tile of keys finds the first query that sees it by bisection.

A window cuts a band out of the scores: a tile of queries begins at the first key that one of them sees and ends at the
last, a tile of keys likewise, so the work is O(Q window); tiles that an edge of the band crosses are masked, before and
behind those that it does not. None is an argument of its own for the compiler, and leaves nothing of this.

Terms by distance add to the scores, b = buckets[clamp(j - p_i, -R, R) + R]:
    S = scale (q_i k_j + c2p[i, b] + p2c[j, b]) + bias[clamp(j - p_i, -R, R) + R],
    dbias[d] = the sum of dS of its distance, dc2p[i, b] = scale times that of the bucket in row i, dp2c in column j.
Each tile looks up what it adds: the tables stay in the caches, of c2p and p2c it reads the rows that it owns. The dQ
kernel owns rows of dc2p, and each program a row of dbias, which torch adds up; the dK, dV kernel owns rows of dp2c.
They are float32 in memory: a tile adds to them before the next does, at the cost of 8 bytes of L1 or L2 for each
score, and once more for each distance that shares its bucket with one before. A bias's diagonals cost a shuffle of
the tile through shared memory instead. With terms all tiles are masked, which halves the code, and small, for the
addresses; none of this is there without them.

A `call` says which queries meet which keys and what becomes of the scores: fasttune/ops/_attention_call.py.
The kernels: attention_forward.py, attention_backward.py, and what they share, attention_rows.py, attention_terms.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fasttune.kernels import launch, tuning
from fasttune.kernels.attention_backward import attention_dkdv_kernel, attention_dq_kernel
from fasttune.kernels.attention_forward import attention_forward_kernel
from fasttune.kernels.launch import dropout_arguments


@dataclasses.dataclass(frozen=True)
class Tiles:
    """BLOCK_M queries by BLOCK_N keys; warps of 32 lanes; stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# (target, padded head dimension, kernel, dropout) -> tiles. Chosen ahead of time so that nothing spills and as many
# blocks fit a multiprocessor as registers allow (benchmarks/gpu_budgets.toml); not yet timed on hardware.
TILES = {
    ("sm80", 64, "forward", False): Tiles(128, 64, 8, 2),
    ("sm80", 64, "forward", True): Tiles(128, 64, 8, 2),
    ("sm80", 64, "dq", False): Tiles(128, 64, 8, 2),
    ("sm80", 64, "dq", True): Tiles(32, 128, 4, 1),
    ("sm80", 64, "dkdv", False): Tiles(32, 128, 8, 2),
    ("sm80", 64, "dkdv", True): Tiles(32, 128, 8, 2),
    ("sm80", 128, "forward", False): Tiles(64, 64, 8, 2),
    ("sm80", 128, "forward", True): Tiles(64, 128, 8, 1),
    ("sm80", 128, "dq", False): Tiles(64, 64, 8, 2),
    ("sm80", 128, "dq", True): Tiles(32, 128, 8, 1),
    ("sm80", 128, "dkdv", False): Tiles(64, 64, 8, 2),
    ("sm80", 128, "dkdv", True): Tiles(64, 64, 8, 2),
    ("sm90", 64, "forward", False): Tiles(128, 64, 8, 2),
    ("sm90", 64, "forward", True): Tiles(128, 64, 8, 2),
    ("sm90", 64, "dq", False): Tiles(64, 64, 4, 2),
    ("sm90", 64, "dq", True): Tiles(64, 64, 4, 2),
    ("sm90", 64, "dkdv", False): Tiles(64, 128, 8, 2),
    ("sm90", 64, "dkdv", True): Tiles(32, 128, 8, 2),
    ("sm90", 128, "forward", False): Tiles(128, 64, 8, 2),
    ("sm90", 128, "forward", True): Tiles(64, 64, 8, 2),
    ("sm90", 128, "dq", False): Tiles(128, 64, 8, 2),
    ("sm90", 128, "dq", True): Tiles(128, 32, 8, 2),
    ("sm90", 128, "dkdv", False): Tiles(64, 64, 8, 2),
    ("sm90", 128, "dkdv", True): Tiles(32, 128, 8, 1),
    ("sm100", 64, "dkdv", False): Tiles(64, 64, 4, 2),  # the rest of sm100 takes sm80's
    ("sm100", 128, "dkdv", False): Tiles(64, 64, 8, 2),
    ("gfx942", 64, "forward", False): Tiles(128, 64, 8, 2),
    ("gfx942", 64, "forward", True): Tiles(128, 64, 8, 2),
    ("gfx942", 64, "dq", False): Tiles(64, 64, 4, 2),
    ("gfx942", 64, "dq", True): Tiles(64, 64, 4, 1),
    ("gfx942", 64, "dkdv", False): Tiles(64, 64, 4, 2),
    ("gfx942", 64, "dkdv", True): Tiles(32, 64, 4, 2),
    ("gfx942", 128, "forward", False): Tiles(128, 64, 8, 2),
    ("gfx942", 128, "forward", True): Tiles(128, 64, 8, 2),
    ("gfx942", 128, "dq", False): Tiles(64, 64, 8, 1),
    ("gfx942", 128, "dq", True): Tiles(64, 64, 8, 1),
    ("gfx942", 128, "dkdv", False): Tiles(32, 64, 8, 1),
    ("gfx942", 128, "dkdv", True): Tiles(32, 64, 8, 1),
}
# Chosen queries have positions in registers, a window its masks. They take dropout's tiles, which leave some, but for:
CHOSEN_TILES = {
    ("sm80", 128, "dkdv"): Tiles(32, 64, 8, 2),
}
# A window is narrow, so of a small tile more is in it. The rest of sm100 takes sm80's.
WINDOW_TILES = {
    ("sm80", 64, "forward"): Tiles(64, 64, 4, 2),
    ("sm80", 128, "dkdv"): Tiles(32, 64, 4, 1),
    ("sm90", 64, "forward"): Tiles(64, 64, 4, 2),
    ("sm90", 128, "forward"): Tiles(64, 64, 8, 1),
    ("sm90", 128, "dkdv"): Tiles(32, 64, 4, 1),
    ("sm100", 64, "forward"): Tiles(64, 64, 8, 2),
    ("gfx942", 64, "forward"): Tiles(64, 64, 4, 2),
    ("gfx942", 64, "dkdv"): Tiles(32, 64, 4, 1),
    ("gfx942", 128, "forward"): Tiles(64, 64, 8, 1),
    ("gfx942", 128, "dq"): Tiles(64, 32, 8, 1),
}
# Terms of the scores have addresses in registers, and rows of buckets most of them: (padded head dimension, kernel,
# terms) -> tiles, of every target.
TERM_TILES = {
    (64, "forward", "bias"): Tiles(64, 64, 4, 2),
    (64, "forward", "buckets"): Tiles(64, 64, 4, 2),
    (64, "dq", "bias"): Tiles(64, 64, 8, 1),
    (64, "dq", "buckets"): Tiles(64, 32, 8, 1),
    (64, "dkdv", "buckets"): Tiles(16, 64, 4, 1),
    (128, "forward", "bias"): Tiles(64, 64, 8, 1),
    (128, "forward", "buckets"): Tiles(64, 64, 8, 1),
    (128, "dq", "bias"): Tiles(64, 32, 8, 1),
    (128, "dq", "buckets"): Tiles(64, 32, 8, 1),
    (128, "dkdv", "buckets"): Tiles(16, 64, 8, 1),
}
# What tuning tries beside them, in 16 bits: deeper pipelines, and a tile that may spill but reads less.
MORE_TILES = (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2))
# No matrix instructions in IEEE float32: a thread multiplies whole rows of head_dim elements, held in registers.
FLOAT32_TILES = {
    (64, "forward"): Tiles(32, 16, 4, 1),
    (64, "dq"): Tiles(16, 32, 4, 1),
    (64, "dkdv"): Tiles(32, 16, 4, 1),
    (128, "forward"): Tiles(16, 32, 8, 1),
    (128, "dq"): Tiles(16, 16, 8, 1),
    (128, "dkdv"): Tiles(16, 16, 4, 1),
}
INTERPRETED_TILES = {
    "forward": Tiles(64, 128, 1, 1),
    "dq": Tiles(128, 64, 1, 1),
    "dkdv": Tiles(64, 64, 1, 1),
}


def tiles(
    kernel: str,
    block_d: int,
    dtype: torch.dtype,
    dropout: bool,
    chosen: bool = False,
    windowed: bool = False,
    terms: str = "",
) -> Tiles:
    target = launch.target()
    if target == "interpreter":
        return INTERPRETED_TILES[kernel]
    if dtype == torch.float32:
        return FLOAT32_TILES[max(64, block_d), kernel]
    width, dropout = max(64, block_d), dropout or chosen or windowed or terms != ""
    if (width, kernel, terms) in TERM_TILES:
        return TERM_TILES[width, kernel, terms]
    known = target if (target, 64, kernel, dropout) in TILES else ("gfx942" if target.startswith("gfx") else "sm80")
    special = (CHOSEN_TILES if chosen else {}) | (WINDOW_TILES if windowed else {})
    for name in (target, known):
        if (name, width, kernel) in special:
            return special[name, width, kernel]
    return TILES[known, width, kernel, dropout]


def _tile(kernel: str, query: Tensor, call: Any, launch_with: Callable[..., None]) -> Tiles:
    """The table's tile or, with FASTTUNE_AUTOTUNE=1, the fastest of those for any target and of MORE_TILES."""
    block_d = launch.power_of_two(query.shape[-1], 16)
    dropout, chosen, windowed = call.seed is not None, call.positions_q is not None, call.window is not None
    terms = "buckets" if call.buckets is not None else "bias" if call.bias is not None else ""
    default = tiles(kernel, block_d, query.dtype, dropout, chosen, windowed, terms)
    kind = f"attention {kernel} {block_d} {query.dtype} causal={call.causal} dropout={dropout}"
    kind += " chosen" * chosen + f" {terms}" * bool(terms)
    kind += f" window={launch.power_of_two(call.window)}" if windowed else ""
    if query.dtype == torch.float32:
        candidates = [tile for (_, name), tile in FLOAT32_TILES.items() if name == kernel]
    else:
        candidates = [
            tile for (_, width, name, _), tile in TILES.items() if (width, name) == (max(64, block_d), kernel)
        ]
        candidates += MORE_TILES
    return tuning.choose(kind, default, candidates, launch_with, query.device)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_unit_strides(call: Any) -> Any:
    """Of c2p and p2c; the kernels hold offsets within a tile in 32 bits."""
    terms = {name: x for name in ("c2p", "p2c") if (x := getattr(call, name)) is not None}
    return call._replace(
        **{name: _unit_stride(x) if x.stride(-3) < 2**23 else x.contiguous() for name, x in terms.items()}
    )


def _strides(x: Tensor | None) -> tuple[int | None, ...]:
    """Strides of sequence, row and head of (N, S, H, D) or (T, H, D)."""
    if x is None:
        return (None, None, None)
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])


# CUDA's grids end there in the second dimension, where the kernels have their heads, and in the third, the sequences.
LAUNCH_BLOCKS = 65535


@dataclasses.dataclass(frozen=True)
class Part:
    """heads from `first` on of `sequences` from `sequence` on; all_heads: of each sequence."""

    first: int
    sequence: int
    sequences: int
    heads: int
    all_heads: int

    def of(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Of tensors (N, S, H, D) or (T, H, D)."""
        if not self._cuts:
            return list(tensors)
        return [None if x is None else self._narrow(x, x.dim() - 2, x.dim() == 4) for x in tensors]

    def of_statistics(self, *tensors: Tensor) -> list[Tensor]:
        """Of tensors (N, H, Q) or (H, R)."""
        if not self._cuts:
            return list(tensors)
        return [self._narrow(x, x.dim() - 2, x.dim() == 3) for x in tensors]

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        """Of a tensor (H, 2 R + 1)."""
        return bias if bias is None or not self._cuts else bias.narrow(0, self.first, self.heads)

    def numbers(self) -> tuple[int, int]:
        """The kernels' first_head, counted over all sequences, and heads."""
        return self.sequence * self.all_heads + self.first, self.all_heads

    @property
    def _cuts(self) -> bool:
        return self.first > 0 or self.sequence > 0 or LAUNCH_BLOCKS in (self.heads, self.sequences)

    def _narrow(self, x: Tensor, of_heads: int, dense: bool) -> Tensor:
        x = x.narrow(of_heads, self.first, self.heads)
        return x.narrow(0, self.sequence, self.sequences) if dense else x


def _pointers(call: Any) -> tuple[Tensor | None, ...]:
    """The kernels' q_offsets, k_offsets and positions."""
    if call.positions_q is None:
        return call.cu_seqlens, call.cu_seqlens, None
    return call.cu_seqlens_q, call.cu_seqlens, call.positions_q.to(torch.int32)


def _terms(part: Part, call: Any) -> tuple[Tensor | None, ...]:
    """The kernels' bias, c2p, p2c and buckets."""
    return part.of_bias(call.bias), *part.of(call.c2p, call.p2c), call.buckets


def _reach(call: Any) -> tuple[int | None, int | None]:
    """R of the bias and of the buckets."""
    bias, buckets = call.bias, call.buckets
    return None if bias is None else bias.shape[1] // 2, None if buckets is None else buckets.shape[0] // 2


def _ranks(buckets: Tensor) -> Tensor:
    """Of each distance, how many before it have the same bucket."""
    ordered, order = buckets.sort(stable=True)
    number = torch.arange(buckets.shape[0], dtype=torch.int32, device=buckets.device)
    return (number - torch.searchsorted(ordered, ordered, out_int32=True)).gather(0, order.argsort())


def _sums(gradient: Tensor | None) -> Tensor | None:
    """float32 for the kernels to add to, where they can the gradient itself."""
    if gradient is None or (gradient.dtype == torch.float32 and gradient.stride(-1) == 1):
        return gradient
    return torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)


def _lse_strides(query: Tensor, call: Any) -> tuple[int, int]:
    """Of sequence and head of lse, (N, H, Q) or (H, R)."""
    queries, heads = query.shape[-3:-1]
    return (heads * queries if call.cu_seqlens is None else 0), queries


def _launches(query: Tensor, call: Any) -> list[Part]:
    """What one launch each computes: mostly all at once."""
    heads, sequences = query.shape[-2], query.shape[0] if call.cu_seqlens is None else 1
    return [
        Part(first, sequence, min(LAUNCH_BLOCKS, sequences - sequence), min(LAUNCH_BLOCKS, heads - first), heads)
        for sequence in range(0, sequences, LAUNCH_BLOCKS)
        for first in range(0, heads, LAUNCH_BLOCKS)
    ]


def _grid(rows: int, block: int, part: Part, call: Any) -> tuple[int, int, int]:
    if call.cu_seqlens is None:
        return triton.cdiv(rows, block), part.heads, part.sequences
    return rows // block + call.cu_seqlens.shape[0] - 1, part.heads, 1


def _constants(query: Tensor, call: Any) -> dict[str, object]:
    head_dim = query.shape[-1]
    return {
        "CAUSAL": call.causal,
        "HEAD_DIM": head_dim,
        "BLOCK_D": launch.power_of_two(head_dim, 16),
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # tf32 concerns float32 alone
    }


def _tile_constants(tile: Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": launch.warps(tile.warps),
        "num_stages": tile.stages,
    }


def _step(tile: Tiles, dtype: torch.dtype, call: Any) -> int:
    """Keys a step of the loop: with dropout all that a counter serves, where there are registers for that."""
    whole = call.seed is not None and dtype != torch.float32 and call.bias is None and call.buckets is None
    return max(128, tile.block_n) if whole else tile.block_n


def forward(query: Tensor, key: Tensor, value: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    """(out, lse); lse to base 2, float32 (N, H, Q) or (H, T), +inf where no key is seen."""
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    call = _with_unit_strides(call)
    sizes = call.sizes(query, key)[:3]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((*query.shape[:-3], query.shape[-2], query.shape[-3]), dtype=torch.float32, device=query.device)
    if not out.numel():
        return out, lse
    threshold, keep_scale = dropout_arguments(call.seed, call.dropout_p)
    constants, pointers = _constants(query, call), _pointers(call)

    def launch_with(tile: Tiles) -> None:
        for part in _launches(query, call):
            attention_forward_kernel[_grid(sizes[1], tile.block_m, part, call)](
                *(*part.of(query, key, value, out), *part.of_statistics(lse), *pointers, call.seed),
                *(*_terms(part, call), *part.numbers(), *sizes, call.window, *_reach(call)),
                *(*_strides(query), *_strides(key), *_strides(value), *_strides(call.c2p), *_strides(call.p2c)),
                *(*_strides(out), *_lse_strides(query, call), call.scale, threshold, keep_scale),
                STEP=_step(tile, query.dtype, call),
                **_tile_constants(tile),
                **constants,
            )

    launch_with(_tile("forward", query, call, launch_with))
    return out, lse


def backward(
    dout: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: Sequence[Tensor | None],
    call: Any,
) -> None:
    """Fills the gradients of query, key, value, bias, c2p and p2c, in any strides; None for those nobody needs."""
    query, key, value, out, lse = tensors
    dout, query, key, value = _unit_stride(dout), _unit_stride(query), _unit_stride(key), _unit_stride(value)
    call = _with_unit_strides(call)
    dq, dk, dv, dbias, dc2p, dp2c = gradients
    if not query.numel() or not key.numel():
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    sizes, pointers = call.sizes(query, key)[:3], _pointers(call)
    delta = torch.empty_like(lse)
    ranks = None if dc2p is None and dp2c is None else _ranks(call.buckets)
    c2p_sums, p2c_sums = _sums(dc2p), _sums(dp2c)
    threshold, keep_scale = dropout_arguments(call.seed, call.dropout_p)
    constants = _constants(query, call)
    inputs = (*_strides(dout), *_strides(query), *_strides(key), *_strides(value))
    inputs += (*_strides(call.c2p), *_strides(call.p2c))
    options = (*_lse_strides(query, call), call.scale, threshold, keep_scale)

    def launch_dq(tile: Tiles) -> None:
        for sums in (dbias, c2p_sums):
            if sums is not None:
                sums.zero_()
        for part in _launches(query, call):
            grid, partial = _grid(sizes[1], tile.block_m, part, call), None
            if dbias is not None:  # a row of each program
                partial = dbias.new_zeros(grid[0] * grid[2], part.heads, dbias.shape[1])
            attention_dq_kernel[grid](
                *(*part.of(dout, query, key, value, out), *part.of_statistics(lse, delta), *part.of(dq), partial),
                *(
                    *part.of(c2p_sums),
                    *pointers,
                    call.seed,
                    *_terms(part, call),
                    ranks,
                    *part.numbers(),
                    *sizes,
                    call.window,
                    *_reach(call),
                ),
                *(*inputs, *_strides(out), *_strides(dq), *_strides(c2p_sums), *options),
                STEP=_step(tile, query.dtype, call),
                **_tile_constants(tile),
                **constants,
            )
            if partial is not None:
                part.of_bias(dbias).add_(partial.sum(0))

    def launch_dkdv(tile: Tiles) -> None:
        if p2c_sums is not None:
            p2c_sums.zero_()
        for part in _launches(query, call):
            attention_dkdv_kernel[_grid(sizes[2], tile.block_n, part, call)](
                *(*part.of(dout, query, key, value), *part.of_statistics(lse, delta), *part.of(dk, dv, p2c_sums)),
                *(
                    *pointers,
                    call.seed,
                    *_terms(part, call),
                    ranks,
                    *part.numbers(),
                    *sizes,
                    call.window,
                    *_reach(call),
                ),
                *(*inputs, *_strides(dk), *_strides(dv), *_strides(p2c_sums), *options),
                **_tile_constants(tile),
                **constants,
            )

    launch_dq(_tile("dq", query, call, launch_dq))
    if dk is not None or dv is not None or dp2c is not None:
        launch_dkdv(_tile("dkdv", query, call, launch_dkdv))
    for gradient, sums in ((dc2p, c2p_sums), (dp2c, p2c_sums)):
        if gradient is not None:
            torch.mul(sums, call.scale, out=gradient)
