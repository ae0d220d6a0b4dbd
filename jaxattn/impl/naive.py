"""Dense logits: the definition as one would compute it, with a [B, N, T, S] array of scores.

Every JAX transformation works on it, higher derivatives included; the other implementations are judged by it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxattn.impl.base import Implementation, Problem, accumulator_dtype, dot_precision, soft_cap
from jaxattn.masks import Full
from jaxattn.online_softmax import finite


@dataclasses.dataclass(frozen=True)
class Naive(Implementation):
    """softmax(soft_cap(scale q k) + bias, masked) v, all at once.

    Args:
      precision: of the matrix products; None is full float32 for float32 inputs.
    """

    precision: jax.lax.PrecisionLike = None
    name: ClassVar[str] = "naive"

    def refusal(self, problem: Problem) -> str | None:
        return None

    @functools.partial(jax.jit, static_argnums=0)
    def attend(self, problem: Problem) -> tuple[jax.Array, jax.Array]:
        weights_BKGTS, lse_BTN, value_BSKH = self.weights(problem)
        out_BTKGH = jnp.einsum(
            "BKGTS,BSKH->BTKGH",
            weights_BKGTS.astype(value_BSKH.dtype),
            value_BSKH,
            precision=dot_precision(value_BSKH.dtype, self.precision),
            preferred_element_type=weights_BKGTS.dtype,
        )
        out = out_BTKGH.reshape(*problem.query.shape[:3], value_BSKH.shape[-1])
        return out.astype(problem.query.dtype), lse_BTN

    def weights(self, problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The attention weights [B, K, G, T, S], the log-sum-exp [B, T, N], and the values that may be attended."""
        B, T, S, N, K, G = problem.sizes
        key_BSKH, value_BSKH, allowed_BKGTS = problem.key, problem.value, None
        if not isinstance(problem.mask, Full):
            allowed_BKGTS = _grouped(problem.mask.allows(jnp.arange(T)[:, None], jnp.arange(S)[None, :]), K)
            # Keys that no query may attend may hold anything, NaN included: 0 * NaN must not arise.
            used_BSK = jnp.moveaxis(allowed_BKGTS.any((2, 3)), 1, 2)[..., None]
            key_BSKH, value_BSKH = jnp.where(used_BSK, key_BSKH, 0), jnp.where(used_BSK, value_BSKH, 0)

        query_BTKGH = problem.query.reshape(B, T, K, G, -1)
        logits_BKGTS = jnp.einsum(
            "BTKGH,BSKH->BKGTS",
            query_BTKGH,
            key_BSKH,
            precision=dot_precision(problem.query.dtype, self.precision),
            preferred_element_type=accumulator_dtype(problem.query.dtype),
        )
        logits_BKGTS = soft_cap(logits_BKGTS * problem.scale, problem.soft_cap)
        if problem.bias is not None:
            logits_BKGTS += _grouped(problem.bias, K).astype(logits_BKGTS.dtype)
        if allowed_BKGTS is not None:
            logits_BKGTS = jnp.where(allowed_BKGTS, logits_BKGTS, -jnp.inf)

        weights_BKGTS, lse_BKGT = softmax(logits_BKGTS)
        return weights_BKGTS, jnp.moveaxis(lse_BKGT.reshape(B, N, T), 1, 2), value_BSKH


def softmax(logits):
    """exp(x - m) / l over the last axis, and m + log l; weights 0 and -inf for rows that are -inf throughout."""
    m = finite(jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    weights = jnp.exp(logits - m)
    l = weights.sum(axis=-1, keepdims=True)
    absent = l == 0
    l = jnp.where(absent, 1, l)
    return weights / l, jnp.where(absent, -jnp.inf, m + jnp.log(l))[..., 0]


def _grouped(array, K: int):
    """[B|1, N|1, ...] (leading axes may be absent) -> [B|1, K|1, G|1, ...]: query head n belongs to key head n // G."""
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    B, N, *rest = array.shape
    return array.reshape(B, *((1, 1) if N == 1 else (K, N // K)), *rest)
