"""Layers as Flax NNX modules: one configurable attention layer, of which Llama's is a configuration.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dim, U value head dim, D model.

Design fact: a KV cache is a value, not module state. `layer(x, cache=cache)` returns the next cache, every
shape in it is static, and one compiled prefill and one compiled decode step serve a whole generation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxattn import api
from jaxattn import rope as rope_
from jaxattn.masks import Causal, Lengths, Mask

Initializer = jax.nn.initializers.Initializer
_FAN_IN = jax.nn.initializers.lecun_normal
_CAUSAL = Causal()


class Stages(NamedTuple):
    """Everything an attention layer computes, in order; log_sum_exp is None where it was not asked for."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    rotated_query: jax.Array
    rotated_key: jax.Array
    log_sum_exp: jax.Array | None
    context: jax.Array
    output: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of the tokens so far, in slots that every batch element fills in step.

    Args:
      key: [B, slots, K, H]. value: [B, slots, K, U].
      length: int32 [], slots in use.
      start: int32 [B], the first slot that holds a token: left padding lies before it.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array
    start: jax.Array

    def positions(self, T: int) -> jax.Array:
        """Positions [B, T] of the next T tokens, counted from each element's first token."""
        return self.length + jnp.arange(T) - self.start[:, None]

    def visible(self, mask: Mask, T: int) -> Mask:
        """What the next T queries may attend among the slots: `mask`, without free slots and left padding."""
        return mask.shift(self.length) & Lengths(key=self.length + T) & ~Lengths(key=self.start)

    def append(self, key: jax.Array, value: jax.Array) -> KVCache:
        """The cache with T more slots filled, from `length` on, by key [B, T, K, H] and value [B, T, K, U].

        The caller sees to it that they fit: length is not known while tracing, and beyond the last slot the last ones
        are overwritten.
        """
        at = (0, self.length, 0, 0)
        return KVCache(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), at),
            jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), at),
            self.length + key.shape[1],
            self.start,
        )


class Attention(nnx.Module):
    """Multi-head attention over x: project, rotate, attend, project back.

        q = x wq + bq,  k = x wk + bk,  v = x wv + bv      (einsum btd,dnh->btnh)
        context = dot_product_attention(rotate(q), rotate(k), v, mask)
        output = context wo + bo                           (einsum btnu,nud->btd)

    Args:
      d_model: D, width of input and output.
      n_heads: N. n_kv_heads: K, a divisor of N; None means N (MHA), 1 is MQA.
      head_dim: H; None means D / N. H * N may differ from D.
      value_dim: U; None means H.
      rope: how queries and keys are rotated; None leaves them.
      mask: what may be attended, without arrays; `Causal()` by default. A call can narrow it further.
      qkv_bias, out_bias: whether the projections have biases (zero at first).
      scale: of the logits; None means 1 / sqrt(H). logits_soft_cap: as in `dot_product_attention`.
      implementation: as in `dot_product_attention`.
      dtype: of the computation; None means that of x. param_dtype: of the stored parameters.
      kernel_init: LeCun normal (variance 1 / fan-in) by default.
      rngs: `nnx.Rngs` with a `params` stream.

    Raises:
      ValueError: where sizes do not fit, or `mask` holds arrays.

    Source: Vaswani et al., arXiv:1706.03762, section 3.2.2; Ainslie et al. (GQA), arXiv:2305.13245, section
    2.2.

    >>> layer = Attention(32, 4, n_kv_heads=2, rope=rope_.RopeConfig(8), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 5, 32))).shape
    (1, 5, 32)
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rope: rope_.RopeConfig | rope_.Frequencies | None = None,
        mask: Mask = _CAUSAL,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        implementation: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        N, K = n_heads, n_heads if n_kv_heads is None else n_kv_heads
        for name, size in (("d_model", d_model), ("n_heads", N), ("n_kv_heads", K)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if head_dim is None and d_model % N:
            raise ValueError(f"d_model={d_model} must be a multiple of n_heads={N}, or head_dim be given")
        H = d_model // N if head_dim is None else head_dim
        U = H if value_dim is None else value_dim
        if min(H, U) < 1:
            raise ValueError(f"head_dim={H} and value_dim={U} must be at least 1")
        if N % K:
            raise ValueError(f"n_heads={N} must be a multiple of n_kv_heads={K}")
        if not mask.is_static:
            raise ValueError("a layer's own mask must hold no arrays; pass such a mask to the call")
        if isinstance(rope, rope_.RopeConfig):
            if rope.head_dim != H:
                raise ValueError(f"rope.head_dim={rope.head_dim} must be the layer's head_dim={H}")
            rope = rope_.frequencies(rope)
        self.rope = rope
        self.mask, self.scale, self.logits_soft_cap = mask, scale, logits_soft_cap
        self.implementation, self.dtype = implementation, dtype

        def kernel(shape, in_axis, out_axis):
            init = _FAN_IN(in_axis=in_axis, out_axis=out_axis) if kernel_init is None else kernel_init
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        self.wq = kernel((d_model, N, H), 0, (1, 2))
        self.wk = kernel((d_model, K, H), 0, (1, 2))
        self.wv = kernel((d_model, K, U), 0, (1, 2))
        self.wo = kernel((N, U, d_model), (0, 1), 2)
        self.bq = nnx.Param(jnp.zeros((N, H), param_dtype)) if qkv_bias else None
        self.bk = nnx.Param(jnp.zeros((K, H), param_dtype)) if qkv_bias else None
        self.bv = nnx.Param(jnp.zeros((K, U), param_dtype)) if qkv_bias else None
        self.bo = nnx.Param(jnp.zeros((d_model,), param_dtype)) if out_bias else None

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ):
        """Attend among the tokens of x, or, with a cache, among those before them too.

        Args:
          x: [B, T, D], or [T, D] without a cache.
          positions: int [T] or [B, T] for the rotation; None counts from 0, or on from the cache.
          mask: narrows the layer's own mask; with a cache, in terms of slots.
          cache: from `init_cache` or an earlier call, with T slots left.

        Returns: [B, T, D] in the computation's dtype; with a cache the pair (output, next cache).
        Raises: ValueError where x does not fit the layer, or the cache's batch or slots.
        """
        if cache is None:
            return self.stages(x, positions=positions, mask=mask).output
        B, slots = cache.key.shape[:2]
        if x.ndim != 3 or x.shape[0] != B or x.shape[1] > slots:
            raise ValueError(f"x of shape {x.shape} must be [B={B}, T, D], T at most {slots}, for the cache given")
        T = x.shape[1]
        query, key, value = self.project(x)
        positions = cache.positions(T) if positions is None else positions
        query, key = self.rotate(query, positions), self.rotate(key, positions)
        cache_mask = cache.visible(self._mask(mask), T)
        cache = cache.append(key, value)
        context = self.attend(query, cache.key.astype(key.dtype), cache.value.astype(value.dtype), cache_mask)
        return self.combine(context), cache

    def stages(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: Mask | None = None,
        residual: bool = False,
    ) -> Stages:
        """What `layer(x)` computes, every stage of it; `residual` asks for the log-sum-exp too.

        Args: as for the call, without a cache.
        Returns: `Stages`, heads as [B, T, N, H].
        """
        query, key, value = self.project(x)
        positions = jnp.arange(x.shape[-2]) if positions is None else positions
        rotated_query, rotated_key = self.rotate(query, positions), self.rotate(key, positions)
        attended = self.attend(rotated_query, rotated_key, value, self._mask(mask), residual=residual)
        context, lse = attended if residual else (attended, None)
        return Stages(query, key, value, rotated_query, rotated_key, lse, context, self.combine(context))

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., T, D] -> query [..., T, N, H], key [..., T, K, H], value [..., T, K, U]."""
        if x.shape[-1] != self.wq.shape[0]:
            raise ValueError(f"x of shape {x.shape} must end with d_model={self.wq.shape[0]}")
        pairs = ((self.wq, self.bq), (self.wk, self.bk), (self.wv, self.bv))
        return tuple(_linear("...d,dnh->...nh", x, w, b, self.dtype) for w, b in pairs)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate queries or keys [..., T, N, H] by their positions; as they are where the layer has no RoPE."""
        return x if self.rope is None else rope_.rotate(x, positions, self.rope)

    def attend(self, query, key, value, mask: Mask, *, residual: bool = False):
        """The context [..., T, N, U]; with `residual` a pair with the log-sum-exp [..., T, N].

        Both are named "context" for `jax.checkpoint_policies.save_only_these_names`.
        """
        attended = api.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            implementation=self.implementation,
            return_residual=residual,
        )
        return checkpoint_name(attended, "context")

    def combine(self, context: jax.Array) -> jax.Array:
        """context [..., T, N, U] -> output [..., T, D]."""
        return _linear("...nu,nud->...d", context, self.wo, self.bo, self.dtype)

    def init_cache(self, batch: int, slots: int, *, dtype: Any = None, start: jax.Array | None = None) -> KVCache:
        """An empty cache of `slots` slots; dtype None means the layer's, `start` [B] is the amount of left
        padding.

        >>> layer = Attention(32, 4, n_kv_heads=2, rngs=nnx.Rngs(0))
        >>> y, cache = layer(jnp.ones((1, 3, 32)), cache=layer.init_cache(1, slots=8))
        >>> y, cache = layer(jnp.ones((1, 1, 32)), cache=cache)
        >>> y.shape, int(cache.length)
        ((1, 1, 32), 4)
        """
        _, K, H = self.wk.shape
        dtype = dtype or self.dtype or self.wk.dtype
        return KVCache(
            jnp.zeros((batch, slots, K, H), dtype),
            jnp.zeros((batch, slots, K, self.wv.shape[2]), dtype),
            jnp.zeros((), jnp.int32),
            jnp.zeros((batch,), jnp.int32) if start is None else jnp.asarray(start, jnp.int32),
        )

    def _mask(self, mask: Mask | None) -> Mask:
        return self.mask if mask is None else self.mask & mask


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis, computed in float32 and rounded once.

    Args: size: of the last axis. eps: added to the mean square. dtype: of the result; None means that of x.
      param_dtype: of scale, which is 1 at first.

    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.

    >>> RMSNorm(4, eps=0.0, rngs=nnx.Rngs(0))(jnp.array([[0.0, 0.0, 0.0, 8.0]])).tolist()
    [[0.0, 0.0, 0.0, 2.0]]
    """

    def __init__(
        self, size: int, *, eps: float = 1e-6, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        del rngs  # nothing is random; taken so that every layer is made alike
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] -> the same shape."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(self.dtype or x.dtype)


class GatedMLP(nnx.Module):
    """(activation(x wg + bg) * (x wu + bu)) wd + bd: a gated linear unit.

    Args:
      d_model: D. d_mlp: F, its hidden width.
      activation: silu makes it SwiGLU.
      bias: on all three projections, zero at first.
      dtype, param_dtype, kernel_init, rngs: as in `Attention`.

    Source: Shazeer, arXiv:2002.05202, equation 6.

    >>> GatedMLP(8, 16, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 8))).shape
    (1, 3, 8)
    """

    def __init__(
        self,
        d_model: int,
        d_mlp: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        init = kernel_init or _FAN_IN()
        self.activation, self.dtype = activation, dtype
        self.wg = nnx.Param(init(rngs.params(), (d_model, d_mlp), param_dtype))
        self.wu = nnx.Param(init(rngs.params(), (d_model, d_mlp), param_dtype))
        self.wd = nnx.Param(init(rngs.params(), (d_mlp, d_model), param_dtype))
        self.bg = nnx.Param(jnp.zeros((d_mlp,), param_dtype)) if bias else None
        self.bu = nnx.Param(jnp.zeros((d_mlp,), param_dtype)) if bias else None
        self.bd = nnx.Param(jnp.zeros((d_model,), param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., T, D] -> the same shape, in the computation's dtype."""
        gate = _linear("...d,df->...f", x, self.wg, self.bg, self.dtype)
        up = _linear("...d,df->...f", x, self.wu, self.bu, self.dtype)
        wide = jnp.promote_types(gate.dtype, jnp.float32)
        hidden = (self.activation(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)
        return _linear("...f,fd->...d", hidden, self.wd, self.bd, self.dtype)


class Block(nnx.Module):
    """A pre-norm transformer block: x += attention(norm(x)), then x += mlp(norm(x)).

    Args: attention, mlp: called on [B, T, D]. attention_norm, mlp_norm: before each.

    >>> rngs = nnx.Rngs(0)
    >>> norms = [RMSNorm(8, rngs=rngs) for _ in range(2)]
    >>> block = Block(Attention(8, 2, rngs=rngs), GatedMLP(8, 16, rngs=rngs), *norms)
    >>> block(jnp.ones((1, 3, 8))).shape
    (1, 3, 8)
    """

    def __init__(self, attention: nnx.Module, mlp: nnx.Module, attention_norm: nnx.Module, mlp_norm: nnx.Module):
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ):
        """x [B, T, D] -> the same shape; with a cache the pair (x, next cache). Arguments as for `Attention`."""
        attended = self.attention(self.attention_norm(x), positions=positions, mask=mask, cache=cache)
        attended, cache = attended if cache is not None else (attended, None)
        x = x + attended
        x = x + self.mlp(self.mlp_norm(x))
        return x if cache is None else (x, cache)


class Transformer(nnx.Module):
    """A decoder-only language model: embedding, n equal blocks, norm, projection to the vocabulary.

    The blocks' parameters are stacked along a first axis of length n_layers and scanned, so that compile
    time does not grow with depth, and a rematerialised block frees its activations.

    Args:
      vocab_size: V. d_model: D. n_layers: number of blocks.
      block: makes one block from `nnx.Rngs`.
      tied: project with the embedding; otherwise `unembedding` [V, D] is a parameter of its own.
      eps: of the last norm.
      dtype: of the computation; None means that of the embedding.
      param_dtype: of embedding, norm and projection. Embeddings are normal with standard deviation 0.02 at first.
      remat: None keeps every activation for the backward pass; else a policy of `jax.checkpoint_policies` for one
        block (`nothing_saveable`, `dots_saveable`; `save_only_these_names("context")` keeps attention's output).

    >>> def block(rngs):
    ...     norms = [RMSNorm(8, rngs=rngs) for _ in range(2)]
    ...     return Block(Attention(8, 2, rngs=rngs), GatedMLP(8, 16, rngs=rngs), *norms)
    >>> model = Transformer(32, 8, 3, block, rngs=nnx.Rngs(0))
    >>> model(jnp.array([[1, 2, 3]])).shape
    (1, 3, 32)
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        block: Callable[[nnx.Rngs], nnx.Module],
        *,
        tied: bool = True,
        eps: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        remat: Any = None,
        rngs: nnx.Rngs,
    ):
        normal = jax.nn.initializers.normal(0.02)
        self.n_layers, self.dtype, self.remat = n_layers, dtype, remat
        self.embedding = nnx.Param(normal(rngs.params(), (vocab_size, d_model), param_dtype))
        self.unembedding = None if tied else nnx.Param(normal(rngs.params(), (vocab_size, d_model), param_dtype))
        self.norm = RMSNorm(d_model, eps=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=n_layers)(nnx.vmap(block))(rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ):
        """Logits [B, T, V] in float32 (float64); with a cache the pair (logits, next cache).

        Args: tokens: int [B, T]. positions, mask: as for `Attention`. cache: from `init_cache` or an earlier
        call.
        """
        hidden = self.hidden(tokens, positions=positions, mask=mask, cache=cache)
        if cache is None:
            return self.logits(hidden)
        return self.logits(hidden[0]), hidden[1]

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ):
        """What `logits` projects: [B, T, D] after the last norm; with a cache the pair with the next cache."""
        x = self.embedding[tokens].astype(self.dtype or self.embedding.dtype)
        graph, parameters = nnx.split(self.blocks)

        def layer(x, inputs):
            parameters, slots = inputs
            one = None if slots is None else KVCache(*slots, cache.length, cache.start)
            out = nnx.merge(graph, parameters)(x, positions=positions, mask=mask, cache=one)
            return out if slots is None else (out[0], (out[1].key, out[1].value))

        def step(x, inputs):
            out = layer(x, inputs)
            return out if cache is not None else (out, None)

        if self.remat is not None:
            step = jax.checkpoint(step, policy=self.remat, prevent_cse=False)
        slots = None if cache is None else (cache.key, cache.value)
        x, slots = jax.lax.scan(step, x, (parameters, slots))
        if cache is None:
            return self.norm(x)
        return self.norm(x), KVCache(*slots, cache.length + tokens.shape[1], cache.start)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V], accumulated and returned in float32 (float64)."""
        kernel = (self.embedding if self.unembedding is None else self.unembedding)[...].astype(hidden.dtype)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum(
            "...d,vd->...v", hidden, kernel, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide
        )

    def init_cache(self, batch: int, slots: int, *, dtype: Any = None, start: jax.Array | None = None) -> KVCache:
        """An empty cache: key and value [n_layers, B, slots, K, H]; arguments as for `Attention.init_cache`."""
        graph, parameters = nnx.split(self.blocks)
        first = nnx.merge(graph, jax.tree.map(lambda x: x[0], parameters))
        one = first.attention.init_cache(batch, slots, dtype=dtype or self.dtype, start=start)
        many = [jnp.zeros((self.n_layers, *x.shape), x.dtype) for x in (one.key, one.value)]
        return KVCache(*many, one.length, one.start)


def generate(model: Transformer, tokens: jax.Array, new_tokens: int, *, padding: jax.Array | None = None) -> jax.Array:
    """Continue each row greedily: prefill once, then one token at a time from the cache.

    Args:
      model: the language model.
      tokens: int [B, T], prompts; shorter ones padded on the left.
      new_tokens: how many to add.
      padding: int [B], how many tokens on the left of each row are padding; None means none.

    Returns: int32 [B, new_tokens].
    Raises: ValueError where new_tokens is not positive.

    The prefill is compiled once for a prompt length, the decode step once for a number of slots.

    >>> def block(rngs):
    ...     norms = [RMSNorm(8, rngs=rngs) for _ in range(2)]
    ...     return Block(Attention(8, 2, rngs=rngs), GatedMLP(8, 16, rngs=rngs), *norms)
    >>> generate(Transformer(32, 8, 1, block, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]]), 4).shape
    (1, 4)
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens} must be at least 1")
    B, T = tokens.shape
    cache = model.init_cache(B, T + new_tokens, start=padding)
    chosen = []
    for _ in range(new_tokens):
        tokens, cache = advance(model, tokens, cache)
        chosen.append(tokens)
    return jnp.concatenate(chosen, axis=1)


@nnx.jit
def advance(model: Transformer, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Take in tokens [B, T] and choose the next: (int32 [B, 1], next cache). Prefill and decode are both this."""
    hidden, cache = model.hidden(tokens, cache=cache)
    return jnp.argmax(model.logits(hidden[:, -1:]), axis=-1).astype(jnp.int32), cache


def _linear(equation: str, x: jax.Array, kernel, bias, dtype) -> jax.Array:
    """einsum plus bias in `dtype`; float32 is multiplied in full, never in TF32."""
    dtype = x.dtype if dtype is None else dtype
    y = jnp.einsum(equation, x.astype(dtype), kernel[...].astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return y if bias is None else y + bias[...].astype(dtype)
