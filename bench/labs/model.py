"""The small language model of the labs: `jaxattn.nn`, every choice an argument.

Design fact: linear attention is `nn.Attention` with another `attend`; all else, masks included, is its configuration.
First parameters are drawn by NumPy from the layers' own distributions: compiling JAX's random numbers takes longer
than some labs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import Causal, Mask, nn
from jaxattn.linear import EluPlusOne, linear_attention
from jaxattn.rope import RopeConfig

_CAUSAL = Causal()
THETA = 100.0  # short sequences: every frequency of the rotation turns within one


class LinearAttention(nn.Attention):
    """The same layer with weights phi(q) . phi(k), phi(x) = elu(x) + 1; causal, and no other mask."""

    def attend(self, query, key, value, mask: Mask, *, residual: bool = False):
        if residual or mask != _CAUSAL:
            raise NotImplementedError("linear attention here is causal, without another mask or a log-sum-exp")
        return linear_attention(query, key, value, feature_map=EluPlusOne(), is_causal=True, chunk=32)


def small_model(
    *,
    vocab: int,
    d: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    mask: Mask = _CAUSAL,
    linear: bool = False,
    implementation: str | None = None,
    remat=None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder of `layers` blocks of width d, RoPE, gated MLP of width 2 d: its graph, and its parameters' shapes.

    >>> graph, shapes = small_model(vocab=8, d=8, layers=1, heads=2)
    >>> nnx.merge(graph, first_parameters(shapes, seed=0))(jnp.array([[1, 2, 3]])).shape
    (1, 3, 8)
    """

    def block(rngs: nnx.Rngs) -> nn.Block:
        attention = (LinearAttention if linear else nn.Attention)(
            d,
            heads,
            n_kv_heads=kv_heads,
            rope=RopeConfig(d // heads, theta=THETA),
            mask=mask,
            implementation=implementation,
            rngs=rngs,
        )
        norms = [nn.RMSNorm(d, rngs=rngs) for _ in range(2)]
        return nn.Block(attention, nn.GatedMLP(d, 2 * d, rngs=rngs), *norms)

    return nnx.split(nnx.eval_shape(lambda: nn.Transformer(vocab, d, layers, block, remat=remat, rngs=nnx.Rngs(0))))


def first_parameters(shapes: nnx.State, seed: int) -> nnx.State:
    """Parameters as the layers draw them: scales 1, embeddings normal(0.02), kernels normal with variance 1 / fan-in.

    Layers are stacked along the first axis; the fan-in of `wo` is its next two axes, that of the others the next one.
    """
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = 1 if "embedding" in name else np.prod(leaf.shape[1 : 3 if "wo" in name else 2])
        deviation = 0.02 if "embedding" in name else fan_in**-0.5
        return jnp.asarray(random.standard_normal(leaf.shape, np.float32) * deviation, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
