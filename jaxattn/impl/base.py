"""What every implementation receives and must provide.

Arguments are checked and completed once, in `api`; an implementation sees only this one form of the problem.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxattn.masks import Mask


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query", "key", "value", "bias", "mask"],
    meta_fields=["scale", "soft_cap", "residual"],
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention call, complete: logits = soft_cap(scale q k) + bias, then the mask.

    Attributes:
      query: [B, T, N, H]. key: [B, S, K, H]. value: [B, S, K, Hv], of one dtype.
      bias: None or [B|1, N|1, T|1, S|1].
      mask: what may be attended, causal, window and lengths included.
      scale: float. A traced one is already in the query, which then has the accumulator's dtype.
      soft_cap: None or float.
      residual: whether the log-sum-exp is wanted. Where not, an implementation may return None for it.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    mask: Mask
    scale: float
    soft_cap: float | None
    residual: bool = True

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, T, S, N, K, G."""
        B, T, N, _ = self.query.shape
        S, K = self.key.shape[1:3]
        return B, T, S, N, K, N // K


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to compute attention, with its tuning. Subclasses are frozen dataclasses and hash by value."""

    name: ClassVar[str]

    def refusal(self, problem: Problem) -> str | None:
        """Why this implementation cannot compute the problem here, or None where it can."""
        raise NotImplementedError

    def attend(self, problem: Problem) -> tuple[jax.Array, jax.Array | None]:
        """The output [B, T, N, Hv] in the query's dtype and the log-sum-exp [B, T, N] in `accumulator_dtype`."""
        raise NotImplementedError


def accumulator_dtype(dtype) -> jnp.dtype:
    """float64 for float64 inputs, else float32: logits, softmax and accumulators."""
    return jnp.promote_types(dtype, jnp.float32)


def dot_precision(dtype, precision: jax.lax.PrecisionLike = None) -> jax.lax.PrecisionLike:
    """Full float32 for float32 inputs, where XLA's default on a GPU would be TF32, unless asked otherwise."""
    if precision is None and jnp.dtype(dtype).itemsize >= 4:
        return jax.lax.Precision.HIGHEST
    return precision


def soft_cap(logits, cap: float | None):
    """cap * tanh(logits / cap), or the logits where there is no cap (Gemma 2, 2024, section 2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
