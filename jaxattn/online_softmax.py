"""Online softmax: the state that lets attention read its keys a tile at a time, in any order.

For each query the state holds the running maximum m, the sum l of exp(logit - m), and the accumulator o, the sum of
exp(logit - m) * value. Absent rows (no key seen yet, or none allowed) have m = -inf, l = 0, o = 0, and stay finite.

Sources: Milakov and Gimelshein, Online normalizer calculation for softmax (2018), algorithm 3 and section 3.1;
Dao et al., FlashAttention (2022), algorithm 1; Dao, FlashAttention-2 (2023), section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class State(NamedTuple):
    """m: maximum [*rows]; l: sum [*rows]; o: accumulator [*rows, H]. All float32, or float64 for float64 inputs."""

    m: jax.Array
    l: jax.Array
    o: jax.Array


def start(rows: tuple[int, ...], head_dim: int, dtype=jnp.float32, full=jnp.full) -> State:
    """The state before any key: m = -inf, l = 0, o = 0, made by full(shape, value, dtype)."""
    return State(full(rows, -jnp.inf, dtype), full(rows, 0, dtype), full((*rows, head_dim), 0, dtype))


def finite(m):
    """m where it is finite, else 0, so that exp(-inf - m) is 0 and never NaN for rows that may attend nothing."""
    return jnp.where(m == -jnp.inf, 0, m)


def rescale(accumulator, factor):
    """o * factor: what was accumulated under an old maximum, expressed under the new one."""
    return accumulator * factor[..., None]


def update(state: State, logits, values, weigh=None, unit: float = 1.0) -> State:
    """Takes in one tile of keys.

        m' = max(m, max_j logits_j)                     Milakov and Gimelshein (2018), algorithm 3, line 4
        l' = l exp(m - m') + sum_j exp(logits_j - m')   algorithm 3, line 5
        o' = o exp(m - m') + sum_j exp(logits_j - m') v_j   Dao et al. (2022), algorithm 1, line 12, not normalised

    Args:
      state: the state of rows [*rows].
      logits: [*rows, S], -inf where masked.
      values: [S, H], handed to `weigh`.
      weigh: (weights [*rows, S], values) -> [*rows, H] in the accumulator's dtype; a matrix product by default.
      unit: positive, and a normal number of the accumulator's dtype; the logits, and so m, are given in multiples of
        it. A scale that is left out of the logits goes in here, where it costs nothing: exp(unit * (logits - m)) is
        one pass over the tile either way.

    Returns:
      The new state.
    """
    weigh = weigh or (lambda weights, values: jnp.matmul(weights, values, preferred_element_type=state.o.dtype))
    m = jnp.maximum(state.m, logits.max(axis=-1))
    alpha = jnp.exp(unit * (state.m - finite(m)))
    weights = jnp.exp(unit * (logits - finite(m)[..., None]))
    l = state.l * alpha + weights.sum(axis=-1)
    return State(m, l, rescale(state.o, alpha) + weigh(weights, values))


def finish(state: State, unit: float = 1.0):
    """The output o / l and the log-sum-exp unit * m + log l; 0 and -inf for rows that saw no allowed key."""
    absent = state.l == 0
    l = jnp.where(absent, 1, state.l)
    return state.o / l[..., None], jnp.where(absent, -jnp.inf, unit * state.m + jnp.log(l))


def merge(out_a, lse_a, out_b, lse_b):
    """Joins attention over two disjoint sets of keys: the result is attention over their union, to rounding.

        lse = log(exp(lse_a) + exp(lse_b)),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Args:
      out_a, out_b: outputs [B, T, N, H] (any shape [*rows, H]).
      lse_a, lse_b: their log-sum-exps [B, T, N] ([*rows]), -inf for rows that attend nothing.

    Returns:
      (out, lse): `out` in out_a's dtype, `lse` in lse_a's. Differentiable in all four.

    Raises:
      ValueError: for shapes that do not fit.

    Source: Dao et al., Flash-Decoding (2023); Milakov and Gimelshein (2018), section 3.1.

    Example:
      >>> import jax, jaxattn
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
      >>> halves = [jaxattn.dot_product_attention(q, k[:, s], v[:, s], return_residual=True)
      ...           for s in (slice(0, 3), slice(3, 8))]
      >>> out, lse = jaxattn.merge(*halves[0], *halves[1])
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ValueError(
            f"merge needs out_a and out_b [*rows, H] with lse_a and lse_b [*rows], got "
            f"{list(out_a.shape)}, {list(lse_a.shape)} and {list(out_b.shape)}, {list(lse_b.shape)}"
        )
    m = finite(jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b)))
    weight_a, weight_b = jnp.exp(lse_a - m), jnp.exp(lse_b - m)
    total = weight_a + weight_b
    absent = total == 0
    total = jnp.where(absent, 1, total)
    dtype = weight_a.dtype
    out = (out_a.astype(dtype) * (weight_a / total)[..., None]) + (out_b.astype(dtype) * (weight_b / total)[..., None])
    return out.astype(out_a.dtype), jnp.where(absent, -jnp.inf, m + jnp.log(total))
