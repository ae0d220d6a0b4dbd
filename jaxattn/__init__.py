"""Attention for JAX: one meaning, many implementations, from explicit loops to a Pallas kernel."""

from jaxattn.api import attention_weights, dot_product_attention, explain
from jaxattn.impl.base import Implementation
from jaxattn.impl.blockwise import Blockwise
from jaxattn.impl.loops import Loops
from jaxattn.impl.naive import Naive
from jaxattn.impl.triton import Triton
from jaxattn.masks import (
    Blocks,
    Causal,
    Dense,
    Dilated,
    Full,
    Global,
    Lengths,
    Mask,
    RandomBlocks,
    SegmentIds,
    Window,
)
from jaxattn.online_softmax import merge
from jaxattn.patterns import (
    attention_sinks,
    bigbird,
    chunked,
    dilated,
    document_causal,
    longformer,
    prefix_lm,
    sliding_window,
    strided,
)

__all__ = [
    "Blocks",
    "Blockwise",
    "Causal",
    "Dense",
    "Dilated",
    "Full",
    "Global",
    "Implementation",
    "Lengths",
    "Loops",
    "Mask",
    "Naive",
    "RandomBlocks",
    "SegmentIds",
    "Triton",
    "Window",
    "attention_sinks",
    "attention_weights",
    "bigbird",
    "chunked",
    "dilated",
    "document_causal",
    "dot_product_attention",
    "explain",
    "longformer",
    "merge",
    "prefix_lm",
    "sliding_window",
    "strided",
]
