"""Random mask expressions for hypothesis: every mask, with and without arrays, combined a few levels deep."""

import numpy as np
from hypothesis import strategies as st

from jaxattn import Blocks, Causal, Dense, Dilated, Full, Global, Lengths, RandomBlocks, SegmentIds, Window

B, N, LONGEST = 2, 2, 24


def _optional(numbers):
    return st.none() | numbers


def static_leaves():
    """Masks without arrays."""
    near, size = st.integers(-4, 9), st.integers(1, 6)
    return st.one_of(
        st.builds(Full),
        st.builds(Causal, near),
        st.builds(Window, _optional(near), _optional(near)),
        st.builds(Dilated, size),
        st.builds(Global, st.integers(0, 4) | st.lists(st.integers(0, LONGEST), max_size=5)),
        st.builds(RandomBlocks, size, st.integers(0, 3), st.integers(1, 8), st.integers(0, 2**30)),
        st.builds(Lengths, _optional(st.integers(-1, LONGEST)), _optional(st.integers(-1, LONGEST))),
    )


def array_leaves():
    """Masks with arrays: random ones, for the drawn seed, of every rank that is allowed."""

    def draw(kind, seed):
        rng = np.random.default_rng(seed)
        numbers = [rng.integers(-2, 12, shape) for shape in ((B,), ())]
        if kind < 2:
            return Causal(numbers[kind])
        if kind < 4:
            return Lengths(numbers[kind - 2], numbers[3 - kind] if seed % 2 else None)
        if kind < 6:
            ids = rng.integers(0, 3, ((B, LONGEST), (LONGEST,))[kind - 4])
            return SegmentIds(np.sort(ids, axis=-1) if seed % 2 else ids)
        if kind < 8:
            return Window(numbers[kind - 6], numbers[7 - kind] if seed % 2 else 3)
        shapes = ((B, N), (1, N), (B, 1), ())
        shape = (*shapes[kind - 8], LONGEST if seed % 3 else 1, LONGEST if seed % 5 else 1)
        return Dense(rng.random(shape) < rng.choice([0.05, 0.5, 0.95]))

    return st.builds(draw, st.integers(0, 11), st.integers(0, 1000))


def expressions(static: bool = False, leaves=None):
    """Expressions of & | ~ shift and Blocks."""
    if leaves is None:
        leaves = static_leaves() if static else static_leaves() | array_leaves()
    offsets = st.integers(-3, 5)
    if not static:
        offsets |= st.sampled_from([np.array([0, 3]), np.array([2, -1]), np.array(4)])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
            st.builds(lambda a, offset: a.shift(offset), inner, offsets),
            st.builds(Blocks, inner, st.integers(1, 4)),
        ),
        max_leaves=4,
    )
