"""Linear attention: a kernel of features in place of the softmax, so that time and memory are linear in length.

With features phi the weights phi(q)^T phi(k) factorise, and all that the past says to the future is one matrix: the
state sum_s phi(k_s) v_s^T with its normaliser sum_s phi(k_s). Three forms compute the same: parallel (the
definition), recurrent (one token a step, for decoding), chunked (parallel inside a chunk, recurrent between chunks).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FORMS = ("parallel", "chunked", "recurrent")


@dataclasses.dataclass(frozen=True)
class EluPlusOne:
    """phi(x) = elu(x) + 1.

    Source: Katharopoulos et al., Transformers are RNNs (2020), equation 7.
    """

    def __call__(self, x, positions, is_query: bool):
        """Features [..., H] of x [..., H]."""
        del positions, is_query
        return jax.nn.elu(x) + 1


@dataclasses.dataclass(frozen=True)
class Cosine:
    """phi(x) at position t = [relu(x) cos(pi t / 2 M), relu(x) sin(pi t / 2 M)], M the longest length.

    The product phi(q_t) . phi(k_s) = relu(q) . relu(k) cos(pi (t - s) / 2 M) favours near tokens.

    Args:
      max_length: M; positions must be below it, those of later decoding steps too.

    Raises:
      ValueError: when called with more tokens than max_length, or with a position that is not below it. Traced
        positions (those under jit) cannot be checked: there, keeping below max_length is the caller's part.

    Source: Qin et al., cosFormer (2022), equations 9 and 10.
    """

    max_length: int

    def __call__(self, x, positions, is_query: bool):
        """Features [..., T, 2 H] of x [..., T, H] at positions [T]."""
        del is_query
        if x.shape[-2] > self.max_length:
            raise ValueError(f"max_length={self.max_length} must be at least the {x.shape[-2]} tokens")
        if x.shape[-2] and not isinstance(positions, jax.core.Tracer) and positions.max() >= self.max_length:
            raise ValueError(f"max_length={self.max_length} must be above the last position, {positions.max()}")
        angle = (jnp.pi / 2) * positions.astype(x.dtype)[:, None] / self.max_length
        x = jax.nn.relu(x)
        return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["projection"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PositiveRandomFeatures:
    """phi(x) = exp(w_i . x - |x|^2 / 2) / sqrt(F), i = 1..F: an unbiased estimate of exp(q . k), always positive.

    The error falls as 1 / sqrt(F). Queries are stabilised by their own largest exponent, which cancels; keys are
    not, so that a state can grow: their exponents must stay below float32's 88.

    Args:
      projection: w, [F, H]; see `orthogonal`.

    Source: Choromanski et al., Rethinking Attention with Performers (2021), lemma 1 and section 2.4.
    """

    projection: Any

    @classmethod
    def orthogonal(cls, key, num_features: int, head_dim: int) -> PositiveRandomFeatures:
        """Rows drawn in orthogonal blocks of head_dim, with the norms of Gaussian vectors (section 2.4)."""
        blocks = -(-num_features // head_dim)
        key_direction, key_norm = jax.random.split(key)
        directions, r = jnp.linalg.qr(jax.random.normal(key_direction, (blocks, head_dim, head_dim)))
        # QR fixes a sign in each column; with R's diagonal made positive the directions are uniform (Mezzadri, 2007).
        directions *= jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
        rows = directions.swapaxes(-1, -2).reshape(-1, head_dim)[:num_features]
        norms = jnp.linalg.norm(jax.random.normal(key_norm, (num_features, head_dim)), axis=-1, keepdims=True)
        return cls(rows * norms)

    def __call__(self, x, positions, is_query: bool):
        """Features [..., F] of x [..., H], which already carries the square root of the logits' scale."""
        del positions
        exponent = jnp.einsum("...h,fh->...f", x, self.projection.astype(x.dtype)) - (x * x).sum(-1, keepdims=True) / 2
        if is_query:
            exponent -= lax.stop_gradient(exponent.max(-1, keepdims=True))
        return jnp.exp(exponent) / self.projection.shape[0] ** 0.5


class State(NamedTuple):
    """What the past says: sums over the keys so far, in float32.

    Attributes:
      values: sum of phi(k) v^T, [B, K, F, Hv].
      normaliser: sum of phi(k), [B, K, F].
      length: tokens so far, int32 scalar.
    """

    values: jax.Array
    normaliser: jax.Array
    length: jax.Array


def initial_state(batch: int, num_kv_heads: int, num_features: int, value_dim: int, dtype=jnp.float32) -> State:
    """The state before any token: zeros."""
    shape = (batch, num_kv_heads, num_features)
    return State(jnp.zeros((*shape, value_dim), dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def linear_attention(
    query,
    key,
    value,
    *,
    feature_map,
    is_causal: bool = False,
    form: str = "chunked",
    chunk: int = 128,
    scale: float | None = None,
    state: State | None = None,
    return_state: bool = False,
):
    """Attention with weights phi(q) . phi(k) in place of exp(q . k): time and memory linear in T.

        out_t = sum_s phi(q_t) . phi(k_s) v_s / sum_s phi(q_t) . phi(k_s),   s <= t where causal

    Args:
      query: [B, T, N, H]. key: [B, S, K, H], N a multiple of K. value: [B, S, K, Hv].
      feature_map: `EluPlusOne()`, `Cosine(max_length)`, `PositiveRandomFeatures.orthogonal(...)`, or a function
        (x [..., T, H], positions [T], is_query) -> features [..., T, F] that are not negative.
      is_causal: token t sees keys s <= t, and needs T = S. Otherwise every query sees every key.
      form: causal only: "parallel" (quadratic, the definition), "chunked", or "recurrent".
      chunk: tokens a chunk of the chunked form.
      scale: of q . k, its square root multiplies both; None is 1 / sqrt(H) for `PositiveRandomFeatures`, which
        estimates the softmax's weights, and 1 otherwise, as the papers have it.
      state: the past, for causal decoding; None is an empty one.
      return_state: also return the state after the last key.

    Returns:
      The output [B, T, N, Hv] in the query's dtype; with `return_state` a pair with the `State`. A query whose
      weights are all 0 gives 0.

    Raises:
      ValueError: for arguments that do not fit.

    Source: Katharopoulos et al., Transformers are RNNs (2020), sections 3.2 and 3.3; the chunked form: Hua et al.,
    Transformer Quality in Linear Time (2022), section 3.2.

    Example:
      >>> import jax
      >>> from jaxattn.linear import EluPlusOne, linear_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
      >>> prompt, state = linear_attention(q, k, v, feature_map=EluPlusOne(), is_causal=True, return_state=True)
      >>> token, state = linear_attention(q[:, :1], k[:, :1], v[:, :1], feature_map=EluPlusOne(), is_causal=True,
      ...                                 state=state, return_state=True)
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name} of shape {array.shape} must have the four axes batch, tokens, heads, head dim")
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if N % K:
        raise ValueError(f"N={N} query heads must be a multiple of K={K} key/value heads")
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMS)}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if is_causal and T != S:
        raise ValueError(f"causal linear attention needs T = S, got T={T} and S={S}; pass the past as a state")
    if state is not None and not is_causal:
        raise ValueError("a state holds the past of causal attention: it needs is_causal=True")
    if key.shape != (B, S, K, H) or value.shape[:3] != (B, S, K):
        raise ValueError(f"key {key.shape} and value {value.shape} must be [B={B}, S, K, H={H}] and [B={B}, S, K, Hv]")

    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if scale is None:
        scale = H**-0.5 if isinstance(feature_map, PositiveRandomFeatures) else 1.0
    past = jnp.zeros((), jnp.int32) if state is None else state.length
    q, k, v = (x.astype(dtype).swapaxes(1, 2) for x in (query, key, value))  # [B, heads, T, H]
    q = feature_map(q * scale**0.5, past + jnp.arange(T), True).reshape(B, K, N // K, T, -1)
    k = feature_map(k * scale**0.5, past + jnp.arange(S), False)
    state = state or initial_state(B, K, k.shape[-1], v.shape[-1], dtype)

    if not is_causal:
        state = _absorb(state, k, v)
        top, bottom = _read(state, q)
    elif form == "parallel":
        top, bottom = _within(q, k, v)
        before = _read(state, q)
        top, bottom, state = top + before[0], bottom + before[1], _absorb(state, k, v)
    else:
        top, bottom, state = _by_chunks(state, q, k, v, 1 if form == "recurrent" else min(chunk, T))
    out_BKGTH = top / jnp.where(bottom == 0, 1, bottom)[..., None]
    out = out_BKGTH.reshape(B, N, T, -1).swapaxes(1, 2).astype(query.dtype)
    return (out, state) if return_state else out


def _absorb(state: State, k_BKSF, v_BKSH) -> State:
    values = jnp.einsum("BKSF,BKSH->BKFH", k_BKSF, v_BKSH, precision=lax.Precision.HIGHEST)
    return State(state.values + values, state.normaliser + k_BKSF.sum(2), state.length + k_BKSF.shape[2])


def _read(state: State, q_BKGTF):
    """phi(q)^T of the state's values, and of its normaliser."""
    top = jnp.einsum("BKGTF,BKFH->BKGTH", q_BKGTF, state.values, precision=lax.Precision.HIGHEST)
    return top, jnp.einsum("BKGTF,BKF->BKGT", q_BKGTF, state.normaliser, precision=lax.Precision.HIGHEST)


def _within(q_BKGTF, k_BKSF, v_BKSH):
    """The causal sums inside one stretch of tokens, by its matrix of weights."""
    weights = jnp.einsum("BKGTF,BKSF->BKGTS", q_BKGTF, k_BKSF, precision=lax.Precision.HIGHEST)
    weights = jnp.where(jnp.tri(*weights.shape[-2:], dtype=bool), weights, 0)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH, precision=lax.Precision.HIGHEST), weights.sum(-1)


def _by_chunks(state: State, q, k, v, chunk: int):
    """One chunk after the other: its own causal sums, and the state's, which then takes the chunk in."""
    T = q.shape[3]
    count = -(-T // chunk)

    def split(x, axis):  # zeros after the end: features of 0 add nothing
        widths = [(0, count * chunk - T if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths).reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def one(state, qkv):
        q, k, v = qkv
        own, before = _within(q, k, v), _read(state, q)
        return _absorb(state, k, v), (own[0] + before[0], own[1] + before[1])

    after, (top, bottom) = lax.scan(one, state, (split(q, 3), split(k, 2), split(v, 2)))
    top, bottom = (jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, *x.shape[5:])[:, :, :, :T] for x in (top, bottom))
    return top, bottom, after._replace(length=state.length + T)
