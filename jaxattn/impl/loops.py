"""Explicit loops: the definition of attention as a reader would write it, one score at a time.

For tiny sizes, to be read and to check the others by; every JAX transformation works on it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxattn.impl.base import Implementation, Problem, accumulator_dtype, dot_precision, soft_cap

MOST_SCORES = 4096


@dataclasses.dataclass(frozen=True)
class Loops(Implementation):
    """For every batch element, head and query: scores, scale, mask, softmax, weighted sum."""

    name: ClassVar[str] = "loops"

    def refusal(self, problem: Problem) -> str | None:
        B, T, S, N, _, _ = problem.sizes
        if B * N * T * S > MOST_SCORES:
            return f"B*N*T*S = {B * N * T * S} scores are more than the {MOST_SCORES} that its loops are meant for"
        return None

    def attend(self, problem: Problem) -> tuple[jax.Array, jax.Array]:
        B, T, S, N, K, G = problem.sizes
        dtype = accumulator_dtype(problem.query.dtype)
        query, key, value = (x.astype(dtype) for x in (problem.query, problem.key, problem.value))
        allowed = jnp.broadcast_to(problem.mask.allows(jnp.arange(T)[:, None], jnp.arange(S)[None, :]), (B, N, T, S))
        bias = None if problem.bias is None else jnp.broadcast_to(problem.bias.astype(dtype), (B, N, T, S))

        outputs, lses = [], []
        for b in range(B):
            for t in range(T):
                for n in range(N):
                    k = n // G  # the key/value head that query head n shares with G - 1 others
                    logits = []
                    for s in range(S):
                        logit = jnp.dot(query[b, t, n], key[b, s, k], precision=dot_precision(dtype))
                        logit = soft_cap(logit * problem.scale, problem.soft_cap)
                        if bias is not None:
                            logit += bias[b, n, t, s]
                        logits.append(jnp.where(allowed[b, n, t, s], logit, -jnp.inf))

                    largest = logits[0]
                    for logit in logits[1:]:
                        largest = jnp.maximum(largest, logit)
                    largest = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))

                    total = jnp.zeros((), dtype)
                    output = jnp.zeros(value.shape[-1], dtype)
                    for s in range(S):
                        weight = jnp.exp(logits[s] - largest)
                        total += weight
                        # A masked value may be NaN, and 0 * NaN is NaN: leave it out instead of adding 0 times it.
                        output += weight * jnp.where(allowed[b, n, t, s], value[b, s, k], 0)

                    absent = total == 0  # this query may attend nothing
                    total = jnp.where(absent, 1, total)
                    outputs.append(output / total)
                    lses.append(jnp.where(absent, -jnp.inf, largest + jnp.log(total)))

        out = jnp.stack(outputs).reshape(B, T, N, -1)
        return out.astype(problem.query.dtype), jnp.stack(lses).reshape(B, T, N)
