"""Published attention patterns, each a short composition of masks.

A pattern adds no mechanism: it is a mask like any other, so every implementation computes it, visits only its tiles,
and it can be shown, counted and combined further.
"""

from __future__ import annotations

from jaxattn.masks import Blocks, Causal, Dilated, Global, Lengths, Mask, RandomBlocks, SegmentIds, Window, integer


def sliding_window(size: int) -> Mask:
    """Causal, the last `size` keys, the query's own included: t - size < s <= t.

    Args:
      size: the window in tokens.

    Returns:
      Causal() & Window(size - 1, None).

    Raises:
      ValueError: where size is not an int of at least 1.

    Source: Jiang et al., Mistral 7B (2023), section 2.

    Example:
      >>> print(sliding_window(2).show(4, 4))
      #...
      ##..
      .##.
      ..##
    """
    size = integer(size, "sliding_window size", least=1)
    return Causal() & Window(size - 1, None)


def attention_sinks(size: int, sinks: int = 4) -> Mask:
    """Causal, the last `size` keys and the first `sinks` ones, which keeps streaming models stable.

    Args:
      size: the window in tokens.
      sinks: the number of first tokens that stay visible.

    Returns:
      Causal() & (Window(size - 1, None) | Lengths(key=sinks)).

    Raises:
      ValueError: where size is not an int of at least 1, or sinks one of at least 0.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2023), section 3.2.

    Example:
      >>> print(attention_sinks(2, sinks=1).show(4, 4))
      #...
      ##..
      ###.
      #.##
    """
    size, sinks = integer(size, "attention_sinks size", least=1), integer(sinks, "attention_sinks sinks", least=0)
    return Causal() & (Window(size - 1, None) | Lengths(key=sinks))


def dilated(window: int, dilation: int) -> Mask:
    """`window` keys on each side, `dilation` tokens apart: |t - s| <= window * dilation, (t - s) mod dilation == 0.

    Args:
      window: keys on each side.
      dilation: tokens between two of them; 1 is a plain window.

    Returns:
      Window(window * dilation, window * dilation) & Dilated(dilation).

    Raises:
      ValueError: where window is not an int of at least 0, or dilation one of at least 1.

    Source: Beltagy et al., Longformer (2020), section 3.1, dilated sliding window.

    Example:
      >>> print(dilated(1, 2).show(5, 5))
      #.#..
      .#.#.
      #.#.#
      .#.#.
      ..#.#
    """
    window, dilation = integer(window, "dilated window", least=0), integer(dilation, "dilated dilation", least=1)
    return Window(window * dilation, window * dilation) & Dilated(dilation)


def strided(stride: int) -> Mask:
    """Causal, the last `stride` keys, and before them every stride-th one.

    Args:
      stride: in tokens; near sqrt(T) makes both parts equally large.

    Returns:
      Causal() & (Window(stride, None) | Dilated(stride)).

    Raises:
      ValueError: where stride is not an int of at least 1.

    Source: Child et al., Sparse Transformers (2019), section 4.3, strided attention, its two heads merged.

    Example:
      >>> print(strided(2).show(6, 6))
      #.....
      ##....
      ###...
      .###..
      #.###.
      .#.###
    """
    stride = integer(stride, "strided stride", least=1)
    return Causal() & (Window(stride, None) | Dilated(stride))


def longformer(window: int, tokens: int | tuple[int, ...], dilation: int = 1) -> Mask:
    """A sliding window of window // 2 keys on each side, optionally dilated, and global tokens.

    Args:
      window: keys on both sides together.
      tokens: positions of the global tokens, or an int n for the first n.
      dilation: tokens between two keys of the window.

    Returns:
      dilated(window // 2, dilation) | Global(tokens); `& Causal()` makes it autoregressive.

    Raises:
      ValueError: where window is not an int of at least 0, dilation one of at least 1, or tokens are no positions.

    Source: Beltagy et al., Longformer (2020), section 3.1.

    Example:
      >>> print(longformer(2, tokens=1).show(5, 5))
      #####
      ###..
      ####.
      #.###
      #..##
    """
    half = integer(window, "longformer window", least=0) // 2
    dilation = integer(dilation, "longformer dilation", least=1)
    return (Window(half, half) if dilation == 1 else dilated(half, dilation)) | Global(tokens)


def bigbird(length: int, block: int, window: int = 3, global_blocks: int = 2, random_blocks: int = 3, seed: int = 0):
    """Block-sparse: a window of blocks, global blocks, and random blocks; its work is linear in length.

    Args:
      length: tokens in the sequence, T = S.
      block: tokens a block.
      window: blocks in the window, the query's own in its middle; odd.
      global_blocks: the first blocks, which attend everything and are attended by everything.
      random_blocks: draws for each block of queries.
      seed: of the draws.

    Returns:
      Blocks(Window(w, w), block) | Global(global_blocks * block) | RandomBlocks(block, random_blocks, ...).

    Raises:
      ValueError: where window is even, or a number is out of range.

    Source: Zaheer et al., Big Bird (2020), section 2 and appendix D.

    Example:
      >>> print(bigbird(8, block=1, window=3, global_blocks=1, random_blocks=1).show(8, 8))
      ########
      ###.....
      ####..#.
      #.####..
      #..###.#
      ##..###.
      #....###
      #.#...##
    """
    length, block = integer(length, "bigbird length", least=1), integer(block, "bigbird block", least=1)
    global_blocks = integer(global_blocks, "bigbird global_blocks", least=0)
    random_blocks = integer(random_blocks, "bigbird random_blocks", least=0)
    if integer(window, "bigbird window", least=1) % 2 == 0:
        raise ValueError(f"bigbird window={window} must be odd: the query's own block is in its middle")
    half = window // 2
    num_blocks = -(-length // block)
    return (
        Blocks(Window(half, half), block)
        | Global(min(global_blocks * block, length))
        | RandomBlocks(block, random_blocks, num_blocks, seed)
    )


def prefix_lm(prefix) -> Mask:
    """Causal, but the first `prefix` keys are visible to all: s <= t or s < prefix.

    Args:
      prefix: tokens in the prefix, an int of at least 0 or an int array [B].

    Returns:
      Causal() | Lengths(key=prefix).

    Raises:
      ValueError: where prefix is neither.

    Source: Raffel et al., T5 (2020), section 3.2.1, prefix LM.

    Example:
      >>> print(prefix_lm(3).show(4, 4))
      ###.
      ###.
      ###.
      ####
    """
    if not hasattr(prefix, "ndim"):
        prefix = integer(prefix, "prefix_lm prefix", least=0)
    return Causal() | Lengths(key=prefix)


def document_causal(segment_ids) -> Mask:
    """Causal inside each document of a packed sequence: s <= t and segment_ids[t] == segment_ids[s].

    Args:
      segment_ids: int array [T] or [B, T]; self-attention, so S = T.

    Returns:
      Causal() & SegmentIds(segment_ids).

    Raises:
      ValueError: where segment_ids is no such array.

    Source: Krell et al., Efficient Sequence Packing without Cross-contamination (2021), section 3.2.

    Example:
      >>> print(document_causal([0, 0, 1, 1]).show(4, 4))
      #...
      ##..
      ..#.
      ..##
    """
    return Causal() & SegmentIds(segment_ids)


def chunked(size: int) -> Mask:
    """Causal inside chunks of `size` tokens: s <= t and t // size == s // size.

    Args:
      size: tokens a chunk.

    Returns:
      Causal() & Blocks(Window(0, 0), size).

    Raises:
      ValueError: where size is not an int of at least 1.

    Source: Meta, Llama 4 (2025), the local layers; blocks as in Qiu et al., Blockwise Self-Attention (2020), section 3.

    Example:
      >>> print(chunked(2).show(4, 4))
      #...
      ##..
      ..#.
      ..##
    """
    return Causal() & Blocks(Window(0, 0), integer(size, "chunked size", least=1))
