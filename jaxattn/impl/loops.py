"""Explicit loops: the definition of attention as a reader would write it, one score at a time.

For tiny sizes, to be read and to check the others by; every JAX transformation works on it. Heads and batch elements
know nothing of each other: what is written is one head, mapped over both, which also keeps them apart on devices.
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
    """For every query of every head: scores, scale, mask, softmax, weighted sum."""

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
        allowed = problem.mask.allows(jnp.arange(T)[:, None], jnp.arange(S)[None, :])
        allowed = jnp.broadcast_to(allowed, (B, N, T, S)).reshape(B, K, G, T, S)
        bias = jnp.zeros((), dtype) if problem.bias is None else problem.bias.astype(dtype)
        bias = jnp.broadcast_to(bias, (B, N, T, S)).reshape(B, K, G, T, S)
        # Keys that no query of their group may attend may hold NaN, and 0 * NaN is NaN: make them 0.
        used = allowed.any((2, 3)).swapaxes(1, 2)[..., None]
        key, value = jnp.where(used, key, 0), jnp.where(used, value, 0)

        def one_head(query, key, value, allowed, bias):
            """query [T, H], key [S, H], value [S, Hv], allowed and bias [T, S] -> output [T, Hv], lse [T]."""

            def one_score(t, s):
                logit = jnp.dot(query[t], key[s], precision=dot_precision(dtype))
                logit = soft_cap(logit * problem.scale, problem.soft_cap) + bias[t, s]
                return jnp.where(allowed[t, s], logit, -jnp.inf)

            def one_query(t):
                logits = for_each(S, lambda s: one_score(t, s))
                largest = jax.lax.stop_gradient(logits.max())
                largest = jnp.where(largest == -jnp.inf, 0, largest)
                weights = jnp.exp(logits - largest)
                total = weights.sum()
                absent = total == 0  # this query may attend nothing
                total = jnp.where(absent, 1, total)
                output = for_each(S, lambda s: weights[s] * value[s]).sum(axis=0) / total
                return output, jnp.where(absent, -jnp.inf, largest + jnp.log(total))

            return for_each(T, one_query)

        # G query heads read one key/value head.
        one_group = jax.vmap(one_head, in_axes=(1, None, None, 0, 0), out_axes=1)
        one_batch_element = jax.vmap(one_group, in_axes=(1, 1, 1, 0, 0), out_axes=1)
        out, lse = jax.vmap(one_batch_element)(query.reshape(B, T, K, G, -1), key, value, allowed, bias)
        return out.reshape(B, T, N, -1).astype(problem.query.dtype), lse.reshape(B, T, N)


def for_each(count: int, body):
    """[body(0), body(1), ..., body(count - 1)], stacked, one after the other."""
    return jax.lax.map(body, jnp.arange(count))
