"""The kinds of attention that `lab complexity` and `lab sparse` compare, by name.

Design fact: a sparse pattern is a mask for the same tiled implementation, which leaves out its empty tiles.
"""

from __future__ import annotations

import functools

import numpy as np

import jaxattn
from jaxattn import Blockwise, Mask, Window, dot_product_attention
from jaxattn.linear import EluPlusOne, linear_attention

WINDOW = 64


def mask(name: str, seq: int) -> Mask | None:
    """The mask of a pattern at this length; None for full attention. All are bidirectional."""
    match name:
        case "window":
            return Window(WINDOW // 2, WINDOW // 2)
        case "dilated":
            return jaxattn.dilated(WINDOW // 2, 2)
        case "bigbird":
            return jaxattn.bigbird(seq, block=WINDOW, window=3, global_blocks=1, random_blocks=1)
        case "longformer":
            return jaxattn.longformer(WINDOW, tokens=2)
    return None


def program(name: str, seq: int, heads: int, d: int, seed: int):
    """Attention of the kind that is named, on the same inputs for all."""
    arrays = tuple(np.random.default_rng(seed).standard_normal((3, 1, seq, heads, d), np.float32))
    if name == "linear":
        return functools.partial(linear_attention, feature_map=EluPlusOne()), arrays
    if name in ("loops", "naive"):
        return functools.partial(dot_product_attention, implementation=name), arrays
    # BigBird's own blocks are the tiles: then none is partial. A window is narrower than its tiles.
    block = min(seq, {"full": 512, "blockwise": 512, "bigbird": WINDOW}.get(name, 2 * WINDOW))
    tiled = Blockwise(block_q=block, block_k=block)
    return functools.partial(dot_product_attention, mask=mask(name, seq), implementation=tiled), arrays
