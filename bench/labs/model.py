"""The small language model of the labs: `jaxattn.nn`, every choice an argument.

Design fact: linear attention is `nn.Attention` with another `attend`; all else, masks included, is its configuration.
"""

from __future__ import annotations

from flax import nnx

from jaxattn import Causal, Mask, nn
from jaxattn.linear import EluPlusOne, linear_attention
from jaxattn.rope import RopeConfig


class LinearAttention(nn.Attention):
    """The same layer with weights phi(q) . phi(k), phi(x) = elu(x) + 1; causal, and no other mask."""

    def attend(self, query, key, value, mask: Mask, *, residual: bool = False):
        if residual or mask != Causal():
            raise NotImplementedError("linear attention here is causal, without another mask or a log-sum-exp")
        return linear_attention(query, key, value, feature_map=EluPlusOne(), is_causal=True, chunk=32)


def small_model(
    *,
    vocab: int,
    d: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    mask: Mask | None = None,
    linear: bool = False,
    implementation: str | None = None,
    remat=None,
    seed: int = 0,
) -> nn.Transformer:
    """A decoder of `layers` blocks of width d, RoPE, gated MLP of width 2 d; parameters from the seed.

    >>> small_model(vocab=8, d=8, layers=1, heads=2).n_layers
    1
    """

    def block(rngs: nnx.Rngs) -> nn.Block:
        attention = (LinearAttention if linear else nn.Attention)(
            d,
            heads,
            n_kv_heads=kv_heads,
            rope=RopeConfig(d // heads),
            mask=mask or Causal(),
            implementation=implementation,
            rngs=rngs,
        )
        norms = [nn.RMSNorm(d, rngs=rngs) for _ in range(2)]
        return nn.Block(attention, nn.GatedMLP(d, 2 * d, rngs=rngs), *norms)

    return nn.Transformer(vocab, d, layers, block, remat=remat, rngs=nnx.Rngs(seed))
