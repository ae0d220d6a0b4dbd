"""`jax.nn.dot_product_attention` behind the same interface: "xla" and "cudnn", JAX's own implementations.

Our mask becomes what JAX takes: its is_causal, window and lengths where the mask is made of these, else a dense
array, so that cuDNN keeps its fast paths.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxattn.impl.base import Implementation, Problem, accumulator_dtype, dot_precision
from jaxattn.masks import And, Causal, Full, Lengths, Mask, Window


@dataclasses.dataclass(frozen=True)
class JaxNN(Implementation):
    """Calls `jax.nn.dot_product_attention` with one of its implementations."""

    name: ClassVar[str]

    def refusal(self, problem: Problem) -> str | None:
        if problem.soft_cap is not None:
            return "jax.nn.dot_product_attention has no soft cap"
        if problem.value.shape[-1] != problem.key.shape[-1]:
            return (
                f"jax.nn.dot_product_attention wants the value's head dim {problem.value.shape[-1]} "
                f"to be the key's {problem.key.shape[-1]}"
            )
        return None

    def attend(self, problem: Problem) -> tuple[jax.Array, jax.Array]:
        B, T, S, N, _, _ = problem.sizes
        options, rest = _split(problem.mask, B)
        mask = None
        if not isinstance(rest, Full):
            mask = rest.allows(jnp.arange(T)[:, None], jnp.arange(S)[None, :])
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], T, S))
        full = dot_precision(problem.key.dtype) is not None
        with jax.default_matmul_precision("highest") if full else contextlib.nullcontext():
            out, lse = jax.nn.dot_product_attention(
                problem.query.astype(problem.key.dtype),  # wider where a traced scale was multiplied in
                problem.key,
                problem.value,
                problem.bias,
                mask,
                scale=problem.scale,
                implementation=self.name,
                return_residual=True,
                **options,
            )
        return out, lse.astype(accumulator_dtype(out.dtype))


@dataclasses.dataclass(frozen=True)
class Xla(JaxNN):
    """implementation="xla"."""

    name: ClassVar[str] = "xla"


@dataclasses.dataclass(frozen=True)
class Cudnn(JaxNN):
    """implementation="cudnn": needs an NVIDIA GPU and float16 or bfloat16."""

    name: ClassVar[str] = "cudnn"

    def refusal(self, problem: Problem) -> str | None:
        if jax.default_backend() != "gpu":
            return f"cuDNN needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}"
        if problem.query.dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN wants bfloat16 or float16, not {problem.query.dtype}"
        options, _ = _split(problem.mask, problem.sizes[0])
        if options.get("local_window_size", (0, 0))[1] > 0 and not options["is_causal"]:
            return f"cuDNN has no window to the right without a causal mask, got {options['local_window_size']}"
        return super().refusal(problem)


def _split(mask: Mask, B: int) -> tuple[dict, Mask]:
    """What `jax.nn` can be told by arguments, and the mask that remains."""
    options: dict = {"is_causal": False}
    rest: Mask = Full()
    for part in _conjuncts(mask):
        if isinstance(part, Causal) and part.is_static and part.offset == 0:
            options["is_causal"] = True
        elif (
            isinstance(part, Window)
            and part.is_static
            and "local_window_size" not in options
            and None not in (part.left, part.right)
            and min(part.left, part.right) >= 0
        ):
            options["local_window_size"] = (part.left, part.right)
        elif isinstance(part, Lengths) and "key_value_seq_lengths" not in options:
            for name, length in (("query_seq_lengths", part.query), ("key_value_seq_lengths", part.key)):
                if length is not None:
                    options[name] = jnp.broadcast_to(jnp.asarray(length, jnp.int32), (B,))
            options.setdefault("key_value_seq_lengths", None)
        elif not isinstance(part, Full):
            rest = part if isinstance(rest, Full) else rest & part
    return options, rest


def _conjuncts(mask: Mask):
    if isinstance(mask, And):
        yield from _conjuncts(mask.a)
        yield from _conjuncts(mask.b)
    else:
        yield mask
