"""The tile plan against brute force: a tile is what its pairs are, and each tile that is not empty is visited once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expressions import B, N, expressions, static_leaves
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import (
    Blocks,
    Causal,
    Dense,
    Dilated,
    Full,
    Lengths,
    Mask,
    SegmentIds,
    Window,
    bigbird,
    dilated,
    longformer,
    sliding_window,
    strided,
)
from jaxattn.masks import EMPTY, FULL, PARTIAL
from jaxattn.tiles import Plan, plan, reads_every_key, tile_codes

SIZES = st.sampled_from([(12, 12, 4, 4), (12, 12, 3, 5), (9, 20, 4, 3), (1, 17, 1, 4), (17, 5, 8, 8), (7, 7, 16, 16)])


def brute_codes(mask: Mask, T: int, S: int, block_q: int, block_k: int) -> np.ndarray:
    """The exact code of each tile from its pairs."""
    allowed = np.asarray(mask.to_array(T, S))
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
    rows, columns = -(-T // block_q), -(-S // block_k)
    codes = np.zeros((*allowed.shape[:2], rows, columns), np.int8)
    for i in range(rows):
        for j in range(columns):
            tile = allowed[:, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            codes[:, :, i, j] = tile.any((2, 3)).astype(np.int8) + tile.all((2, 3))
    return codes


def assert_never_wrong(mask: Mask, codes, sizes) -> None:
    exact = brute_codes(mask, *sizes)
    shape = np.broadcast_shapes(codes.shape, exact.shape)
    codes, exact = np.broadcast_to(codes, shape), np.broadcast_to(exact, shape)
    np.testing.assert_array_equal(codes[codes != PARTIAL], exact[codes != PARTIAL])


@settings(max_examples=200)
@given(expressions(), SIZES)
def test_codes_are_never_wrong_for_any_expression(mask, sizes):
    codes = tile_codes(mask, *sizes)
    assert codes.dtype == np.int8
    assert isinstance(codes, np.ndarray)
    assert codes.shape[0] in (1, B)
    assert codes.shape[1] in (1, N)
    assert_never_wrong(mask, codes, sizes)


@settings(max_examples=12)
@given(expressions(), SIZES)
def test_codes_of_traced_leaves_are_never_wrong(mask, sizes):
    codes = jax.jit(lambda mask: tile_codes(mask, *sizes))(mask)
    assert codes.dtype == np.int8
    assert_never_wrong(mask, codes, sizes)


@settings(max_examples=200)
@given(static_leaves(), SIZES, st.integers(-3, 5))
def test_codes_of_one_mask_without_arrays_are_exact(mask, sizes, offset):
    np.testing.assert_array_equal(tile_codes(mask, *sizes), brute_codes(mask, *sizes))
    np.testing.assert_array_equal(tile_codes(~mask, *sizes), brute_codes(~mask, *sizes))
    shifted = mask.shift(offset)
    np.testing.assert_array_equal(tile_codes(shifted, *sizes), brute_codes(shifted, *sizes))
    blocked = Blocks(mask, 3)
    np.testing.assert_array_equal(tile_codes(blocked, *sizes), brute_codes(blocked, *sizes))


@pytest.mark.parametrize("sizes", [(12, 12, 4, 4), (12, 12, 3, 5)])
def test_codes_of_an_array_are_exact(sizes):
    rng = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98):
        mask = Dense(rng.random((2, 3, 12, 12)) < density)
        np.testing.assert_array_equal(tile_codes(mask, *sizes), brute_codes(mask, *sizes))


DIFFERENCES = st.one_of(
    st.builds(Full),
    st.builds(Causal, st.integers(-4, 6)),
    st.builds(Window, st.none() | st.integers(-2, 6), st.none() | st.integers(-2, 6)),
    st.builds(Dilated, st.integers(1, 5)),
)


@settings(max_examples=100)
@given(expressions(static=True, leaves=DIFFERENCES).filter(lambda mask: "Blocks" not in repr(mask)), SIZES)
def test_codes_of_expressions_of_t_minus_s_are_exact(mask, sizes):
    np.testing.assert_array_equal(tile_codes(mask, *sizes), brute_codes(mask, *sizes))


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Causal(7),
        Window(9, 4),
        sliding_window(13),
        Dilated(11),
        dilated(3, 5),
        strided(9),
        longformer(10, tokens=(0, 1, 40)),
        longformer(6, tokens=2, dilation=3),
        longformer(10, tokens=(0, 40)) & Causal(),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(96, 96, 16, 16), (97, 131, 16, 8), (131, 97, 7, 19)])
def test_exactly_the_tiles_that_are_not_empty_are_visited(mask, sizes):
    exact = brute_codes(mask, *sizes)
    np.testing.assert_array_equal(tile_codes(mask, *sizes) == EMPTY, exact == EMPTY)
    assert plan(mask, *sizes).visited == (exact != EMPTY).sum()


def test_bigbird_visits_linearly_many_tiles():
    block = 16
    visited = {T: plan(bigbird(T, block), T, T, block, block).visited for T in (512, 1024, 2048, 4096)}
    for T, tiles in visited.items():
        assert tiles <= (3 + 2 + 3 + 2) * T // block  # window, global columns, random, global rows
    assert visited[4096] / visited[2048] == pytest.approx(2, rel=0.05)
    assert (brute_codes(bigbird(512, block), 512, 512, block, block) != EMPTY).sum() == visited[512]


def read(visits, b: int, k: int, i: int) -> list[int]:
    """The columns of one row, from `index`, and from `runs` where they are there."""
    b, k = min(b, visits.count.shape[0] - 1), min(k, visits.count.shape[1] - 1)
    columns = [int(j) for j in visits.index[b, k, i, : visits.count[b, k, i]]]
    if visits.runs is not None:
        assert columns == [j for start, stop in visits.runs[b, k, i] for j in range(start, stop)]
    return columns


def assert_plan_is_codes(p: Plan, codes: np.ndarray) -> None:
    for b in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            for i in range(codes.shape[2]):
                assert read(p.partial, b, k, i) == np.flatnonzero(codes[b, k, i] == PARTIAL).tolist()
                assert read(p.full, b, k, i) == np.flatnonzero(codes[b, k, i] == FULL).tolist()


def clipped(codes: np.ndarray, S: int, block_k: int) -> np.ndarray:
    if S % block_k:
        codes = codes.copy()
        codes[..., -1] = np.minimum(codes[..., -1], PARTIAL)
    return codes


@given(expressions(), SIZES)
def test_plan_lists_each_tile_once_and_its_transpose_the_same_tiles(mask, sizes):
    codes = clipped(tile_codes(mask, *sizes), *sizes[1::2])
    p = plan(mask, *sizes)
    assert_plan_is_codes(p, codes)
    assert_plan_is_codes(p.transpose(), codes.swapaxes(-1, -2))
    assert p.visited == (codes != EMPTY).sum()


@settings(max_examples=8)
@given(expressions(), SIZES)
def test_plan_of_traced_leaves_lists_the_same_tiles(mask, sizes):
    def traced(mask):
        p = plan(mask, *sizes)
        back = p.transpose()
        return [(x.count, x.index) for x in (p.partial, p.full, back.partial, back.full)], p.codes

    visits, codes = jax.jit(traced)(mask)
    codes = np.asarray(codes)
    kinds, back = (PARTIAL, FULL) * 2, codes.swapaxes(-1, -2)
    for (count, index), kind, seen in zip(visits, kinds, (codes, codes, back, back), strict=True):
        assert count.dtype == index.dtype == np.int32
        for row in np.ndindex(count.shape):
            assert index[row][: count[row]].tolist() == np.flatnonzero(seen[row] == kind).tolist()


def test_causal_plan_by_hand():
    p = plan(Causal(), 8, 8, 2, 4)
    np.testing.assert_array_equal(p.codes[0, 0], [[1, 0], [1, 0], [2, 1], [2, 1]])
    np.testing.assert_array_equal(p.partial.count[0, 0], [1, 1, 1, 1])
    np.testing.assert_array_equal(p.partial.index[0, 0], [[0], [0], [1], [1]])
    np.testing.assert_array_equal(p.full.count[0, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(p.full.runs[0, 0], [[[0, 0]], [[0, 0]], [[0, 1]], [[0, 1]]])
    back = p.transpose()
    np.testing.assert_array_equal(back.partial.runs[0, 0], [[[0, 2]], [[2, 4]]])
    np.testing.assert_array_equal(back.full.runs[0, 0], [[[2, 4]], [[0, 0]]])


def test_full_tiles_that_the_last_key_cuts_are_partial():
    p = plan(Full(), 5, 5, 4, 4)
    np.testing.assert_array_equal(p.codes[0, 0], [[FULL, PARTIAL], [FULL, PARTIAL]])
    np.testing.assert_array_equal(plan(Full(), 5, 8, 4, 4).codes[0, 0], [[FULL, FULL], [FULL, FULL]])


def test_entries_after_the_count_repeat_the_last_column():
    p = plan(strided(4), 32, 32, 4, 4)
    for visits in (p.partial, p.full):
        for row in np.ndindex(visits.count.shape):
            count, index = visits.count[row], visits.index[row]
            assert (index[count:] == index[max(count - 1, 0)]).all()
            assert ((index >= 0) & (index < 8)).all()


def test_ranges_are_left_out_where_there_are_more_than_two():
    assert plan(Causal(), 64, 64, 8, 8).full.runs.shape[-2:] == (1, 2)
    assert plan(Window(20, 20), 64, 64, 8, 8).partial.runs.shape[-2:] == (2, 2)
    assert plan(Dilated(16), 64, 64, 2, 2).partial.runs is None


def test_heads_of_a_group_share_the_union_of_their_tiles():
    heads = [picture for picture in np.random.default_rng(0).random((4, 8, 8)) < 0.15]
    heads[0][:4, :4] = heads[1][:4, :4] = True
    heads[2][:4, :4], heads[3][:4, :4] = True, False
    mask = Dense(np.stack(heads))
    exact = brute_codes(mask, 8, 8, 4, 4)
    p = plan(mask, 8, 8, 4, 4, num_groups=2)
    assert p.codes.shape == (1, 2, 2, 2)
    for k in range(2):
        pair = exact[0, 2 * k : 2 * k + 2]
        np.testing.assert_array_equal(p.codes[0, k] == EMPTY, (pair == EMPTY).all(0))
        np.testing.assert_array_equal(p.codes[0, k] == FULL, (pair == FULL).all(0))
    assert p.codes[0, 0, 0, 0] == FULL
    assert p.codes[0, 1, 0, 0] == PARTIAL


def test_traced_segments_and_lengths_skip_what_they_can():
    ids = jnp.arange(64)[None] // 16
    codes = np.asarray(
        jax.jit(lambda mask: tile_codes(mask, 64, 64, 8, 8))(SegmentIds(ids) & Lengths(key=jnp.array([40])))
    )
    exact = brute_codes(SegmentIds(np.asarray(ids)) & Lengths(key=40), 64, 64, 8, 8)
    np.testing.assert_array_equal(codes, exact)


@pytest.mark.parametrize("offset", [-9, -3, 3, 4, 9])
def test_tiles_beyond_an_array_are_never_full(offset):
    for mask in (SegmentIds(np.zeros(8, int)), Dense(np.ones((8, 8), bool))):
        shifted = mask.shift(offset)
        exact = brute_codes(shifted, 8, 8, 4, 4)
        assert ((exact == FULL) | (tile_codes(shifted, 8, 8, 4, 4) != FULL)).all()
        assert_never_wrong(shifted, jax.jit(lambda mask: tile_codes(mask, 8, 8, 4, 4))(shifted), (8, 8, 4, 4))


def test_a_mask_that_defines_no_tiles_has_them_all_visited_and_masked():
    class Unknown(Mask):
        def allows(self, t, s, take=None):
            return (t * s) % 2 == 0

    assert (tile_codes(Unknown(), 8, 8, 4, 4) == PARTIAL).all()
    assert (tile_codes(Unknown() & Causal(), 8, 8, 4, 4)[0, 0] == [[PARTIAL, EMPTY], [PARTIAL, PARTIAL]]).all()


def test_a_long_sequence_is_planned_without_its_pairs():
    T = 1 << 20
    p = plan(sliding_window(4096) & Dilated(2), T, T, 1024, 1024)
    assert p.visited == 1024 + 1023 + 1022 + 1021 + 1020


@settings(max_examples=200)
@given(expressions(), st.integers(1, 12), st.integers(1, 20))
def test_a_key_that_no_query_reads_is_never_overlooked(mask, T, S):
    if reads_every_key(mask, T, S):
        assert np.asarray(mask.to_array(T, S)).any(-2).all()


@pytest.mark.parametrize(
    ("mask", "T", "S", "known"),
    [
        (Full(), 1, 9, True),
        (Causal(), 9, 9, True),
        (Causal(), 9, 5, True),
        (Causal(4), 5, 9, True),
        (Window(2, 0), 300, 300, True),
        (longformer(3, 1), 20, 20, True),
        (Causal(), 5, 9, False),
        (Causal(-1), 9, 9, False),
        (Lengths(None, 4), 9, 9, False),
        (Causal(np.array([0])), 9, 9, False),
    ],
    ids=str,
)
def test_the_usual_masks_are_known_to_read_every_key(mask, T, S, known):
    assert reads_every_key(mask, T, S) is known
