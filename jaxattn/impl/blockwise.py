"""Tiled online softmax in plain JAX: FlashAttention's algorithm as it would be read, forward and backward.

For each group of heads, an outer loop over blocks of queries and an inner loop over the blocks of keys that the tile
plan lists; the T x S scores never exist. Memory is linear in T and S, empty tiles are not visited.

Sources: Dao et al., FlashAttention (2022), algorithms 1 and 4; Dao, FlashAttention-2 (2023), section 3.1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxattn import online_softmax, tiles
from jaxattn.impl.base import Implementation, Problem, accumulator_dtype, dot_precision, soft_cap
from jaxattn.impl.partition import independent
from jaxattn.masks import FULL, PARTIAL


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
        blocks = block_q, block_k
        config = _Config(*blocks, problem.scale, problem.soft_cap, self.precision)
        return _attention(config, problem.query, problem.key, problem.value, problem.bias, problem.mask)


ROWS = 512  # query rows of a tile, over the G heads of its group
SCORES = 512 * 512  # of a tile: a megabyte in float32, which the caches of one or two cores hold
MASKING = 0.5  # what masking a score costs beside computing it
STARTING = 40_000  # what the operations of one tile cost to start, in scores


def default_blocks(mask, T: int, S: int, G: int) -> tuple[int, int]:
    """The tile sizes with the least work by a simple model, among few that fit in cache.

    work = scores in visited tiles, half as many again in PARTIAL ones, + `STARTING` for each tile: full attention
    takes large tiles, a narrow window small ones, and few queries (decoding) long ones. `python -m bench cpu --sweep`
    measures what the model says.

    Args:
      mask: what may be attended; one that holds arrays gets the sizes for full attention.
      T, S: numbers of queries and keys.
      G: query heads of a group, which share a tile.

    Returns:
      (block_q, block_k), in tokens.
    """
    block_q = min(T, max(ROWS // G, 64))
    largest = block_q, min(S, max(SCORES // (G * block_q), 512))
    best, least = largest, math.inf
    for shrink_q, shrink_k in itertools.product((1, 2, 4), (1, 2, 4)):
        block_q, block_k = (
            max(block // shrink, 1) for block, shrink in zip(largest, (shrink_q, shrink_k), strict=True)
        )
        codes = tiles.tile_codes(mask, T, S, block_q, block_k)
        if not isinstance(codes, np.ndarray):
            break
        partial, full = (int((codes == kind).sum()) for kind in (PARTIAL, FULL))
        work = G * block_q * block_k * ((1 + MASKING) * partial + full) + STARTING * (partial + full)
        if work < least:
            best, least = (block_q, block_k), work
    return best


@dataclasses.dataclass(frozen=True)
class _Config:
    block_q: int
    block_k: int
    scale: float
    soft_cap: float | None
    precision: lax.PrecisionLike


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

    None for a kind that is known to have no tiles: its loop is not even compiled.
    """
    plan = tiles.plan(mask, query.shape[1], key.shape[1], config.block_q, config.block_k, key.shape[2])
    return tuple(
        None if isinstance(x.count, np.ndarray) and not x.count.any() else (jnp.asarray(x.count), jnp.asarray(x.index))
        for x in (plan.partial, plan.full)
    )


def _axes(query, key, value, bias, mask, visits):
    del query, key, value
    axes_of_visits = tuple(None if kind is None else ("bk.", "bk..") for kind in visits)
    return ("b.n.", "b.k.", "b.k.", None if bias is None else "bn..", mask.axes(), axes_of_visits)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(config, query, key, value, bias, mask, visits):
    """out [B, T, N, Hv] and lse [B, T, N]: algorithm 1, its loops exchanged as in FlashAttention-2."""
    group = _Groups(config, query, key, value, bias, mask)

    def one_group(index):
        b, k = index // group.K, index % group.K

        def one_block(i):
            q_tile = group.query[b, k, i]

            def visit(masked):
                def body(j, state):
                    logits, _ = group.logits(q_tile, b, k, i, j)
                    v_tile = group.value[b, k, j]
                    if masked:
                        logits, v_tile = group.cut(b, k, i, j, logits, v_tile)
                    return online_softmax.update(state, logits, v_tile, group.weigh)

                return body

            state = online_softmax.start(q_tile.shape[:1], value.shape[-1], group.dtype)
            state = _visit(visits, b, k, i, visit, state)
            out, lse = online_softmax.finish(state)
            return out.astype(query.dtype), lse

        return lax.map(one_block, jnp.arange(group.blocks_q))

    out, lse = lax.map(one_group, jnp.arange(group.B * group.K))
    return group.ungroup_rows(out), group.ungroup_rows(lse)


def _backward(config, query, key, value, bias, mask, visits, out, lse, d_out, d_lse):
    """dq, dk, dv, dbias from the saved log-sum-exp: algorithm 4, with FlashAttention-2's equations.

    p = exp(logits - lse), dv = p^T dout, dp = dout v^T, delta = sum(dout * out), ds = p (dp - delta + dlse),
    dbias = ds, then through the soft cap, dq = scale ds k, dk = scale ds^T q.
    """
    group = _Groups(config, query, key, value, bias, mask)
    dtype = group.dtype
    d_lse = jnp.where(lse == -jnp.inf, 0, d_lse)  # there lse is a constant; its cotangent may well be NaN
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1) - d_lse.astype(dtype)
    # Rows that attend nothing, padded rows among them, get p = exp(logits - inf) = 0.
    lse = group.group_rows(jnp.where(lse == -jnp.inf, jnp.inf, lse), fill=jnp.inf)
    delta, d_out = group.group_rows(delta), group.group_rows(d_out)

    def one_group(d_bias, index):
        b, k = index // group.K, index % group.K

        def one_block(carry, i):
            q_tile, d_out_tile = group.query[b, k, i], d_out[b, k, i].astype(query.dtype)
            lse_tile, delta_tile = lse[b, k, i][:, None], delta[b, k, i][:, None]

            def visit(masked):
                def body(j, carry):
                    dq_tile, dk, dv, d_bias = carry
                    k_tile, v_tile = group.key[b, k, j], group.value[b, k, j]
                    logits, capped = group.logits(q_tile, b, k, i, j)
                    if masked:
                        logits, k_tile, v_tile = group.cut(b, k, i, j, logits, k_tile, v_tile)
                    p = jnp.exp(logits - lse_tile)
                    ds = p * (group.dot(d_out_tile, v_tile.T) - delta_tile)
                    d_bias = group.add_bias_tile(d_bias, b, k, i, j, ds)
                    if config.soft_cap is not None:
                        ds = jnp.where(p == 0, 0, ds * (1 - (capped / config.soft_cap) ** 2))
                    ds = ds.astype(query.dtype)
                    dq_tile += group.dot(ds, k_tile)
                    dk = _add_block(dk, j, group.dot(ds.T, q_tile))
                    dv = _add_block(dv, j, group.dot(p.astype(value.dtype).T, d_out_tile))
                    return dq_tile, dk, dv, d_bias

                return body

            carry = (jnp.zeros(q_tile.shape, dtype), *carry)
            dq_tile, *carry = _visit(visits, b, k, i, visit, carry)
            return tuple(carry), (dq_tile * config.scale).astype(query.dtype)

        zeros = [jnp.zeros((group.blocks_k, config.block_k, x.shape[-1]), dtype) for x in (key, value)]
        (dk, dv, d_bias), dq = lax.scan(one_block, (*zeros, d_bias), jnp.arange(group.blocks_q))
        return d_bias, (dq, (dk * config.scale).astype(key.dtype), dv.astype(value.dtype))

    d_bias, (dq, dk, dv) = lax.scan(one_group, group.zero_bias(), jnp.arange(group.B * group.K))
    d_bias = [] if bias is None else [d_bias[tuple(map(slice, bias.shape))].astype(bias.dtype)]
    return group.ungroup_rows(dq), group.ungroup_keys(dk), group.ungroup_keys(dv), *d_bias


def _visit(visits, b, k, i, visit, state):
    """Runs visit(masked)(j, state) over the key blocks j of query block i: PARTIAL ones first, as tiles says why."""
    for kind, masked in zip(visits, (True, False), strict=True):
        if kind is None:
            continue
        count, columns = kind
        row = (jnp.minimum(b, count.shape[0] - 1), jnp.minimum(k, count.shape[1] - 1), i)
        state = _for_each(columns[row], count[row], visit(masked), state)
    return state


def _for_each(items, count, body, state):
    return lax.fori_loop(0, count, lambda n, state: body(items[n], state), state)


def _add_block(array, j, block):
    return lax.dynamic_update_index_in_dim(array, lax.dynamic_index_in_dim(array, j, keepdims=False) + block, j, 0)


def _pad(array, axis: int, length: int, fill):
    if array.shape[axis] == length:
        return array
    widths = [(0, length - n if i == axis else 0) for i, n in enumerate(array.shape)]
    return jnp.pad(array, widths, constant_values=fill)


class _Groups:
    """The operands cut into blocks by (batch element, key/value head, block), and the arithmetic of one tile.

    The G query heads of a group are the rows of one tile, [G * block_q, H], so that one loaded key block serves all.
    """

    def __init__(self, config: _Config, query, key, value, bias, mask):
        self.config, self.mask, self.bias = config, mask, bias
        self.B, self.T, self.N, _ = query.shape
        self.S, self.K = key.shape[1:3]
        self.G = self.N // self.K
        self.blocks_q, self.blocks_k = -(-self.T // config.block_q), -(-self.S // config.block_k)
        self.dtype = accumulator_dtype(query.dtype)
        self.query = self.group_rows(query)
        self.key, self.value = self._group_keys(key), self._group_keys(value)
        self.bias = None if bias is None else self._pad_bias(bias)

    def dot(self, a, b):
        return jnp.matmul(
            a, b, precision=dot_precision(a.dtype, self.config.precision), preferred_element_type=self.dtype
        )

    def weigh(self, weights, v_tile):
        return self.dot(weights.astype(v_tile.dtype), v_tile)

    def logits(self, q_tile, b, k, i, j):
        """Logits [G * block_q, block_k] with bias, and the capped ones without."""
        capped = soft_cap(self.dot(q_tile, self.key[b, k, j].T) * self.config.scale, self.config.soft_cap)
        if self.bias is None:
            return capped, capped
        tile = lax.dynamic_slice(self.bias, self._bias_start(b, k, i, j), self._bias_tile_shape())[0]
        tile = jnp.broadcast_to(tile.astype(self.dtype), (self.G, self.config.block_q, self.config.block_k))
        return capped + tile.reshape(capped.shape), capped

    def cut(self, b, k, i, j, logits, *key_tiles):
        """Masks the logits, and clears the keys that no row of the tile may attend: they may hold NaN."""
        block_q, block_k = self.config.block_q, self.config.block_k
        t = i * block_q + jnp.arange(block_q)[:, None]
        s = j * block_k + jnp.arange(block_k)[None, :]
        allowed = self.mask.allows(t, s, functools.partial(self._take, b, k)) & (s < self.S) & (t < self.T)
        allowed = jnp.broadcast_to(allowed, (self.G, block_q, block_k)).reshape(logits.shape)
        used = allowed.any(0)[:, None]
        return jnp.where(allowed, logits, -jnp.inf), *(jnp.where(used, x, 0) for x in key_tiles)

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

    def group_rows(self, array, fill=0):
        """[B, T, N, ...] -> [B, K, blocks, G * block_q, ...]."""
        rest = array.shape[3:]
        array = _pad(array, 1, self.blocks_q * self.config.block_q, fill)
        array = array.reshape(self.B, self.blocks_q, self.config.block_q, self.K, self.G, *rest)
        array = array.transpose(0, 3, 1, 4, 2, *range(5, array.ndim))
        return array.reshape(self.B, self.K, self.blocks_q, self.G * self.config.block_q, *rest)

    def ungroup_rows(self, array):
        """[B * K, blocks, G * block_q, ...] -> [B, T, N, ...]."""
        rest = array.shape[3:]
        array = array.reshape(self.B, self.K, self.blocks_q, self.G, self.config.block_q, *rest)
        array = array.transpose(0, 2, 4, 1, 3, *range(5, array.ndim))
        return array.reshape(self.B, -1, self.N, *rest)[:, : self.T]

    def _group_keys(self, array):
        """[B, S, K, H] -> [B, K, blocks, block_k, H]."""
        array = _pad(array, 1, self.blocks_k * self.config.block_k, 0)
        return array.reshape(self.B, self.blocks_k, self.config.block_k, self.K, -1).transpose(0, 3, 1, 2, 4)

    def ungroup_keys(self, array):
        """[B * K, blocks, block_k, H] -> [B, S, K, H]."""
        array = array.reshape(self.B, self.K, self.blocks_k * self.config.block_k, -1)
        return array.transpose(0, 2, 1, 3)[:, : self.S]

    def _pad_bias(self, bias):
        for axis, length, blocks, block in (
            (2, self.T, self.blocks_q, self.config.block_q),
            (3, self.S, self.blocks_k, self.config.block_k),
        ):
            if bias.shape[axis] == length and length > 1:
                bias = _pad(bias, axis, blocks * block, 0)
        return bias

    def _bias_tile_shape(self):
        most = (1, self.G, self.config.block_q, self.config.block_k)
        return tuple(1 if n == 1 else m for n, m in zip(self.bias.shape, most, strict=True))

    def _bias_start(self, b, k, i, j):
        start = (b, k * self.G, i * self.config.block_q, j * self.config.block_k)
        start = [0 if n == 1 else x for n, x in zip(self.bias.shape, start, strict=True)]
        return [jnp.asarray(x, jnp.int32) for x in start]  # one type for all, also where x64 makes some int64

    def zero_bias(self):
        return None if self.bias is None else jnp.zeros(self.bias.shape, self.dtype)

    def add_bias_tile(self, d_bias, b, k, i, j, ds):
        if d_bias is None:
            return None
        shape, start = self._bias_tile_shape(), self._bias_start(b, k, i, j)
        ds = ds.reshape(1, self.G, self.config.block_q, self.config.block_k)
        ds = ds.sum([axis for axis in range(4) if shape[axis] == 1], keepdims=True)
        return lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, start, shape) + ds, start)
