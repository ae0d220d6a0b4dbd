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
import json
import math
import warnings
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.extend import core
from jax.interpreters import mlir
from jax.sharding import ManualAxisType

from jaxattn import online_softmax, tiles
from jaxattn.impl.base import Implementation, Problem, dot_precision
from jaxattn.impl.partition import independent, varying_alike
from jaxattn.masks import FULL, PARTIAL, Full, Mask

_LOG2_E = math.log2(math.e)
_MAX_HEAD_DIM = 256
_SHORT = 1024  # queries; the tuning table has one row for up to so many and one for more
_DECODE_ROWS = 32  # at most so many query rows make a decoding tile
_TABLE = Path(__file__).with_name("triton_table.json")
_SHORT_OFFSETS, _WIDE_BOOL = 2**31, jnp.float16  # no other leaf of a mask is float16
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
      block_q, block_k, num_warps, num_stages: the forward kernel's `Tiling`; None takes `default_tiling`.
      dq, dkv: tilings of the backward kernels, for dq, and for dk and dv; None takes `default_tiling`.
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
    dq: Tiling | None = None
    dkv: Tiling | None = None
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
        dtype, head_dim = problem.key.dtype, max(problem.query.shape[-1], problem.value.shape[-1])
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
    def attend(self, problem: Problem) -> tuple[jax.Array, jax.Array | None]:
        key = problem.key
        _, T, _, _, _, G = problem.sizes
        head_dim, masked = max(key.shape[-1], problem.value.shape[-1]), not isinstance(problem.mask, Full)
        forward, dq, dkv = [
            default_tiling(kernel, head_dim, key.dtype, masked, T, device_names())
            for kernel in ("decode" if T * G <= _DECODE_ROWS else "forward", "dq", "dkv")
        ]
        config = _Config(
            forward=self._override(forward),
            dq=self.dq or dq,
            dkv=self.dkv or dkv,
            splits=self.splits,
            residual=problem.residual,
            scale=problem.scale,
            soft_cap=problem.soft_cap,
            precision=self.precision,
            interpret=self.interpret,
        )
        query = problem.query.astype(key.dtype)  # float32 where a traced scale was multiplied in
        out, *lse = _attention(config, *varying_alike(query, key, problem.value, problem.bias, problem.mask))
        return out, lse[0] if lse else None

    def _override(self, tiling: Tiling) -> Tiling:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Tiling)}
        return dataclasses.replace(tiling, **{name: value for name, value in given.items() if value is not None})


def default_tiling(
    kernel: str, head_dim: int, dtype, masked: bool = True, length: int = 0, devices: tuple[str, ...] = ("9.0",)
) -> Tiling:
    """The tiling that a kernel takes where none is given.

    Of the rows of `triton_table.json` that fit, the one for the first of `devices`, then for this dtype rather than
    the other one of 16 bits, then for the smallest head dim. The table is written by `python -m bench tune`: rows for
    a compute capability are picked by a rule from what the compiler says of each tiling, rows for a device by name
    were measured on it.

    Args:
      kernel: "forward", "dq", "dkv", or "decode", the forward kernel where all query rows fit a small tile.
      head_dim: the larger of the key's and the value's.
      dtype: of the operands.
      masked: whether there is any mask.
      length: number of queries.
      devices: names to look for, as "h100" or a compute capability, most wanted first.

    Example:
      >>> default_tiling("decode", 64, "bfloat16").block_q
      16
    """
    dtype, wanted = jnp.dtype(dtype), {"kernel": kernel, "masked": masked, "long": length > _SHORT}
    devices = (*devices, "8.9")  # what fits into its shared memory fits into every GPU's
    fitting = [
        row
        for row in json.loads(_TABLE.read_text())
        if row["device"] in devices
        and row["head_dim"] >= head_dim
        and jnp.dtype(row["dtype"]).itemsize == dtype.itemsize
        and all(row.get(name, value) == value for name, value in wanted.items())
    ]
    best = min(fitting, key=lambda row: (devices.index(row["device"]), row["dtype"] != dtype.name, row["head_dim"]))
    return Tiling(*best["tiling"])


def tuned_capability(capability: float) -> str:
    """The compute capability whose rows of the table a GPU takes where none are its own.

    By the shared memory of a block: 9.0's rows take up to 227 KiB (9.x to 11.x), 8.0's up to 163 KiB, 8.9's up to 99
    KiB (8.6, 8.9, 12.x).

    Example:
      >>> tuned_capability(12.0)
      '8.9'
    """
    if capability in (8.6, 8.9) or capability >= 12:
        return "8.9"
    return "9.0" if capability >= 9 else "8.0"


def _backend():
    """Imported when used: the backend is deprecated since jax 0.11, and the library must load without it."""
    return importlib.import_module("jax.experimental.pallas.triton")


def device_names() -> tuple[str, ...]:
    """The device here and its compute capability, as the tuning table has them; an H100's where there is no GPU."""
    if jax.default_backend() != "gpu":
        return ("9.0",)
    device = jax.local_devices()[0]
    kind = device.device_kind.lower().replace("-", " ").split()
    return *(word for word in kind if any(map(str.isdigit, word))), tuned_capability(_capability(device))


def _capability(device) -> float:
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):
        return 0.0


def _device_refusal() -> str | None:
    """Why the default device cannot run the kernels."""
    hint = "Triton(interpret=True) runs the kernels by Pallas' interpreter, blockwise runs everywhere"
    if jax.default_backend() != "gpu":
        return f"the kernels need an NVIDIA GPU, and JAX runs on {jax.default_backend()}; {hint}"
    device = jax.local_devices()[0]
    capability = _capability(device)
    if not capability:
        return f"the kernels need an NVIDIA GPU, not {device.device_kind}; {hint}"
    if capability < 8:
        return f"the kernels need compute capability 8.0, and {device.device_kind} has {capability}; {hint}"
    return None


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is static in one call."""

    forward: Tiling
    dq: Tiling
    dkv: Tiling
    splits: int | None
    residual: bool
    scale: float
    soft_cap: float | None
    precision: lax.PrecisionLike
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: _Config, query, key, value, bias, mask):
    """The output and, where `residual` asks for it, the log-sum-exp."""
    arrays = (query, key, value, bias, mask)
    layout, visits = _lay_out(config.forward, *arrays)
    axes_in = (*_axes(*arrays), layout.axes(visits))
    axes_out = ("b.n.", "b.n") if config.residual else ("b.n.",)
    return independent(functools.partial(_forward, config, layout), axes_in, axes_out)(*arrays, visits)


def _attention_fwd(config, *arrays):
    out, lse = _attention(dataclasses.replace(config, residual=True), *arrays)
    # Named where they are residuals, so that a policy that saves them need not run the forward kernel again.
    out, lse = checkpoint_name((out, lse), "context")
    return (out, lse) if config.residual else (out,), (*arrays, out, lse)


def _attention_bwd(config, residuals, cotangents):
    *arrays, out, lse = residuals
    d_out, *d_lse = cotangents
    # Where no key is attended the log-sum-exp is a constant, and its cotangent may well be NaN.
    d_lse = jnp.where(lse == -jnp.inf, 0, d_lse[0]) if d_lse else jnp.zeros_like(lse)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * _LOG2_E)  # absent rows get p = exp2(x - inf) = 0
    operands, axes = (*arrays, d_out.astype(out.dtype), lse, delta), (*_axes(*arrays), "b.n.", "b.n", "b.n")

    def run(function, tiling, axes_out, summed, **options):
        layout, visits = _lay_out(tiling, *arrays, **options)
        function = functools.partial(function, config, layout)
        return independent(function, (*axes, layout.axes(visits)), axes_out, summed)(*operands, visits)

    (dq,) = run(_dq, config.dq, ("b.n.",), ("",))
    dk, dv = run(_dkv, config.dkv, ("b.k.", "b.k."), ("", ""), by_key=True)
    d_bias, bias = None, arrays[3]
    if bias is not None:  # shards add up where one bias serves many batch elements or heads
        summed = "".join(letter for letter, n in zip("bn", bias.shape, strict=False) if n == 1)
        (d_bias,) = run(_d_bias, config.dq, ("bn..",), (summed,), by_tile=True)
    return dq, dk, dv, d_bias, None  # a mask has no gradient


def _axes(query, key, value, bias, mask):
    return "b.n.", "b.k.", "b.k.", None if bias is None else "bn..", mask.axes()


_attention.defvjp(_attention_fwd, _attention_bwd)


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
        return _Columns(jnp.asarray(visits.runs), None)
    bounds = jnp.stack([jnp.zeros_like(visits.count), visits.count], -1)[..., None, :]
    return _Columns(bounds, jnp.asarray(visits.index))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How one kernel covers the problem; nothing here depends on how many batch elements or heads a device has.

    Attributes:
      tiling: its tiles no larger than the whole.
      heads: query heads of a group in one tile.
      plan_axis: "n" where visits are planned by query head, "k" by key/value head.
      reverse: whether the last rows of tiles are the longest.
      clears: whether keys that no query reads, which may hold NaN, must be cleared in PARTIAL tiles.
    """

    tiling: Tiling
    heads: int
    plan_axis: str
    reverse: bool
    clears: bool

    def axes(self, visits):
        """Letters of the visits' axes, for `independent`."""
        return jax.tree.map(lambda x: "b" + self.plan_axis + "." * (x.ndim - 2), visits)


def _lay_out(tiling: Tiling, query, key, value, bias, mask, by_key=False, by_tile=False):
    """The layout of a kernel, and what it visits: PARTIAL and FULL columns by row of tiles, or all codes."""
    (_, T, N, _), (_, S, K, _) = query.shape, key.shape
    G = N // K
    rows = T if by_tile else T * G
    blocks = [min(block, _power(n)) for block, n in ((tiling.block_q, rows), (tiling.block_k, S))]
    tiling = dataclasses.replace(tiling, block_q=blocks[0], block_k=blocks[1])
    heads = 1
    if by_key or (tiling.block_q > T and not by_tile):  # one head's queries would not fill a tile, or all are needed
        heads = max(d for d in range(1, G + 1) if G % d == 0 and d <= tiling.block_q)
    plan_axis = "k" if by_key or heads > 1 else "n"
    plan = tiles.plan(mask, T, S, tiling.block_q // heads, tiling.block_k, K if plan_axis == "k" else N)
    clears = not _reads_every_key(mask, plan, T, S)
    plan = plan.transpose() if by_key else plan
    layout = _Layout(tiling, heads, plan_axis, _heaviest_last(plan), clears)
    if by_tile:
        return layout, jnp.asarray(plan.codes, jnp.int32)
    return layout, (_columns(plan.partial), _columns(plan.full))


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One tile of logits, inside a kernel: what is where, and the arithmetic that all kernels share.

    Rows of queries are (token, head) pairs: `heads` query heads of one group share a tile, so that a loaded key tile
    serves them all. Index vectors are broadcast by the kernel, queries down and keys across or the other way around.
    """

    config: _Config
    layout: _Layout
    sizes: tuple[int, int, int, int, int, int]
    has_bias: bool

    @property
    def tiling(self) -> Tiling:
        return self.layout.tiling

    @property
    def heads(self) -> int:
        return self.layout.heads

    @property
    def tokens(self) -> int:
        return self.tiling.block_q // self.heads

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

    def in_order(self, visits):
        """The tiles' columns, and whether they are masked: in this order the longer loop's products overlap on 9.0."""
        partial, full = visits
        return (partial, True), (full, False)

    def row_of_plan(self, group):
        return group if self.layout.plan_axis == "n" else self.key_head(group)

    def key_head(self, group):
        return _divmod(group, self.sizes[5] // self.heads)[0]

    def rows(self, i, group):
        """t, n and which rows there are, all [block_q], of block i; n may be a number, and None is all rows."""
        r = jnp.arange(self.tiling.block_q, dtype=jnp.int32)
        t, n, keep = i * self.tokens + r, group, None
        if self.heads > 1:
            token, head = _divmod(r, self.heads)
            t, n = i * self.tokens + token, group * self.heads + head
        if self.sizes[1] % self.tokens:
            keep = t < self.sizes[1]
        if self.tokens * self.heads < self.tiling.block_q:
            keep = _and(keep, r < self.tokens * self.heads)
        return t, n, keep

    def keys(self, j):
        """s and which keys there are, [block_k], of block j; None is all."""
        s = j * self.tiling.block_k + jnp.arange(self.tiling.block_k, dtype=jnp.int32)
        return s, s < self.sizes[2] if self.sizes[2] % self.tiling.block_k else None

    def allowed(self, mask: Mask, b, n, t, s, row_there, key_there):
        """Which logits of the tile count."""

        def gather(ref, t=None, s=None):
            value = _take(b, n, ref, t, s)
            return value != 0 if value.dtype == _WIDE_BOOL else value

        allowed = mask.allows(t, s, gather)
        allowed = jnp.broadcast_to(allowed, np.broadcast_shapes(t.shape, s.shape))
        allowed = _and(allowed, key_there)
        return _and(allowed, row_there) if self.layout.clears else allowed

    def logits(self, product, bias_ref, b, n, t, s):
        """x from the product q k, where the logits are `factor` x ln 2, and the soft cap's derivative (None for 1)."""
        cap, scale = self.config.soft_cap, self.config.scale
        if self._plain:
            return product, None
        x, slope = product * scale, None
        if cap is not None:
            ratio = jnp.tanh(x / cap)
            x, slope = cap * ratio, 1 - ratio * ratio
        return x if bias_ref is None else x + _take(b, n, bias_ref, t=t, s=s).astype(jnp.float32), slope

    def exp2(self, x, y):
        """2 ** (factor x + y), in two instructions: the compiler fuses no product and sum, and guards subnormals."""
        y = jnp.broadcast_to(y, x.shape)
        if self.config.interpret:
            return jnp.exp2(x * self.factor + y)
        factor = np.float32(self.factor).view(np.uint32)
        (power,) = _backend().elementwise_inline_asm(
            f"{{ .reg .f32 e; fma.rn.f32 e, $1, 0f{factor:08X}, $2; ex2.approx.ftz.f32 $0, e; }}",
            args=[x, y],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
        )
        return power


def _divmod(x, y: int):
    """x // y and x % y of what is not negative, without the sign's arithmetic."""
    return (x, np.int32(0)) if y == 1 else (lax.div(x, np.int32(y)), lax.rem(x, np.int32(y)))


def _and(a, b):
    return b if a is None else a if b is None else a & b


def _load(ref, index, keep=None, other=0):
    if keep is None:
        return _backend().load(ref.at[index])
    shape = np.broadcast_shapes(*(jnp.shape(i) for i in index))
    return _backend().load(ref.at[index], mask=jnp.broadcast_to(keep, shape), other=jnp.asarray(other, ref.dtype))


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
    for axis, x in enumerate([*(b, n)[:lead], *given]):
        index.append(np.int32(0) if ref.shape[axis] == 1 else x)
        if axis >= lead and ref.shape[axis] > 1:
            keep = _and(keep, (x >= 0) & (x < ref.shape[axis]))
    return _load(ref, tuple(index), keep)


def _down(x):
    return x if x is None or not jnp.ndim(x) else x[:, None]


def _across(x):
    return x if x is None or not jnp.ndim(x) else x[None, :]


def _any(allowed, axis: int):
    return allowed.astype(jnp.int32).max(axis) > 0


def _dot(a, b, precision):
    return jnp.dot(a, b, precision=dot_precision(a.dtype, precision), preferred_element_type=jnp.float32)


def _walk(columns: _Columns, b, group, i, part, parts, repeats=1):
    """The visits [first, stop) of one part of row i, each `repeats` times, and the column of a visit."""
    b, group = [np.int32(0) if n == 1 else x for n, x in zip(columns.bounds.shape[:2], (b, group), strict=True)]
    ends = [(np.int32(run), np.int32(end)) for run in range(columns.bounds.shape[3]) for end in (0, 1)]
    ends = [_load(columns.bounds, (b, group, i, *end)) for end in ends]
    bounds = list(zip(ends[::2], ends[1::2], strict=True))
    count = sum(stop - start for start, stop in bounds) * repeats

    def column(visit):
        visit, _ = _divmod(visit, repeats)
        if columns.index is not None:
            return _load(columns.index, (b, group, i, visit))
        (start, stop), *second = bounds
        j = start + visit
        return jnp.where(j < stop, j, second[0][0] + j - stop) if second else j

    return lax.div(count * part, parts), lax.div(count * (part + 1), parts), column


def _place(tile: _Tile, groups: int):
    """Batch element, group of heads, row of tiles and part of this program.

    Programs start in this order: the heads whose other operands stay in L2 together, for one row of tiles after the
    other, the longest rows first, so that the last programs to start are short; then the next such heads.
    """
    head = pl.program_id(2) * pl.num_programs(0) + pl.program_id(0)
    i = pl.program_id(1)
    i = pl.num_programs(1) - 1 - i if tile.layout.reverse else i
    return *_divmod(head, groups), i, pl.program_id(3)


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask, visits, out_ref, lse_ref=None, *, tile: _Tile):
    b, group, i, part = _place(tile, tile.groups)
    t, n, there = [_down(x) for x in tile.rows(i, group)]
    k_head, c = tile.key_head(group), tile.factor
    q = _load_heads(q_ref, b, t, n, there)

    def visit(state, columns, masked):
        if columns is None:
            return state
        first, stop, column = _walk(columns, b, tile.row_of_plan(group), i, part, pl.num_programs(3))

        def body(visited, state):
            m, l, o = state
            s, inside = tile.keys(column(visited)) if masked else (tile.keys(column(visited))[0], None)
            k = _load_heads(k_ref, b, _down(s), k_head, _down(inside))
            x, _ = tile.logits(_dot(q, k.T, tile.config.precision), bias_ref, b, n, t, _across(s))
            if masked:
                allowed = tile.allowed(mask, b, n, t, _across(s), there, _across(inside))
                x, inside = jnp.where(allowed, x, -jnp.inf), _any(allowed, 0) if tile.layout.clears else inside
            m_next = jnp.maximum(m, x.max(1))
            shift = online_softmax.finite(m_next) * c
            alpha = jnp.exp2(m * c - shift)  # both products rounded: exactly 1 where the maximum stays
            p = tile.exp2(x, -shift[:, None])
            v = _load_heads(v_ref, b, _down(s), k_head, _down(inside))
            o = online_softmax.rescale(o, alpha) + _dot(p.astype(v.dtype), v, tile.config.precision)
            return m_next, l * alpha + p.sum(1), o

        return lax.fori_loop(first, stop, body, state)

    h, inside = _head(v_ref.shape[-1])
    state = tuple(online_softmax.start((tile.tiling.block_q,), h.shape[1]))
    for columns, masked in tile.in_order(visits):
        state = visit(state, columns, masked)
    m, l, o = state
    absent = l == 0
    total = jnp.where(absent, 1, l)
    _store(out_ref, (part, b, t, n, h), o / total[:, None], _and(there, inside))
    if lse_ref is not None:
        lse = jnp.where(absent, -jnp.inf, (m * c + jnp.log2(total)) / _LOG2_E)
        _store(lse_ref, (part, b, t, n), lse[:, None], there)


def _forward(config: _Config, layout: _Layout, query, key, value, bias, mask, visits):
    tile = _Tile(config, layout, _sizes(query, key), bias is not None)
    B, T, S, N, K, _ = tile.sizes
    parts = config.splits or _default_splits(tile)
    rows = (parts, B, T, N)
    outputs = [((*rows, value.shape[3]), query.dtype if parts == 1 else jnp.float32), (rows, jnp.float32)]
    out, *lse = _call(
        functools.partial(_forward_kernel, tile=tile),
        tile,
        _grid(B * tile.groups, pl.cdiv(T, tile.tokens), parts, _bytes_per_head(key, value) * K / tile.groups),
        outputs if config.residual or parts > 1 else outputs[:1],
        (query, key, value, bias, _with_axes(mask), visits),
        "attention_forward",
    )
    while parts > 1:
        parts //= 2
        out, *lse = online_softmax.merge(out[:parts], lse[0][:parts], out[parts:], lse[0][parts:])
    return out[0].astype(query.dtype), *(x[0] for x in lse if config.residual)


def _dq_kernel(q_ref, k_ref, v_ref, bias_ref, mask, d_out_ref, lse_ref, delta_ref, visits, dq_ref, *, tile: _Tile):
    b, group, i, _ = _place(tile, tile.groups)
    t, n, there = [_down(x) for x in tile.rows(i, group)]
    k_head = tile.key_head(group)
    q, d_out = [_load_heads(ref, b, t, n, there) for ref in (q_ref, d_out_ref)]
    lse, delta = _load(lse_ref, (b, t, n), there, jnp.inf), _load(delta_ref, (b, t, n), there)

    def visit(dq, columns, masked):
        if columns is None:
            return dq
        first, stop, column = _walk(columns, b, tile.row_of_plan(group), i, 0, np.int32(1))

        def body(visited, dq):
            s, inside = tile.keys(column(visited)) if masked else (tile.keys(column(visited))[0], None)
            allowed = None
            if masked:
                allowed = tile.allowed(mask, b, n, t, _across(s), there, _across(inside))
                inside = _any(allowed, 0) if tile.layout.clears else inside
            k, v = [_load_heads(ref, b, _down(s), k_head, _down(inside)) for ref in (k_ref, v_ref)]
            product, dp = _dot(q, k.T, tile.config.precision), _dot(d_out, v.T, tile.config.precision)
            _, ds = _weights(tile, product, dp, allowed, lse, delta, bias_ref, b, n, t, _across(s))
            return dq + _dot(ds.astype(k.dtype), k, tile.config.precision)

        return lax.fori_loop(first, stop, body, dq)

    dq = jnp.zeros(q.shape)
    for columns, masked in tile.in_order(visits):
        dq = visit(dq, columns, masked)
    h, inside = _head(q_ref.shape[-1])
    _store(dq_ref, (b, t, n, h), dq * tile.config.scale, _and(there, inside))


def _dkv_kernel(
    q_ref, k_ref, v_ref, bias_ref, mask, d_out_ref, lse_ref, delta_ref, visits, dk_ref, dv_ref, *, tile: _Tile
):
    _, _, _, _, K, G = tile.sizes
    b, k_head, j, _ = _place(tile, K)
    s, inside = [_down(x) for x in tile.keys(j)]
    k, v = [_load_heads(ref, b, s, k_head, inside) for ref in (k_ref, v_ref)]
    repeats = G // tile.heads  # a group too large for one tile is visited piece by piece

    def visit(state, columns, masked):
        if columns is None:
            return state
        first, stop, column = _walk(columns, b, k_head, j, 0, np.int32(1), repeats)

        def body(visited, state):
            dk, dv = state
            rows = tile.rows(column(visited), k_head * repeats + _divmod(visited, repeats)[1])
            (t, n, there), (t_down, n_down, there_down) = [_across(x) for x in rows], [_down(x) for x in rows]
            q, d_out = [_load_heads(ref, b, t_down, n_down, there_down) for ref in (q_ref, d_out_ref)]
            lse, delta = _load(lse_ref, (b, t, n), there, jnp.inf), _load(delta_ref, (b, t, n), there)
            allowed = tile.allowed(mask, b, n, t, s, there, inside) if masked else None
            product, dp = _dot(k, q.T, tile.config.precision), _dot(v, d_out.T, tile.config.precision)
            p, ds = _weights(tile, product, dp, allowed, lse, delta, bias_ref, b, n, t, s)
            dv += _dot(p.astype(d_out.dtype), d_out, tile.config.precision)
            return dk + _dot(ds.astype(q.dtype), q, tile.config.precision), dv

        return lax.fori_loop(first, stop, body, state)

    state = jnp.zeros(k.shape), jnp.zeros(v.shape)
    for columns, masked in tile.in_order(visits):
        state = visit(state, columns, masked)
    for ref, value, scale in zip((dk_ref, dv_ref), state, (tile.config.scale, 1), strict=True):
        h, real = _head(ref.shape[-1])
        _store(ref, (b, s, k_head, h), value * scale, _and(inside, real))


def _d_bias_kernel(
    q_ref, k_ref, v_ref, bias_ref, mask, d_out_ref, lse_ref, delta_ref, codes, d_bias_ref, *, tile: _Tile
):
    """One tile of the bias' gradient, summed over the batch elements, heads and tiles that it was broadcast to."""
    B, _, _, N, _, _ = tile.sizes
    blocks = [n if size == 1 else 1 for n, size in zip((B, N, *codes.shape[2:]), d_bias_ref.shape, strict=True)]
    place = (*_divmod(pl.program_id(2), d_bias_ref.shape[1]), pl.program_id(1), pl.program_id(0))

    def body(visited, total):
        index = []
        for start, count in zip(place[::-1], blocks[::-1], strict=True):
            visited, rest = _divmod(visited, count)
            index.append(start + rest)
        j, i, n, b = index

        def add(total):
            t, _, there = [_down(x) for x in tile.rows(i, n)]
            s, inside = tile.keys(j)
            allowed = tile.allowed(mask, b, n, t, _across(s), there, _across(inside))
            read = _down(_any(allowed, 0) if tile.layout.clears else inside)
            q, d_out = [_load_heads(ref, b, t, n, there) for ref in (q_ref, d_out_ref)]
            k, v = [_load_heads(ref, b, _down(s), tile.key_head(n), read) for ref in (k_ref, v_ref)]
            lse, delta = _load(lse_ref, (b, t, n), there, jnp.inf), _load(delta_ref, (b, t, n), there)
            product, dp = _dot(q, k.T, tile.config.precision), _dot(d_out, v.T, tile.config.precision)
            p, ds = _weights(tile, product, dp, allowed, lse, delta, bias_ref, b, n, t, _across(s), through_cap=False)
            return total + ds

        code = [np.int32(0) if size == 1 else x for size, x in zip(codes.shape, (b, n, i, j), strict=True)]
        return lax.cond(_load(codes, tuple(code)) != 0, add, lambda total: total, total)

    total = jnp.zeros((tile.tiling.block_q, tile.tiling.block_k))
    total = lax.fori_loop(0, math.prod(blocks), body, total)
    t, _, there = [_down(x) for x in tile.rows(place[2], 0)]
    s, inside = [_across(x) for x in tile.keys(place[3])]
    if d_bias_ref.shape[2] == 1:
        total, t, there = total.sum(0, keepdims=True), jnp.zeros((1, 1), jnp.int32), None
    if d_bias_ref.shape[3] == 1:
        total, s, inside = total.sum(1, keepdims=True), jnp.zeros((1, 1), jnp.int32), None
    _store(d_bias_ref, (*place[:2], t, s), total, _and(there, inside))


def _weights(tile: _Tile, product, dp, allowed, lse, delta, bias_ref, b, n, t, s, through_cap=True):
    """p = exp(logits - lse) and ds = p (dp - delta), the gradient of q k before scaling, or of the bias.

    Source: Dao, FlashAttention-2 (2023), algorithm 2; `lse` is in base 2, +inf for rows that attend nothing.
    """
    x, slope = tile.logits(product, bias_ref, b, n, t, s)
    x = x if allowed is None else jnp.where(allowed, x, -jnp.inf)
    p = tile.exp2(x, -lse)
    ds = p * (dp - delta)
    ds = ds if slope is None or not through_cap else ds * slope
    return p, jnp.where(allowed, ds, 0) if allowed is not None and tile.layout.clears else ds


def _dq(config: _Config, layout: _Layout, query, key, value, bias, mask, d_out, lse, delta, visits):
    tile = _Tile(config, layout, _sizes(query, key), bias is not None)
    B, T, _, _, K, _ = tile.sizes
    return _call(
        functools.partial(_dq_kernel, tile=tile),
        tile,
        _grid(B * tile.groups, pl.cdiv(T, tile.tokens), 1, _bytes_per_head(key, value) * K / tile.groups),
        ((query.shape, query.dtype),),
        (query, key, value, bias, _with_axes(mask), d_out, lse, delta, visits),
        "attention_dq",
    )


def _dkv(config: _Config, layout: _Layout, query, key, value, bias, mask, d_out, lse, delta, visits):
    """dk and dv, each tile summed by one program in a fixed order: the same bits every time."""
    tile = _Tile(config, layout, _sizes(query, key), bias is not None)
    B, _, S, _, K, G = tile.sizes
    return _call(
        functools.partial(_dkv_kernel, tile=tile),
        tile,
        _grid(B * K, pl.cdiv(S, tile.tiling.block_k), 1, _bytes_per_head(query, d_out) * G),
        [(x.shape, x.dtype) for x in (key, value)],
        (query, key, value, bias, _with_axes(mask), d_out, lse, delta, visits),
        "attention_dkv",
    )


def _d_bias(config: _Config, layout: _Layout, query, key, value, bias, mask, d_out, lse, delta, codes):
    tile = _Tile(config, layout, _sizes(query, key), has_bias=True)
    blocks = [1 if size == 1 else count for size, count in zip(bias.shape[2:], codes.shape[2:], strict=True)]
    (d_bias,) = _call(
        functools.partial(_d_bias_kernel, tile=tile),
        tile,
        (blocks[1], blocks[0], bias.shape[0] * bias.shape[1]),
        ((bias.shape, jnp.float32),),
        (query, key, value, bias, _with_axes(mask), d_out, lse, delta, codes),
        "attention_d_bias",
    )
    return (d_bias.astype(bias.dtype),)


def _call(kernel, tile: _Tile, grid, outputs, operands, name: str):
    tiling, operands = tile.tiling, jax.tree.map(_addressable, operands)
    here = ManualAxisType()  # over which mesh axes results vary, `_abstract` says
    call = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=here) for shape, dtype in outputs],
        grid=grid,
        compiler_params=_backend().CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages),
        interpret=tile.config.interpret,
        name=f"{name}_{tiling.block_q}x{tiling.block_k}_{tiling.num_warps}w{tiling.num_stages}s_h{operands[0].shape[-1]}",
    )
    return _kernel_call.bind(*jax.tree.leaves(operands), jaxpr=jax.make_jaxpr(call)(*operands))


def _lower(context, *operands, jaxpr):
    """The backend's deprecation is told when a kernel is lowered, where no code of this library is on the stack."""
    # The interpreter's loops mix operands and zeros, which do not vary over a mesh: within the kernel nothing does.
    types = [x.update_manual_axis_type(ManualAxisType()) for x in context.avals_in]
    # The filters are the whole process': what another thread warns of, or filters, at the same time may be affected.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        lower = mlir.lower_fun(core.jaxpr_as_fun(jaxpr), multiple_results=True)
        return lower(context.replace(avals_in=types), *operands)


def _abstract(*operands, jaxpr):
    """In a user's `shard_map` the results vary over the mesh axes over which any operand does."""
    varying = frozenset().union(*(x.manual_axis_type.varying for x in operands))
    return [x.update_manual_axis_type(ManualAxisType(varying=varying)) for x in jaxpr.out_avals]


_kernel_call = core.Primitive("jaxattn_kernel_call")
_kernel_call.multiple_results = True
_kernel_call.def_impl(lambda *operands, jaxpr: core.jaxpr_as_fun(jaxpr)(*operands))
_kernel_call.def_abstract_eval(_abstract)
mlir.register_lowering(_kernel_call, _lower)


def _with_axes(mask: Mask) -> Mask:
    """Numbers become arrays [1], which `_take` reads as it reads [B]."""
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (1,)) if jnp.ndim(leaf) == 0 else jnp.asarray(leaf), mask)


def _addressable(array):
    """The same numbers in two bytes each where the backend's offsets cannot reach all of one byte each.

    It counts offsets in elements, with 32 bits and a sign in an array of up to 2**32 bytes, with 64 bits in a larger
    one. So elements of two bytes and more are always reached, and of one byte too up to 2**31 and above 2**32.
    """
    if array.dtype.itemsize > 1 or not _SHORT_OFFSETS < array.size <= 2**32:
        return array
    wide = jnp.bfloat16 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int16
    return array.astype(_WIDE_BOOL if array.dtype == bool else wide)


def _sizes(query, key) -> tuple[int, int, int, int, int, int]:
    """B, T, S, N, K, G."""
    (B, T, N, _), (_, S, K, _) = query.shape, key.shape
    return B, T, S, N, K, N // K


def _power(size: int) -> int:
    return max(pl.next_power_of_2(size), 16)


def _bytes_per_head(*arrays) -> int:
    return sum(x.shape[1] * x.shape[3] * x.dtype.itemsize for x in arrays)


def _grid(heads: int, rows: int, parts: int, bytes_per_head: float) -> tuple[int, int, int, int]:
    """The grid that `_place` reads: heads that share L2, rows of tiles, sets of such heads, parts."""
    fitting = max(_L2_SHARE_BYTES // bytes_per_head, 1)
    together = max(d for d in range(1, heads + 1) if heads % d == 0 and d <= fitting)
    return together, rows, heads // together, parts


def _heaviest_last(plan: tiles.Plan) -> bool:
    """Whether later blocks of queries visit more tiles; causal masks do, and masks with arrays are taken to."""
    if not isinstance(plan.codes, np.ndarray):
        return True
    count = (plan.partial.count + plan.full.count).sum((0, 1))
    return bool(count[len(count) // 2 :].sum() > count[: (len(count) + 1) // 2].sum())


def _default_splits(tile: _Tile) -> int:
    """Enough parts for about 256 programs, of at least 4 key tiles each, where all queries fit one tile."""
    B, T, S, _, _, _ = tile.sizes
    if tile.tokens < T:
        return 1
    wanted = min(256 // (B * tile.groups), S // (4 * tile.tiling.block_k))
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
