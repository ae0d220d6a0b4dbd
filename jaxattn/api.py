"""dot_product_attention and explain: check the arguments once, choose an implementation, run it.

Only `implementation=None` chooses. A named implementation runs or raises; nothing falls back in silence.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.impl.base import Implementation, Problem, accumulator_dtype
from jaxattn.impl.naive import Naive
from jaxattn.masks import Causal, Dense, Full, Lengths, Mask, Window

# Modules are imported when asked for: a kernel's backend may be absent.
IMPLEMENTATIONS = {
    "loops": ("jaxattn.impl.loops", "Loops"),
    "naive": ("jaxattn.impl.naive", "Naive"),
    "blockwise": ("jaxattn.impl.blockwise", "Blockwise"),
    "triton": ("jaxattn.impl.triton", "Triton"),
    "xla": ("jaxattn.impl.jax_nn", "Xla"),
    "cudnn": ("jaxattn.impl.jax_nn", "Cudnn"),
}
_CHOICE = ("triton", "blockwise")  # the order in which None tries them


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | Implementation | None = None,
    return_residual: bool = False,
):
    """Scaled dot-product attention: MHA, GQA (N a multiple of K) and MQA (K = 1); a superset of `jax.nn`'s function.

        logits = soft_cap(scale * q k^T) + bias, masked;  output = softmax(logits) v
        soft_cap(x) = cap * tanh(x / cap)

    A query that may attend nothing gives output 0, gradients 0 and log-sum-exp -inf. ("xla" and "cudnn" call `jax.nn`:
    such queries and the log-sum-exp are as they are there.)

    Args:
      query: [B, T, N, H]; the batch axis may be absent in query, key and value together.
      key: [B, S, K, H]. Query head n reads key head n // (N / K).
      value: [B, S, K, Hv]; Hv may differ from H.
      bias: added to the logits; at most 4 dimensions, that broadcast to [B, N, T, S]. -inf masks (but only a mask
        keeps NaN in keys and values from spreading).
      mask: a mask object (`Causal`, `Window`, ..., see `jaxattn.masks`), or a boolean array, True where attention
        is allowed, of at most 4 dimensions, that broadcast to [B, N, T, S].
      scale: factor of q k^T; None is 1 / sqrt(H).
      is_causal: query t sees keys s <= t (top-left, also where T != S; `mask=Causal(S - T)` is bottom-right).
      query_seq_lengths: int array [B]; queries at or after it attend nothing.
      key_value_seq_lengths: int array [B]; keys at or after it are masked.
      local_window_size: (left, right), both ends included, or one int for both sides; negative ones count too, and
        both may be traced.
      logits_soft_cap: cap, in units of the logits; None for none.
      implementation: None to choose, a name ("loops", "naive", "blockwise", "triton", "xla", "cudnn"), or an object
        that carries its tuning, such as `Blockwise(block_q=512, block_k=1024)`.
      return_residual: also return the log-sum-exp of the logits.

    Returns:
      The output [B, T, N, Hv] in the query's dtype; with `return_residual` a pair with the log-sum-exp [B, T, N],
      float32 (float64 for float64 inputs). Both are differentiable.

    Raises:
      ValueError: for arguments that do not fit, with argument, value and requirement.
      NotImplementedError: where a named implementation cannot compute this, with its reason.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.2; Ainslie et al., GQA (2023).

    Example:
      >>> import jax, jaxattn
      >>> q = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
      >>> k, v = jax.random.normal(jax.random.key(1), (2, 2, 128, 2, 64))
      >>> jaxattn.dot_product_attention(q, k, v, is_causal=True).shape
      (2, 128, 8, 64)
    """
    problem, batched = _check(
        query, key, value, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths,
        local_window_size, logits_soft_cap,
    )  # fmt: skip
    problem = dataclasses.replace(problem, residual=return_residual)
    chosen = _choose(implementation, problem)
    out, lse = _without_pairs(problem) if _has_no_pairs(problem) else chosen.attend(problem)
    out = out.astype(jnp.asarray(query).dtype)
    if not return_residual:
        return out if batched else out[0]
    return (out, lse) if batched else (out[0], lse[0])


def explain(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | Implementation | None = None,
    return_residual: bool = False,
) -> str:
    """Which implementation would run for these arguments, and why each other one would not. Nothing is computed.

    Args:
      As for `dot_product_attention`; arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
      Text, one line per implementation: `runs`, `could run`, or the reason why it cannot.

    Raises:
      ValueError: as `dot_product_attention`.

    Example:
      >>> import jax, jaxattn
      >>> x = jax.ShapeDtypeStruct((1, 8, 2, 16), "float32")
      >>> print(jaxattn.explain(x, x, x, implementation="naive").splitlines()[-1])
      naive      runs: asked for by name
    """
    lines = []

    def inspect(query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths):
        problem, _ = _check(
            query, key, value, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths,
            local_window_size, logits_soft_cap,
        )  # fmt: skip
        asked = _resolve(implementation) if implementation is not None else None
        candidates = [_resolve(name) for name in IMPLEMENTATIONS if asked is None or name != asked.name]
        candidates += [] if asked is None else [asked]
        refusals = {candidate.name: candidate.refusal(problem) for candidate in candidates}
        runs = asked.name if asked else next(name for name in _CHOICE if refusals[name] is None)
        for name, refusal in refusals.items():
            if refusal is not None:
                text = f"cannot run: {refusal}"
            elif name == runs:
                text = "runs: asked for by name" if asked else f"runs: the first of {', '.join(_CHOICE)} that can"
            else:
                text = "could run, when asked for by name"
            lines.append(f"{name:10} {text}")

    jax.eval_shape(inspect, query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths)
    return "\n".join(lines)


def attention_weights(
    query,
    key,
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
):
    """softmax(logits), the [B, N, T, S] array that the other functions avoid: for looking at, not for speed.

    A softmax temperature is `scale / temperature`.

    Args:
      As for `dot_product_attention`.

    Returns:
      Weights [B, N, T, S] ([N, T, S] without batch axis), float32 or float64. Rows sum to 1, masked entries are
      exactly 0; a row that may attend nothing is 0 throughout.

    Raises:
      ValueError: as `dot_product_attention`.

    Example:
      >>> import jax, jaxattn
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 8))
      >>> jaxattn.attention_weights(q, k, is_causal=True)[0, 0, 0]
      Array([1., 0., 0., 0.], dtype=float32)
    """
    problem, batched = _check(
        query, key, key, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths,
        local_window_size, logits_soft_cap,
    )  # fmt: skip
    B, T, S, N, _, _ = problem.sizes
    if _has_no_pairs(problem):
        weights = jnp.zeros((B, N, T, S), accumulator_dtype(problem.query.dtype))
    else:
        weights = Naive().weights(problem)[0].reshape(B, N, T, S)
    return weights if batched else weights[0]


def _choose(implementation, problem: Problem) -> Implementation:
    if implementation is None:
        return next(x for x in map(_resolve, _CHOICE) if x.refusal(problem) is None)
    chosen = _resolve(implementation)
    refusal = chosen.refusal(problem)
    if refusal is not None:
        raise NotImplementedError(f"implementation {chosen.name!r} cannot compute this: {refusal}")
    return chosen


def _has_no_pairs(problem: Problem) -> bool:
    return any(isinstance(n, int) and n == 0 for n in problem.sizes[:3])


def _without_pairs(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp where there is no (query, key) pair: no implementation need know empty axes."""
    B, T, _, N, _, _ = problem.sizes
    dtype = accumulator_dtype(problem.query.dtype)
    return jnp.zeros((B, T, N, problem.value.shape[-1]), dtype), jnp.full((B, T, N), -jnp.inf, dtype)


def _resolve(implementation: str | Implementation) -> Implementation:
    if isinstance(implementation, Implementation):
        return implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} must be None, one of {', '.join(IMPLEMENTATIONS)}, "
            f"or an implementation object such as Blockwise(block_q=512)"
        )
    module, name = IMPLEMENTATIONS[implementation]
    return getattr(importlib.import_module(module), name)()


def _check(
    query,
    key,
    value,
    bias,
    mask,
    scale,
    is_causal,
    query_seq_lengths,
    key_value_seq_lengths,
    local_window_size,
    cap,
) -> tuple[Problem, bool]:
    """The arguments as a Problem, and whether they had a batch axis."""
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    batched = query.ndim == 4
    if not {query.ndim, key.ndim, value.ndim} <= {3, 4}:
        raise ValueError(
            f"query, key and value must be [B, T, N, H], [B, S, K, H] and [B, S, K, Hv], or all without B; "
            f"got {_shape(query)}, {_shape(key)} and {_shape(value)}"
        )
    query, key, value = (x if x.ndim == 4 else x[None] for x in (query, key, value))
    if not jnp.issubdtype(query.dtype, jnp.floating) or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one floating dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    for name, array, axis, letter, size, of in (
        ("key", key, 0, "B", B, "query"),
        ("value", value, 0, "B", B, "query"),
        ("key", key, 3, "H", H, "query"),
        ("value", value, 1, "S", S, "key"),
        ("value", value, 2, "K", K, "key"),
    ):
        if array.shape[axis] != size:
            raise ValueError(f"{name} {_shape(array)} must have {letter}={size} on axis {axis}, as {of} has")
    if any(isinstance(n, int) and n < 1 for n in (N, K, H)):
        raise ValueError(f"there must be at least one head of at least one entry, got N={N}, K={K}, H={H}")
    if N % K:
        raise ValueError(f"N={N} query heads must be a multiple of K={K} key/value heads")
    if cap is not None and (isinstance(cap, jax.core.Tracer) or not cap > 0):
        raise ValueError(f"logits_soft_cap={cap} must be a positive number, or None for none; it is static")

    shape = (B, N, T, S)
    if bias is not None:
        bias = jnp.asarray(bias)
        if bias.dtype == bool or jnp.issubdtype(bias.dtype, jnp.complexfloating):
            raise ValueError(f"bias must be real numbers, got {bias.dtype}; a boolean array goes to mask")
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            bias = bias.astype(accumulator_dtype(query.dtype))
        bias = _four_dimensions("bias", bias, shape)

    parts = []
    if isinstance(mask, Mask):
        parts.append(mask)
    elif mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != bool:
            raise ValueError(f"mask must be boolean or a mask object, got {mask.dtype}; an additive mask goes to bias")
        parts.append(Dense(_four_dimensions("mask", mask, shape)))
    if is_causal:
        parts.append(Causal())
    if local_window_size is not None:
        left, right = _window(local_window_size)
        parts.append(Window(left, right))
    lengths = [
        _lengths(name, x, B)
        for name, x in (
            ("query_seq_lengths", query_seq_lengths),
            ("key_value_seq_lengths", key_value_seq_lengths),
        )
    ]
    if any(x is not None for x in lengths):
        parts.append(Lengths(*lengths))
    combined = parts[0] if parts else Full()
    for part in parts[1:]:
        combined = combined & part
    combined.check(B, N, T, S)

    scale = 1 / math.sqrt(H) if scale is None else scale
    if np.ndim(scale):
        if np.size(scale) != 1:
            raise ValueError(f"scale must be a number, got an array {_shape(scale)}")
        scale = scale.reshape(())
    if isinstance(scale, jax.core.Tracer):  # its gradient then flows through the query
        query, scale = query.astype(accumulator_dtype(query.dtype)) * scale, 1.0
    return Problem(query, key, value, bias, combined, float(scale), None if cap is None else float(cap)), batched


def _shape(array) -> str:
    return "[" + ", ".join(map(str, array.shape)) + "]"


def _four_dimensions(name: str, array, shape):
    four = (1,) * (4 - array.ndim) + array.shape
    if array.ndim > 4 or any(n not in (1, m) for n, m in zip(four, shape, strict=True)):
        wanted = ", ".join(f"{letter}={n}" for letter, n in zip("BNTS", shape, strict=True))
        raise ValueError(f"{name} {_shape(array)} must have at most 4 dimensions, that broadcast to [{wanted}]")
    return array.reshape(four)


def _lengths(name: str, lengths, B):
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != (B,):
        raise ValueError(f"{name} must be an int array of shape [B={B}], got {lengths.dtype}{_shape(lengths)}")
    return lengths


def _window(size) -> tuple:
    is_pair = isinstance(size, (tuple, list)) or np.ndim(size)
    pair = tuple(size) if is_pair else (size, size)
    if len(pair) != 2 or not all(
        isinstance(x, int) or (hasattr(x, "dtype") and x.shape == () and jnp.issubdtype(x.dtype, jnp.integer))
        for x in pair
    ):
        raise ValueError(f"local_window_size={size!r} must be an int, or a pair (left, right) of them")
    return pair
