"""Pallas kernels, Triton backend: FlashAttention-2's loops as GPU kernels that follow the tile plan.

One program computes one tile of query rows. The mask reaches the kernel as itself, a pytree with references for
leaves, so `allows` is evaluated on the tile's own indices and no mask is a special case. Tiles are read by index
arrays under masks: any length and head dim works without padding the operands in memory.

Sources: Dao, FlashAttention-2 (2023), sections 3.1 to 3.3; Dao et al., Flash-Decoding (2023), for the split.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import warnings
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxattn import online_softmax, tiles
from jaxattn.impl.base import Implementation, Problem, dot_precision
from jaxattn.masks import FULL, PARTIAL, Mask

_LOG2_E = math.log2(math.e)
_MAX_HEAD_DIM = 256
_L2_SHARE_BYTES = 16 << 20  # keys and values that programs running together may re-read: a third of an H100's L2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one kernel is cut and compiled.

    Attributes:
      block_q: rows of a tile: queries, times the query heads packed into it.
      block_k: keys of a tile.
      num_warps: warps of 32 threads per program.
      num_stages: tiles that are loaded ahead.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        for name, least in (("block_q", 16), ("block_k", 16), ("num_warps", 1), ("num_stages", 1)):
            value = getattr(self, name)
            power = isinstance(value, int) and value >= least and (name == "num_stages" or value & (value - 1) == 0)
            if not power:
                wanted = "an int" if name == "num_stages" else "a power of two"
                raise ValueError(f"Tiling {name}={value!r} must be {wanted} of at least {least}")


@dataclasses.dataclass(frozen=True)
class Triton(Implementation):
    """Attention as Pallas kernels through Triton, for NVIDIA GPUs of compute capability 8.0 and later.

    Args:
      block_q, block_k, num_warps, num_stages: the forward kernel's `Tiling`; None takes `default_tiling`'s.
      splits: into how many parts, a power of two, the keys of a row are split, to be merged afterwards; None splits
        where a few rows read many keys (decoding).
      precision: of float32 matrix products; None is full float32.
      interpret: run the kernels by Pallas' interpreter, on any device, slowly.
      platform: "cuda" lowers for CUDA whatever the device here: for compiling elsewhere.
    """

    block_q: int | None = None
    block_k: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    splits: int | None = None
    precision: lax.PrecisionLike = None
    interpret: bool = False
    platform: str | None = None
    name: ClassVar[str] = "triton"

    def __post_init__(self):
        self._override(Tiling(16, 16, 1, 1))
        if self.splits is not None and (self.splits < 1 or self.splits & (self.splits - 1)):
            raise ValueError(f"Triton splits={self.splits!r} must be a power of two, or None")
        if self.platform not in (None, "cuda"):
            raise ValueError(f'Triton platform={self.platform!r} must be "cuda" or None')

    def refusal(self, problem: Problem) -> str | None:
        dtype, head_dim = problem.query.dtype, max(problem.query.shape[-1], problem.value.shape[-1])
        if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"the kernels take bfloat16, float16 and float32, not {dtype}; blockwise takes all"
        if head_dim > _MAX_HEAD_DIM:
            return f"a tile of head dim {head_dim} does not fit a core; the kernels take at most {_MAX_HEAD_DIM}"
        try:
            _backend()
        except ImportError as error:
            return f"this jax ({jax.__version__}) has no Triton backend for Pallas: {error}"
        return None if self.interpret or self.platform == "cuda" else _device_refusal()

    @functools.partial(jax.jit, static_argnums=0)
    def attend(self, problem: Problem) -> tuple[jax.Array, jax.Array]:
        key = problem.key
        tiling = self._override(default_tiling(key.shape[-1], key.dtype))
        config = _Config(tiling, self.splits, problem.scale, problem.soft_cap, self.precision, self.interpret)
        query = problem.query.astype(key.dtype)  # float32 where a traced scale was multiplied in
        return _forward(config, query, key, problem.value, problem.bias, problem.mask)

    def _override(self, tiling: Tiling) -> Tiling:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Tiling)}
        return dataclasses.replace(tiling, **{name: value for name, value in given.items() if value is not None})


def default_tiling(head_dim: int, dtype) -> Tiling:
    """A tiling that compiles without spilling."""
    if jnp.dtype(dtype).itemsize == 4:
        return Tiling(64, 32, 4, 2)
    return Tiling(128, 64, 8, 3) if head_dim <= 128 else Tiling(64, 32, 4, 2)


def _backend():
    """Imported when used: the backend is deprecated since jax 0.11, and the library must load without it."""
    return importlib.import_module("jax.experimental.pallas.triton")


def _device_refusal() -> str | None:
    """Why the default device cannot run the kernels."""
    hint = "Triton(interpret=True) runs the kernels by Pallas' interpreter, blockwise runs everywhere"
    if jax.default_backend() != "gpu":
        return f"the kernels need an NVIDIA GPU, and JAX runs on {jax.default_backend()}; {hint}"
    device = jax.local_devices()[0]
    try:
        capability = float(device.compute_capability)
    except (AttributeError, ValueError):
        return f"the kernels need an NVIDIA GPU, not {device.device_kind}; {hint}"
    if capability < 8:
        return f"the kernels need compute capability 8.0, and {device.device_kind} has {capability}; {hint}"
    return None


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is static in one call."""

    tiling: Tiling
    splits: int | None
    scale: float
    soft_cap: float | None
    precision: lax.PrecisionLike
    interpret: bool


class _Columns(NamedTuple):
    """The tiles that each row of tiles visits, of one kind, as a kernel walks them.

    bounds: int32 [B|1, groups|1, rows, R, 2], R ranges; or [B|1, groups|1, rows, 1, 2], 0 and the length of `index`.
    index: None, or int32 [B|1, groups|1, rows, most].
    """

    bounds: Any
    index: Any


def _columns(visits: tiles.Visits) -> _Columns | None:
    """None where it is known that nothing is visited, so that no code is made for it."""
    if isinstance(visits.count, np.ndarray) and not visits.count.any():
        return None
    if visits.runs is not None:
        return _Columns(visits.runs, None)
    return _Columns(jnp.stack([jnp.zeros_like(visits.count), visits.count], -1)[..., None, :], visits.index)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """The arithmetic of one tile, inside a kernel: what is where, how it is read, which logits it has.

    Rows of queries are (token, head) pairs: `heads` query heads of one group share a tile, so that a loaded key tile
    serves them all. Queries run down the tile and keys across.
    """

    config: _Config
    tiling: Tiling
    sizes: tuple[int, int, int, int, int, int]
    heads: int
    has_bias: bool
    clears: bool  # whether keys that no query reads, which may hold NaN, must be cleared in PARTIAL tiles

    @property
    def tokens(self) -> int:
        return self.tiling.block_q // self.heads

    @property
    def blocks(self) -> tuple[int, int]:
        return pl.cdiv(self.sizes[1], self.tokens), pl.cdiv(self.sizes[2], self.tiling.block_k)

    @property
    def groups(self) -> int:
        return self.sizes[3] // self.heads

    @property
    def factor(self) -> float:
        """c in logit = c x ln 2, for the x of `logits`. c > 0 goes into the exponent's fused multiply-add."""
        return self.config.scale * _LOG2_E if self._plain else _LOG2_E

    @property
    def _plain(self) -> bool:
        return not self.has_bias and self.config.soft_cap is None and self.config.scale > 0

    def rows(self, i, group):
        """t [rows, 1], n (the same, or a number) and which rows there are (None for all), of block i."""
        r = jnp.arange(self.tiling.block_q, dtype=jnp.int32)[:, None]
        t, n, keep = i * self.tokens + r, group, None
        if self.heads > 1:
            t, n = i * self.tokens + r // self.heads, group * self.heads + r % self.heads
        if self.sizes[1] % self.tokens:
            keep = t < self.sizes[1]
        if self.tokens * self.heads < self.tiling.block_q:
            keep = _and(keep, r < self.tokens * self.heads)
        return t, n, keep

    def keys(self, j):
        """s [block_k] of key block j."""
        block_k = self.tiling.block_k
        return j * block_k + jnp.arange(block_k, dtype=jnp.int32)

    def allowed(self, mask: Mask, b, t, n, keep, s):
        """Which logits count, bool [rows, block_k]; which keys there are, and which are read, bool [block_k, 1]."""
        inside = s < self.sizes[2] if self.sizes[2] % self.tiling.block_k else None
        allowed = mask.allows(t, s[None, :], functools.partial(_take, b, n))
        allowed = jnp.broadcast_to(allowed, (t.shape[0], s.shape[0]))
        allowed = allowed if inside is None else allowed & inside[None, :]
        there = None if inside is None else inside[:, None]
        if not self.clears:
            return allowed, there, there
        allowed = allowed if keep is None else allowed & keep
        return allowed, there, (allowed.astype(jnp.int32).max(0) > 0)[:, None]

    def logits(self, q, k, bias_ref, b, t, n, s):
        """x [rows, block_k], of which the logits are `factor` x ln 2."""
        x, cap, scale = _dot(q, k.T, self.config.precision), self.config.soft_cap, self.config.scale
        if self._plain:
            return x
        x = x * scale if cap is None else cap * jnp.tanh(x * (scale / cap))
        return x if bias_ref is None else x + _take(b, n, bias_ref, t=t, s=s[None, :]).astype(jnp.float32)


def _and(a, b):
    return b if a is None else a if b is None else a & b


def _load(ref, index, keep=None):
    if keep is None:
        return _backend().load(ref.at[index])
    shape = np.broadcast_shapes(*(jnp.shape(i) for i in index))
    return _backend().load(ref.at[index], mask=jnp.broadcast_to(keep, shape), other=jnp.zeros((), ref.dtype))


def _store(ref, index, value, keep=None):
    keep = None if keep is None else jnp.broadcast_to(keep, value.shape)
    _backend().store(ref.at[index], value.astype(ref.dtype), mask=keep)


def _head(size: int):
    """Indices [1, H] of a head filled up to a power of two of at least 16, and which of them there are."""
    padded = max(pl.next_power_of_2(size), 16)
    h = jnp.arange(padded, dtype=jnp.int32)[None, :]
    return h, None if padded == size else h < size


def _load_heads(ref, b, tokens, n, keep):
    """[tokens, H] of heads n, zero where `keep` does not hold, H filled up; tokens, n and keep are [tokens, 1]."""
    h, inside = _head(ref.shape[-1])
    return _load(ref, (b, tokens, n, h), _and(keep, inside))


def _take(b, n, ref, t=None, s=None):
    """`masks.gather` for batch element b and heads n, reading zeros outside of the array."""
    given = [x for x in (t, s) if x is not None]
    lead = len(ref.shape) - len(given)
    index, keep = [], None
    for axis, x in enumerate([b, n][:lead] + given):
        index.append(np.int32(0) if ref.shape[axis] == 1 else x)
        if axis >= lead and ref.shape[axis] > 1:
            keep = _and(keep, (x >= 0) & (x < ref.shape[axis]))
    return _load(ref, tuple(index), keep)


def _dot(a, b, precision):
    return jnp.dot(a, b, precision=dot_precision(a.dtype, precision), preferred_element_type=jnp.float32)


def _walk(columns: _Columns, b, group, i, part, parts):
    """The visits [first, stop) of one part of row i, and the column of a visit."""
    b, group = [np.int32(0) if n == 1 else x for n, x in zip(columns.bounds.shape[:2], (b, group), strict=True)]
    ends = [(np.int32(run), np.int32(end)) for run in range(columns.bounds.shape[3]) for end in (0, 1)]
    ends = [_load(columns.bounds, (b, group, i, *end)) for end in ends]
    bounds = list(zip(ends[::2], ends[1::2], strict=True))
    count = sum(stop - start for start, stop in bounds)

    def column(visit):
        if columns.index is not None:
            return _load(columns.index, (b, group, i, visit))
        (start, stop), *second = bounds
        j = start + visit
        return jnp.where(j < stop, j, second[0][0] + j - stop) if second else j

    return count * part // parts, count * (part + 1) // parts, column


def _place(tile: _Tile, heaviest_last: bool):
    """Batch element, group of heads, block of queries and part of this program.

    Programs start in this order: the heads whose keys stay in L2 together, for one block of queries after the other,
    the longest rows first, so that the last programs to start are short; then the next such heads.
    """
    head = pl.program_id(2) * pl.num_programs(0) + pl.program_id(0)
    i = pl.program_id(1)
    i = pl.num_programs(1) - 1 - i if heaviest_last else i
    return head // tile.groups, head % tile.groups, i, pl.program_id(3)


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask, partial, full, out_ref, lse_ref, *, tile: _Tile, order):
    b, group, i, part = _place(tile, order)
    t, n, keep = tile.rows(i, group)
    k_head, c = group * tile.heads // tile.sizes[5], tile.factor
    q = _load_heads(q_ref, b, t, n, keep)

    def visit(columns, masked, state):
        if columns is None:
            return state
        first, stop, column = _walk(columns, b, group, i, part, pl.num_programs(3))

        def body(visited, state):
            m, l, o = state
            s, there, read = tile.keys(column(visited)), None, None
            if masked:
                allowed, there, read = tile.allowed(mask, b, t, n, keep, s)
            k = _load_heads(k_ref, b, s[:, None], k_head, there)
            x = tile.logits(q, k, bias_ref, b, t, n, s)
            x = jnp.where(allowed, x, -jnp.inf) if masked else x
            m_next = jnp.maximum(m, x.max(1))
            shift = online_softmax.finite(m_next) * c
            alpha, p = jnp.exp2(m * c - shift), jnp.exp2(x * c - shift[:, None])
            v = _load_heads(v_ref, b, s[:, None], k_head, read)
            o = online_softmax.rescale(o, alpha) + _dot(p.astype(v.dtype), v, tile.config.precision)
            return m_next, l * alpha + p.sum(1), o

        return lax.fori_loop(first, stop, body, state)

    h, inside = _head(v_ref.shape[-1])
    state = online_softmax.start((tile.tiling.block_q,), h.shape[1])
    state = visit(partial, True, tuple(state))  # in this order the compiler overlaps the products of the longer loop
    m, l, o = visit(full, False, state)
    absent = l == 0
    total = jnp.where(absent, 1, l)
    _store(out_ref, (part, b, t, n, h), o / total[:, None], _and(keep, inside))
    lse = jnp.where(absent, -jnp.inf, (m * c + jnp.log2(total)) / _LOG2_E)
    _store(lse_ref, (part, b, t, n), lse[:, None], keep)


def _forward(config: _Config, query, key, value, bias, mask):
    B, T, N, H = query.shape
    S, K, H_v = value.shape[1:]
    sizes, G = (B, T, S, N, K, N // K), N // K
    tiling = dataclasses.replace(
        config.tiling,
        block_q=min(config.tiling.block_q, _power(T * G)),
        block_k=min(config.tiling.block_k, _power(S)),
    )
    heads = _packed_heads(T, G, tiling.block_q)
    tile = _Tile(config, tiling, sizes, heads, bias is not None, False)
    plan = tiles.plan(mask, T, S, tile.tokens, tiling.block_k, tile.groups)
    tile = dataclasses.replace(tile, clears=not _reads_every_key(mask, plan, T, S))
    parts = config.splits or _default_splits(tile)
    together = _heads_together(tile, (H + H_v) * key.dtype.itemsize)
    dtype = query.dtype if parts == 1 else jnp.float32
    out, lse = _call(
        functools.partial(_forward_kernel, tile=tile, order=_heaviest_last(plan)),
        config,
        tiling,
        (together, tile.blocks[0], B * tile.groups // together, parts),
        (((parts, B, T, N, H_v), dtype), ((parts, B, T, N), jnp.float32)),
        (query, key, value, bias, _leaves_with_axes(mask), _columns(plan.partial), _columns(plan.full)),
        "attention_forward",
    )
    while parts > 1:
        parts //= 2
        out, lse = online_softmax.merge(out[:parts], lse[:parts], out[parts:], lse[parts:])
    return out[0].astype(query.dtype), lse[0]


def _call(kernel, config: _Config, tiling: Tiling, grid, outputs, operands, name: str):
    # Raised when the kernel is lowered, later than here; the filter holds for this one message.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
        grid=grid,
        compiler_params=_backend().CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages),
        interpret=config.interpret,
        name=name,
    )(*operands)


def _leaves_with_axes(mask: Mask) -> Mask:
    """Numbers become arrays [1], which `_take` reads as it reads [B]."""
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (1,)) if jnp.ndim(leaf) == 0 else jnp.asarray(leaf), mask)


def _power(size: int) -> int:
    return max(pl.next_power_of_2(size), 16)


def _packed_heads(T: int, G: int, block_q: int) -> int:
    """Query heads per tile: the whole group where the queries of one head would not fill a tile."""
    return max(d for d in range(1, G + 1) if G % d == 0 and d <= block_q) if block_q > T else 1


def _heads_together(tile: _Tile, bytes_per_key: int) -> int:
    """How many of the B * groups heads may run at a time so that their keys and values stay in L2; a divisor."""
    B, _, S, N, K, _ = tile.sizes
    most = max(_L2_SHARE_BYTES // (S * bytes_per_key), 1) * tile.groups // K
    return max(d for d in range(1, B * tile.groups + 1) if (B * tile.groups) % d == 0 and d <= max(most, 1))


def _heaviest_last(plan: tiles.Plan) -> bool:
    """Whether later blocks of queries visit more tiles; causal masks do, and masks with arrays are taken to."""
    if not isinstance(plan.codes, np.ndarray):
        return True
    count = (plan.partial.count + plan.full.count).sum((0, 1))
    return bool(count[len(count) // 2 :].sum() > count[: (len(count) + 1) // 2].sum())


def _default_splits(tile: _Tile) -> int:
    """Enough parts for about 256 programs, of at least 4 key tiles each, where all queries fit one tile."""
    if tile.blocks[0] > 1:
        return 1
    wanted = min(256 // (tile.sizes[0] * tile.groups), tile.blocks[1] // 4)
    return 1 << max(wanted, 1).bit_length() - 1


def _reads_every_key(mask: Mask, plan: tiles.Plan, T: int, S: int) -> bool:
    """Whether it is known that some query reads each key of a PARTIAL tile. False where the mask holds arrays."""
    if not mask.is_static:
        return False
    codes = plan.codes[0, 0]
    for j in np.nonzero((codes == PARTIAL).any(0) & ~(codes == FULL).any(0))[0]:
        s = np.arange(j * plan.block_k, min((j + 1) * plan.block_k, S))[None, :]
        read = np.zeros(s.shape[1], bool)
        for i in np.nonzero(codes[:, j])[0]:
            t = np.arange(i * plan.block_q, min((i + 1) * plan.block_q, T))[:, None]
            read |= np.broadcast_to(mask.allows(t, s), (len(t), s.shape[1])).any(0)
            if read.all():
                break
        else:
            return False
    return True
