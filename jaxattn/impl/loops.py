"""Explicit loops: the definition of attention as a reader would write it, one score at a time.

For tiny sizes, to be read and to check the others by; every JAX transformation works on it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxattn.impl.base import Implementation, Problem, accumulator_dtype, dot_precision, soft_cap

MOST_SCORES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Loops(Implementation):
    """For every batch element, query and head: scores, scale, mask, softmax, weighted sum."""

    name: ClassVar[str] = "loops"

    def refusal(self, problem: Problem) -> str | None:
        B, T, S, N, _, _ = problem.sizes
        if B * N * T * S > MOST_SCORES:
            return f"B*N*T*S = {B * N * T * S} scores are more than the {MOST_SCORES} that its loops are meant for"
        return None

    @functools.partial(jax.jit, static_argnums=0)
    def attend(self, problem: Problem) -> tuple[jax.Array, jax.Array]:
        B, T, S, N, K, G = problem.sizes
        dtype = accumulator_dtype(problem.query.dtype)
        query, key, value = (x.astype(dtype) for x in (problem.query, problem.key, problem.value))
        allowed = jnp.broadcast_to(problem.mask.allows(jnp.arange(T)[:, None], jnp.arange(S)[None, :]), (B, N, T, S))
        # Keys that no query of their group may attend may hold NaN, and 0 * NaN is NaN: make them 0.
        used = allowed.reshape(B, K, G * T, S).any(2).swapaxes(1, 2)[..., None]
        key, value = jnp.where(used, key, 0), jnp.where(used, value, 0)

        def one_score(b, t, n, s):
            k = n // G  # the key/value head that query head n shares with G - 1 others
            logit = jnp.dot(query[b, t, n], key[b, s, k], precision=dot_precision(dtype))
            logit = soft_cap(logit * problem.scale, problem.soft_cap)
            if problem.bias is not None:
                logit += jnp.broadcast_to(problem.bias, (B, N, T, S))[b, n, t, s].astype(dtype)
            return jnp.where(allowed[b, n, t, s], logit, -jnp.inf)

        def one_query(b, t, n):
            logits = for_each(S, lambda s: one_score(b, t, n, s))
            largest = jax.lax.stop_gradient(logits.max())
            largest = jnp.where(largest == -jnp.inf, 0, largest)
            weights = jnp.exp(logits - largest)
            total = weights.sum()
            absent = total == 0  # this query may attend nothing
            total = jnp.where(absent, 1, total)
            output = for_each(S, lambda s: weights[s] * value[b, s, n // G]).sum(axis=0) / total
            return output, jnp.where(absent, -jnp.inf, largest + jnp.log(total))

        out, lse = for_each(B, lambda b: for_each(T, lambda t: for_each(N, lambda n: one_query(b, t, n))))
        return out.astype(problem.query.dtype), lse


def for_each(count: int, body):
    """[body(0), body(1), ..., body(count - 1)], stacked, one after the other."""
    return jax.lax.map(body, jnp.arange(count))
