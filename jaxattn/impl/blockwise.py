"""Tiled online softmax in plain JAX: FlashAttention's algorithm as it would be read, forward and backward.

For each group of heads, an outer loop over blocks of queries and an inner loop over the blocks of keys that the tile
plan lists; the T x S scores never exist. Memory is linear in T and S, empty tiles are not visited.

Sources: Dao et al., FlashAttention (2022), algorithms 1 and 4; Dao, FlashAttention-2 (2023), section 3.1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxattn import online_softmax, tiles
from jaxattn.impl.base import Implementation, Problem, accumulator_dtype, dot_precision, soft_cap
from jaxattn.impl.partition import independent, varying_alike
from jaxattn.masks import FULL, PARTIAL, And, Causal, Mask


@dataclasses.dataclass(frozen=True)
class Blockwise(Implementation):
    """Online softmax over tiles of block_q x block_k.

    Args:
      block_q, block_k: tile sizes in tokens; None takes `default_blocks`.
      precision: of the matrix products; None is full float32 for float32 inputs.
    """

    block_q: int | None = None
    block_k: int | None = None
    precision: lax.PrecisionLike = None
    name: ClassVar[str] = "blockwise"

    def __post_init__(self):
        for field in ("block_q", "block_k"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Blockwise {field}={value!r} must be a positive int or None")

    def refusal(self, problem: Problem) -> str | None:
        return None

    @functools.partial(jax.jit, static_argnums=0)
    def attend(self, problem: Problem) -> tuple[jax.Array, jax.Array]:
        _, T, S, _, _, G = problem.sizes
        block_q, block_k = self.block_q, self.block_k
        if block_q is None or block_k is None:
            chosen_q, chosen_k = default_blocks(problem.mask, T, S, G)
            block_q, block_k = block_q or chosen_q, block_k or chosen_k
        config = _Config(
            block_q=min(block_q, T),
            block_k=min(block_k, S),
            scale=problem.scale,
            soft_cap=problem.soft_cap,
            precision=self.precision,
            unread_keys=not tiles.reads_every_key(problem.mask, T, S),
        )
        return _attention(config, *varying_alike(problem.query, problem.key, problem.value, problem.bias, problem.mask))


ROWS = (2048, 1024, 512, 256, 128)  # query rows of a tile, over the G heads of its group; the first of equals is taken
KEYS = 128, 8192  # of a tile, at least and at most
SCORES = 2**20  # of a tile at most: four megabytes in float32, of which each core works on its share
CORES = 2  # among which XLA shares a tile, where the constants below were measured
SHARING = 50_000  # what sharing a tile costs, in scores; small ones stay on one core
STARTING = 10_000  # what the operations of a tile cost to start, in scores
MASKING = 0.15  # what masking a score costs beside computing it


def default_blocks(mask, T: int, S: int, G: int) -> tuple[int, int]:
    """The tile sizes with the least work by a simple model.

    work of a tile = the smaller of scores + `SHARING` and `CORES` * scores, + `MASKING` * scores if PARTIAL,
    + `STARTING`. Full attention takes large tiles, a narrow window small ones, a causal mask those between, for it
    computes half of the tiles on its diagonal in vain; few queries (decoding) take long ones. Head dim and dtype are
    not in it: they change what a score costs, and the best sizes hardly. `python -m bench cpu --sweep` measures what
    the model says, for several of them, forward and backward.

    Args:
      mask: what may be attended. Of a conjunction the parts without arrays count; where there are none, the sizes are
        those of a causal mask that ends with the keys.
      T, S: numbers of queries and keys.
      G: query heads of a group, which share a tile.

    Returns:
      (block_q, block_k), in tokens.
    """
    static = _without_arrays(mask)
    mask = Causal(S - T) if static is None else static
    best, least = None, math.inf
    for rows in ROWS:
        block_q = max(min(T, rows // G), 1)
        most = min(KEYS[1], max(SCORES // (G * block_q), KEYS[0]))
        for block_k in {min(S, most >> shrink): None for shrink in range((most // KEYS[0]).bit_length())}:
            codes = tiles.tile_codes(mask, T, S, block_q, block_k)
            partial, full = (int((codes == kind).sum()) for kind in (PARTIAL, FULL))
            scores = G * block_q * block_k
            tile = min(scores + SHARING, CORES * scores) + STARTING
            work = (partial + full) * tile + partial * MASKING * scores
            if work < least:
                best, least = (block_q, block_k), work
    return best


def _without_arrays(mask: Mask) -> Mask | None:
    """The mask, or a wider one: a conjunction without its parts that hold arrays. None where nothing is left."""
    if not jax.tree.leaves(mask):
        return mask
    if isinstance(mask, And):
        parts = [part for part in map(_without_arrays, (mask.a, mask.b)) if part is not None]
        return functools.reduce(And, parts) if parts else None
    return None


@dataclasses.dataclass(frozen=True)
class _Config:
    block_q: int
    block_k: int
    scale: float
    soft_cap: float | None
    precision: lax.PrecisionLike
    unread_keys: bool  # some keys may be attended by no query: they may hold NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, query, key, value, bias, mask):
    return _attention_fwd(config, query, key, value, bias, mask)[0]


def _attention_fwd(config, query, key, value, bias, mask):
    arrays = (query, key, value, bias, mask, _visits(config, query, key, mask))
    out, lse = independent(functools.partial(_forward, config), _axes(*arrays), ("b.n.", "b.n"))(*arrays)
    # Named where they are residuals, so that a policy that saves them need not run the forward pass again.
    out, lse = checkpoint_name((out, lse), "context")
    return (out, lse), (query, key, value, bias, mask, out, lse)


def _attention_bwd(config, residuals, cotangents):
    query, key, value, bias, mask, out, lse = residuals
    arrays = (query, key, value, bias, mask, _visits(config, query, key, mask))
    axes_in = (*_axes(*arrays), "b.n.", "b.n", "b.n.", "b.n")
    axes_out, summed = ["b.n.", "b.k.", "b.k."], ["", "", ""]
    if bias is not None:  # shards add up where one bias serves many batch elements or heads
        axes_out.append("bn..")
        summed.append("".join(letter for letter, n in zip("bn", bias.shape, strict=False) if n == 1))
    backward = independent(functools.partial(_backward, config), axes_in, axes_out, summed)
    dq, dk, dv, *d_bias = backward(*arrays, out, lse, *cotangents)
    return dq, dk, dv, *(d_bias or [None]), None  # a mask has no gradient


def _visits(config, query, key, mask):
    """(counts, columns) of the PARTIAL and of the FULL key blocks of each query block: as operands, for sharding.

    None for a kind that is known to have no tiles: its loop is not even compiled. Lists have one column more than is
    read: of a list of one, XLA would compute the tile before the loop, also where the loop has nothing to do.
    """
    plan = tiles.plan(mask, query.shape[1], key.shape[1], config.block_q, config.block_k, key.shape[2])
    return tuple(
        None
        if isinstance(x.count, np.ndarray) and not x.count.any()
        else (jnp.asarray(x.count), jnp.concatenate([x.index, x.index[..., -1:]], axis=-1))
        for x in (plan.partial, plan.full)
    )


def _axes(query, key, value, bias, mask, visits):
    del query, key, value
    axes_of_visits = tuple(None if kind is None else ("bk.", "bk..") for kind in visits)
    return ("b.n.", "b.k.", "b.k.", None if bias is None else "bn..", mask.axes(), axes_of_visits)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(config, query, key, value, bias, mask, visits):
    """out [B, T, N, Hv] and lse [B, T, N]: algorithm 1, its loops exchanged as in FlashAttention-2."""
    group = _Groups(config, query, key, bias, mask)

    def one_group(n, results):
        b, k = jnp.unravel_index(n, (group.B, group.K))
        k_tiles, v_tiles = group.tiles(key, b, k), group.tiles(value, b, k)

        def one_block(i, results):
            q_tile = group.rows(query, b, k, i)

            def visit(masked):
                def body(j, state):
                    logits, _ = group.logits(q_tile, k_tiles(j), b, k, i, j)  # algorithm 1, line 9
                    v_tile = v_tiles(j)
                    if masked:
                        logits, v_tile = group.cut(b, k, i, j, logits, v_tile)
                    return online_softmax.update(state, logits, v_tile, group.weigh, group.unit)  # lines 10 to 13

                return body

            state = online_softmax.start(q_tile.shape[:1], value.shape[-1], group.dtype, group.full)
            state = _visit(visits, b, k, i, visit, state)
            finished = online_softmax.finish(state, group.unit)
            return tuple(group.put_rows(x, b, k, i, tile) for x, tile in zip(results, finished, strict=True))

        return lax.fori_loop(0, group.blocks_q, one_block, results)

    out = group.full((*query.shape[:3], value.shape[-1]), 0, query.dtype)
    lse = group.full(query.shape[:3], 0, group.dtype)
    return lax.fori_loop(0, group.B * group.K, one_group, (out, lse))


def _backward(config, query, key, value, bias, mask, visits, out, lse, d_out, d_lse):
    """dq, dk, dv, dbias from the saved log-sum-exp: algorithm 4, with FlashAttention-2's equations.

    p = exp(logits - lse), dv = p^T dout, dp = dout v^T, delta = sum(dout * out), ds = p (dp - delta + dlse),
    dbias = ds, then through the soft cap, dq = scale ds k, dk = scale ds^T q.
    """
    group = _Groups(config, query, key, bias, mask)
    dtype = group.dtype
    d_lse = jnp.where(lse == -jnp.inf, 0, d_lse)  # there lse is a constant; its cotangent may well be NaN
    d_out = jnp.where((lse == -jnp.inf)[..., None], 0, d_out)  # and so is out
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1) - d_lse.astype(dtype)
    d_out = d_out.astype(query.dtype)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # rows that attend nothing get p = exp(logits - inf) = 0

    def one_group(n, gradients):
        b, k = jnp.unravel_index(n, (group.B, group.K))
        k_tiles, v_tiles = group.tiles(key, b, k), group.tiles(value, b, k)

        def one_block(i, gradients):
            dq, dk, dv, d_bias = gradients
            q_tile, d_out_tile = group.rows(query, b, k, i), group.rows(d_out, b, k, i)
            # Laid out anew, or XLA multiplies with a transposed left side, which is slow and for bfloat16 not there.
            q_tile_t, d_out_tile_t = lax.optimization_barrier((q_tile.T, d_out_tile.T))
            own = group.own_rows(i)  # p = 0 in the others, too
            lse_tile = jnp.where(own, group.rows(lse, b, k, i), jnp.inf)[:, None]
            delta_tile = group.rows(delta, b, k, i)[:, None]

            def visit(masked):
                def body(j, carry):
                    dq_tile, dk, dv, d_bias = carry
                    k_tile, v_tile = k_tiles(j), v_tiles(j)
                    logits, capped = group.logits(q_tile, k_tile, b, k, i, j)
                    if masked:
                        logits, k_tile, v_tile = group.cut(b, k, i, j, logits, k_tile, v_tile)
                    p = jnp.exp(group.unit * logits - lse_tile)  # algorithm 4, line 13
                    ds = p * (group.dot(d_out_tile, v_tile.T) - delta_tile)  # lines 17 and 20
                    d_bias = group.add_bias_tile(d_bias, b, k, i, j, ds)
                    if config.soft_cap is not None:
                        ds = jnp.where(p == 0, 0, ds * (1 - (capped / config.soft_cap) ** 2))
                    ds = ds.astype(query.dtype)
                    dq_tile += group.dot(ds, k_tile)  # line 21
                    dk = group.add_keys(dk, j, group.dot(q_tile_t, ds))  # line 22
                    dv = group.add_keys(dv, j, group.dot(d_out_tile_t, p.astype(value.dtype)))  # line 16
                    return dq_tile, dk, dv, d_bias

                return body

            carry = (group.full(q_tile.shape, 0, dtype), dk, dv, d_bias)
            dq_tile, dk, dv, d_bias = _visit(visits, b, k, i, visit, carry)
            return group.put_rows(dq, b, k, i, dq_tile * config.scale), dk, dv, d_bias

        dq, dk, dv, d_bias = gradients
        # Transposed, [H, S]: a CPU multiplies half as fast where the left side, here ds or p, is.
        sums = [group.full((x.shape[-1], group.S), 0, dtype) for x in (key, value)]
        dq, dk_group, dv_group, d_bias = lax.fori_loop(0, group.blocks_q, one_block, (dq, *sums, d_bias))
        dk, dv = group.put_group(dk, b, k, dk_group.T * config.scale), group.put_group(dv, b, k, dv_group.T)
        return dq, dk, dv, d_bias

    zeros = [group.full(x.shape, 0, x.dtype) for x in (query, key, value)] + [group.zero_bias()]
    dq, dk, dv, d_bias = lax.fori_loop(0, group.B * group.K, one_group, tuple(zeros))
    return dq, dk, dv, *([] if bias is None else [d_bias.astype(bias.dtype)])


def _visit(visits, b, k, i, visit, state):
    """Runs visit(masked)(j, state) over the key blocks j of query block i: PARTIAL ones first, as tiles says why."""
    for kind, masked in zip(visits, (True, False), strict=True):
        if kind is None:
            continue
        count, columns = kind
        row = (jnp.minimum(b, count.shape[0] - 1), jnp.minimum(k, count.shape[1] - 1), i)
        body, items = visit(masked), columns[row]
        state = lax.fori_loop(0, count[row], lambda n, state, body=body, items=items: body(items[n], state), state)
    return state


def _indices(*start):
    """The start of a slice, in one type, also where x64 makes some of them int64."""
    return [jnp.asarray(x, jnp.int32) for x in start]


class _Groups:
    """The tiles of (batch element, key/value head, block), cut out of the operands as they are, and their arithmetic.

    The G query heads of a group are rows of one tile, [block_q * G, H], so that one loaded key block serves all. The
    last block of rows or of keys is moved back to end where the operand ends: it then holds some of the block before,
    which are not its own. Such keys are cut, such rows are not written.
    """

    def __init__(self, config: _Config, query, key, bias, mask):
        self.config, self.mask, self.bias = config, mask, bias
        self.B, self.T, self.N, _ = query.shape
        self.S, self.K = key.shape[1:3]
        self.G = self.N // self.K
        self.blocks_q, self.blocks_k = -(-self.T // config.block_q), -(-self.S // config.block_k)
        self.dtype = accumulator_dtype(query.dtype)
        # Where nothing but the scale comes between the products and the exponential, it is left to the exponential.
        plain = bias is None and config.soft_cap is None and config.scale >= jnp.finfo(self.dtype).tiny
        self.unit = config.scale if plain else 1.0
        self._full_like = functools.partial(lax.full_like, query)

    def full(self, shape, value, dtype):
        """`jnp.full` for the start of a loop: in a user's `shard_map` it varies over devices as the operands do."""
        return self._full_like(value, dtype, shape)

    def start_q(self, i):
        return jnp.minimum(i * self.config.block_q, self.T - self.config.block_q)

    def start_k(self, j):
        return jnp.minimum(j * self.config.block_k, self.S - self.config.block_k)

    def rows(self, array, b, k, i):
        """The tile [block_q * G, ...] of [B, T, N, ...]."""
        return self._slice_rows(array, b, k, i).reshape(-1, *array.shape[3:])

    def put_rows(self, array, b, k, i, tile):
        """[B, T, N, ...] with the tile's own rows in their place."""
        old = self._slice_rows(array, b, k, i)
        tile = tile.reshape(old.shape).astype(array.dtype)
        if self.T % self.config.block_q:
            own = self.own_rows(i).reshape(1, -1, self.G, *(1,) * (array.ndim - 3))
            tile = jnp.where(own, tile, old)
        return lax.dynamic_update_slice(array, tile, self._rows_start(array, b, k, i))

    def own_rows(self, i):
        """bool [block_q * G]: not of the block before."""
        own = self.start_q(i) + jnp.arange(self.config.block_q) >= i * self.config.block_q
        return jnp.repeat(own, self.G)

    def _slice_rows(self, array, b, k, i):
        sizes = (1, self.config.block_q, self.G, *array.shape[3:])
        return lax.dynamic_slice(array, self._rows_start(array, b, k, i), sizes)

    def _rows_start(self, array, b, k, i):
        return _indices(b, self.start_q(i), k * self.G, *[0] * (array.ndim - 3))

    def tiles(self, array, b, k):
        """j -> the tile [block_k, H] of [B, S, K, H]; from one copy of the group's if many blocks of rows read it."""
        start, sizes = (b, k), (1, self.S, 1, array.shape[3])
        if self.blocks_q > 1:
            array, start = lax.dynamic_slice(array, _indices(b, 0, k, 0), sizes), (0, 0)
        sizes = (1, self.config.block_k, *sizes[2:])
        return lambda j: lax.dynamic_slice(array, _indices(start[0], self.start_k(j), start[1], 0), sizes)[0, :, 0]

    def add_keys(self, array, j, tile):
        """[H, S] with the tile [H, block_k] added."""
        start = _indices(0, self.start_k(j))
        return lax.dynamic_update_slice(array, lax.dynamic_slice(array, start, tile.shape) + tile, start)

    def put_group(self, array, b, k, keys):
        """[B, S, K, H] with [S, H] in its place."""
        return lax.dynamic_update_slice(array, keys[None, :, None].astype(array.dtype), _indices(b, 0, k, 0))

    def dot(self, a, b):
        return jnp.matmul(
            a, b, precision=dot_precision(a.dtype, self.config.precision), preferred_element_type=self.dtype
        )

    def weigh(self, weights, v_tile):
        return self.dot(weights.astype(v_tile.dtype), v_tile)

    def logits(self, q_tile, k_tile, b, k, i, j):
        """Logits [block_q * G, block_k] with bias, in multiples of `unit`, and the capped ones without."""
        products = self.dot(q_tile, k_tile.T)
        if self.unit != 1:
            return products, products
        capped = soft_cap(products * self.config.scale, self.config.soft_cap)
        if self.bias is None:
            return capped, capped
        tile = lax.dynamic_slice(self.bias, self._bias_start(b, k, i, j), self._bias_tile_shape())[0]
        return capped + self._to_rows(tile.astype(self.dtype)), capped

    def cut(self, b, k, i, j, logits, *key_tiles):
        """Masks the logits; where there may be unread keys, clears those that no row of the tile may attend."""
        t = self.start_q(i) + jnp.arange(self.config.block_q)[:, None]
        s = self.start_k(j) + jnp.arange(self.config.block_k)[None, :]
        allowed = self.mask.allows(t, s, functools.partial(self._take, b, k))
        if self.S % self.config.block_k:
            allowed &= s >= j * self.config.block_k
        heads = allowed.shape[-3] if allowed.ndim == 3 else 1  # they may be masked alike
        allowed = jnp.broadcast_to(allowed, (heads, self.config.block_q, self.config.block_k))
        if self.config.unread_keys:
            used = allowed.any((0, 1))[:, None]
            key_tiles = [jnp.where(used, x, 0) for x in key_tiles]
        return jnp.where(self._to_rows(allowed), logits, -jnp.inf), *key_tiles

    def _to_rows(self, tile):
        """[G|1, block_q|1, block_k|1] -> [block_q * G, block_k]: query for query, head for head."""
        tile = jnp.broadcast_to(tile, (self.G, self.config.block_q, self.config.block_k))
        return tile.swapaxes(0, 1).reshape(-1, self.config.block_k)

    def _take(self, b, k, array, t=None, s=None):
        """`masks.gather` for one batch element and one group: lead axes [B], [B, N] become (), [G]."""
        array = jnp.asarray(array)
        indices = [x.ravel() for x in (t, s) if x is not None]
        lead = array.ndim - len(indices)
        if lead == 2:  # with the first index, for a copy of all that one batch element has would be T x S
            heads = k * self.G + jnp.arange(self.G) if array.shape[1] > 1 else jnp.zeros(1, int)
            array = array.at[b, heads[:, None], indices[0]].get(mode="clip")
            indices = indices[1:]
        elif lead == 1:
            array = array[jnp.minimum(b, array.shape[0] - 1)]
        for axis, index in zip(range(-len(indices), 0), indices, strict=True):
            array = jnp.take(array, index, axis=axis, mode="clip")
        if t is not None and s is None:
            array = array[..., :, None]
        return array

    def _bias_tile_shape(self):
        most = (1, self.G, self.config.block_q, self.config.block_k)
        return tuple(1 if n == 1 else m for n, m in zip(self.bias.shape, most, strict=True))

    def _bias_start(self, b, k, i, j):
        start = (b, k * self.G, self.start_q(i), self.start_k(j))
        return _indices(*(0 if n == 1 else x for n, x in zip(self.bias.shape, start, strict=True)))

    def zero_bias(self):
        return None if self.bias is None else self.full(self.bias.shape, 0, self.dtype)

    def add_bias_tile(self, d_bias, b, k, i, j, ds):
        if d_bias is None:
            return None
        shape, start = self._bias_tile_shape(), self._bias_start(b, k, i, j)
        ds = ds.reshape(1, self.config.block_q, self.G, self.config.block_k).swapaxes(1, 2)
        ds = ds.sum([axis for axis in range(4) if shape[axis] == 1], keepdims=True)
        return lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, start, shape) + ds, start)
