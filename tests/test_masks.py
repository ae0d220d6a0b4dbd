"""The mask algebra: every formula against a hand-drawn picture and against its definition, pair by pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expressions import B, N, expressions
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import jaxattn
from jaxattn import (
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
    masks,
)


def picture(text: str) -> np.ndarray:
    return np.array([[x == "#" for x in line] for line in text.split()])


def pairs(formula, T: int, S: int) -> np.ndarray:
    """A definition evaluated one pair at a time, on Python numbers."""
    return np.array([[bool(formula(t, s)) for s in range(S)] for t in range(T)])


def whole(mask: Mask, T: int, S: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(mask.to_array(T, S)), (B, N, T, S))


def test_window_of_two_on_each_side_of_eight_tokens():
    drawn = """
    ###.....
    ####....
    #####...
    .#####..
    ..#####.
    ...#####
    ....####
    .....###
    """
    np.testing.assert_array_equal(Window(2, 2).to_array(8, 8), picture(drawn))
    assert Window(2, 2).show(8, 8).split() == drawn.split()


def test_stride_three_on_nine_tokens_lets_token_one_attend_one_four_seven():
    drawn = """
    #..#..#..
    .#..#..#.
    ..#..#..#
    #..#..#..
    .#..#..#.
    ..#..#..#
    #..#..#..
    .#..#..#.
    ..#..#..#
    """
    allowed = Dilated(3).to_array(9, 9)
    np.testing.assert_array_equal(allowed, picture(drawn))
    assert np.flatnonzero(allowed[1]).tolist() == [1, 4, 7]


def test_causal_is_top_left_and_its_offset_spells_every_other_alignment():
    top_left = """
    #....
    ##...
    ###..
    """
    bottom_right = """
    ###..
    ####.
    #####
    """
    np.testing.assert_array_equal(Causal().to_array(3, 5), picture(top_left))
    np.testing.assert_array_equal(Causal(offset=5 - 3).to_array(3, 5), picture(bottom_right))
    np.testing.assert_array_equal(Causal(offset=-2).to_array(3, 3), picture("... ... #.."))


def test_combination_drawn_by_hand():
    mask = (Causal() & Window(1, None)) | Global([0]) | ~Lengths(query=4)
    drawn = """
    #####
    ##...
    ###..
    #.##.
    #####
    """
    np.testing.assert_array_equal(mask.to_array(5, 5), picture(drawn))


def test_arrays_differ_per_batch_element_and_head():
    dense = np.random.default_rng(0).random((2, 3, 4, 5)) < 0.5
    np.testing.assert_array_equal(Dense(dense).to_array(4, 5), dense)
    np.testing.assert_array_equal(Dense(dense[0]).to_array(4, 5), dense[:1])
    ids = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    drawn = [picture("##.. ##.. ..## ..##"), picture("#... .### .### .###")]
    np.testing.assert_array_equal(SegmentIds(ids).to_array(4, 4), np.stack(drawn)[:, None])
    np.testing.assert_array_equal(
        Lengths(query=np.array([1, 3]), key=np.array([3, 2])).to_array(3, 3)[:, 0],
        np.stack([picture("###\n...\n..."), picture("##.\n##.\n##.")]),
    )
    np.testing.assert_array_equal(
        Causal(offset=np.array([0, 2])).to_array(2, 3)[:, 0], np.stack([picture("#.. ##."), picture("### ###")])
    )


@pytest.mark.parametrize(
    ("mask", "formula"),
    [
        (Full(), lambda t, s: True),
        (Causal(), lambda t, s: s <= t),
        (Causal(-3), lambda t, s: s <= t - 3),
        (Window(3, 1), lambda t, s: t - 3 <= s <= t + 1),
        (Window(None, 2), lambda t, s: s <= t + 2),
        (Window(-1, 4), lambda t, s: t + 1 <= s <= t + 4),
        (Window(1, -3), lambda t, s: False),
        (Dilated(1), lambda t, s: True),
        (Dilated(4), lambda t, s: (t - s) % 4 == 0),
        (Global(2), lambda t, s: t < 2 or s < 2),
        (Global([7, 1, 8, 1]), lambda t, s: t in (1, 7, 8) or s in (1, 7, 8)),
        (Global(()), lambda t, s: False),
        (Lengths(5, 7), lambda t, s: t < 5 and s < 7),
        (Lengths(key=3), lambda t, s: s < 3),
        (Blocks(Causal(), 4), lambda t, s: s // 4 <= t // 4),
        (Blocks(Window(0, 0), 5), lambda t, s: s // 5 == t // 5),
        (Window(2, 2).shift(3), lambda t, s: abs(t + 3 - s) <= 2),
        (Blocks(Causal(), 4).shift(-6), lambda t, s: s // 4 <= (t - 6) // 4),
        (Global([1]).shift(-2), lambda t, s: t - 2 == 1 or s == 1),
    ],
    ids=lambda x: "" if callable(x) else str(x),
)
@pytest.mark.parametrize(("T", "S"), [(13, 11), (1, 17), (17, 1)])
def test_mask_is_its_formula(mask, formula, T, S):
    np.testing.assert_array_equal(mask.to_array(T, S), pairs(formula, T, S))


def lowbias32(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize(("block", "count", "seed"), [(3, 2, 0), (1, 1, 7), (4, 0, 1), (2, 5, 123456789)])
def test_random_blocks_are_the_hash_of_seed_query_block_and_draw(block, count, seed):
    T, S = 17, 23
    num_blocks = -(-S // block)

    def formula(t, s):
        counters = [(t // block * 0x9E3779B9 + seed * 0x85EBCA6B + r) % 2**32 for r in range(count)]
        return s // block in [lowbias32(x) % num_blocks for x in counters]

    mask = RandomBlocks(block, count, num_blocks, seed)
    np.testing.assert_array_equal(mask.to_array(T, S), pairs(formula, T, S))
    traced = jax.jit(mask.allows)(np.arange(T)[:, None], np.arange(S)[None])
    np.testing.assert_array_equal(traced, pairs(formula, T, S))


def test_random_blocks_are_spread_evenly_and_differ_by_seed():
    draws = [RandomBlocks(1, 1, 16, seed).to_array(4096, 16) for seed in (0, 1)]
    for drawn in draws:
        assert drawn.sum(0).min() > 200
        assert drawn.sum(0).max() < 320  # 256 each, standard deviation 15.5
    assert 0.03 < (draws[0] & draws[1]).sum() / 4096 < 0.1  # 1 in 16


@given(expressions(), expressions(), st.sampled_from([(9, 12), (12, 5), (1, 9)]))
def test_expressions_combine_as_boolean_arrays_do(a, b, lengths):
    x, y = whole(a, *lengths), whole(b, *lengths)
    np.testing.assert_array_equal(whole(a & b, *lengths), x & y)
    np.testing.assert_array_equal(whole(a | b, *lengths), x | y)
    np.testing.assert_array_equal(whole(~a, *lengths), ~x)
    np.testing.assert_array_equal(whole(~(a & ~b), *lengths), whole(~a | b, *lengths))


@given(expressions(static=True), st.integers(0, 6), st.sampled_from([(9, 12), (12, 5)]))
def test_shift_is_the_mask_of_later_queries(mask, offset, lengths):
    T, S = lengths
    later = whole(mask, T + offset, S)[:, :, offset:]
    np.testing.assert_array_equal(whole(mask.shift(offset), T, S), later)
    np.testing.assert_array_equal(whole(mask.shift(np.int32(offset)), T, S), later)
    offsets = np.array([offset, 0])
    both = whole(mask.shift(offsets), T, S)
    np.testing.assert_array_equal(both[0], later[0])
    np.testing.assert_array_equal(both[1], whole(mask, T, S)[1])


@given(expressions(), st.sampled_from([(9, 12), (12, 5)]))
def test_indices_may_be_scattered_and_of_four_dimensions(mask, lengths):
    T, S = lengths
    rng = np.random.default_rng(0)
    t, s = rng.integers(0, T, (B, N, 3, 1)), rng.integers(0, S, (1, N, 1, 4))
    allowed = np.broadcast_to(mask.allows(t, s), (B, N, 3, 4))
    b, n = np.arange(B)[:, None, None, None], np.arange(N)[None, :, None, None]
    np.testing.assert_array_equal(allowed, whole(mask, T, S)[b, n, t, s])


@jax.jit
def attend(mask, x):
    return jaxattn.dot_product_attention(x, x, x, mask=mask, implementation="naive")


T_NARROW, S_NARROW = np.arange(9)[:, None], np.arange(5)[None, :]
X = np.random.default_rng(0).standard_normal((B, 8, N, 4), np.float32)


@settings(max_examples=10)
@given(expressions())
def test_expressions_mean_the_same_when_traced(mask):
    traced = jax.jit(lambda mask, t, s: mask.allows(t, s))
    expected = mask.allows(T_NARROW, S_NARROW)
    np.testing.assert_array_equal(traced(mask, T_NARROW, S_NARROW), expected)


def test_leaves_may_be_traced_and_change_without_a_new_compilation():
    traces = []

    @jax.jit
    def run(mask):
        traces.append(mask)
        return mask.to_array(8, 8)

    for offset in (0, 3):
        ids = jnp.array([[0, 0, 0, 1, 1, 2, 2, 2]] * B) + offset
        mask = (Causal(jnp.array([offset, 1])) | SegmentIds(ids)).shift(jnp.int32(offset)) & Lengths(key=jnp.int32(6))
        np.testing.assert_array_equal(run(mask), mask.to_array(8, 8))
    assert len(traces) == 1


def test_equal_masks_share_one_compilation_and_different_ones_do_not():
    traces = []

    @jax.jit
    def by_argument(mask):
        traces.append(mask)
        return mask.to_array(4, 4)

    def make(left):
        return (Causal() & Window(left, None)) | ~Global([1]).shift(2)

    by_argument(make(2))
    by_argument(make(np.int64(2)))
    assert len(traces) == 1
    by_argument(make(3))
    assert len(traces) == 2

    static = jax.jit(lambda mask: traces.append(mask) or mask.to_array(4, 4), static_argnums=0)
    static(make(2)), static(make(2))
    assert len(traces) == 3
    assert make(2) == make(2)
    assert hash(make(2)) == hash(make(2))
    assert make(2) != make(3)
    assert Causal() != Window(None, 0)
    assert len({make(2), make(2), make(3)}) == 2


def test_masks_with_arrays_are_equal_only_to_themselves():
    mask = Causal(np.array([1, 2]))
    assert mask == mask
    assert mask != Causal(np.array([1, 2]))
    assert len({mask, mask}) == 1


def test_vmap_over_leaves_equals_one_mask_at_a_time():
    stacked = Causal() & (SegmentIds(np.arange(24).reshape(3, 8) // 3) | Lengths(key=np.array([0, 2, 8])))
    alone = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)]
    together, outputs = jax.jit(jax.vmap(lambda mask: (mask.to_array(8, 8), attend(mask, X))))(stacked)
    for i, mask in enumerate(alone):
        np.testing.assert_array_equal(together[i], mask.to_array(8, 8))
        assert_close(outputs[i], attend(mask, X))


def test_vmap_over_a_batched_offset_and_queries_together():
    offsets = jnp.array([[0, 3], [2, 1], [5, 5]])
    xs = jnp.stack([X, X + 1, X * 2])
    outputs = jax.jit(jax.vmap(lambda offset, x: attend(Causal(offset), x)))(offsets, xs)
    for i in range(3):
        assert_close(outputs[i], attend(Causal(offsets[i]), xs[i]))


def test_gradients_flow_past_integer_leaves():
    gradient = jax.jit(jax.grad(lambda x, mask: (attend(mask, x) ** 2).sum(), argnums=(0, 1), allow_int=True))
    mask = Causal(np.array([0, 2])) & SegmentIds(np.array([0] * 4 + [1] * 4))
    d_x, d_mask = gradient(X, mask)
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(d_mask))
    assert_close(d_x, gradient(X, Dense(mask.to_array(8, 8)))[0], "gradient")


def test_a_mask_is_a_carry_and_a_sequence_of_scan():
    lengths = Lengths(key=jnp.array([1, 4, 8]))

    def step(carry, mask):
        return Causal(carry.offset + 1), (carry & mask).to_array(8, 8)

    last, seen = jax.lax.scan(step, Causal(jnp.int32(0)), lengths)
    assert int(last.offset) == 3
    for i, length in enumerate((1, 4, 8)):
        np.testing.assert_array_equal(seen[i], (Causal(i) & Lengths(key=length)).to_array(8, 8))


@given(expressions())
def test_pytree_round_trip_keeps_the_mask(mask):
    leaves, tree = jax.tree.flatten(mask)
    assert mask.is_static == (not leaves)
    np.testing.assert_array_equal(whole(jax.tree.unflatten(tree, leaves), 9, 5), whole(mask, 9, 5))


def test_a_mask_of_ones_own_needs_one_formula():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Odd(Mask):
        def allows(self, t, s, take=masks.gather):
            return (t + s) % 2 == 1

    mask = Odd() & Causal(1)
    np.testing.assert_array_equal(mask.to_array(5, 5), pairs(lambda t, s: (t + s) % 2 and s <= t + 1, 5, 5))
    for implementation in ("naive", jaxattn.Blockwise(4, 3)):
        run = jax.jit(
            lambda x, implementation=implementation: jaxattn.dot_product_attention(
                x, x, x, mask=mask, implementation=implementation
            )
        )
        assert_close(run(X), attend(Dense(mask.to_array(8, 8)), X))


def test_statistics_of_causal_on_four_by_four_tiles():
    stats = Causal().stats(16, 16, block=4)
    expected = dict(empty=6, partial=4, full=6, density=136 / 256, visited=10 / 16, flops_saved=6 / 16)
    assert stats == pytest.approx(expected)


def test_statistics_average_over_the_batch_and_take_uneven_tiles():
    stats = Lengths(key=jnp.array([0, 6])).stats(1500, 8, block=(1000, 4))
    expected = dict(empty=4, partial=2, full=2, density=6 / 16, visited=0.5, flops_saved=0.5)
    assert stats == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(1.5, 0), "Window left=1.5 must be an int from -2**30 to 2**30"),
        (lambda: Window(2**40, 0), "Window left=1099511627776 must be an int from"),
        (lambda: Window(True, 0), "Window left=True must be an int"),
        (lambda: Dilated(0), "Dilated stride=0 must be an int from 1 to"),
        (lambda: Global(-1), "Global tokens=-1 must be an int from 0 to"),
        (lambda: Global([1, "a"]), "Global token='a' must be an int from 0"),
        (lambda: RandomBlocks(0, 1, 1), "RandomBlocks block=0 must be an int from 1"),
        (lambda: Causal("x"), "offset='x' must be an int from -2**30 to 2**30, or an integer array of shape [] or [B]"),
        (lambda: Causal(np.zeros(2)), "integer array of shape [] or [B], got float64[2]"),
        (lambda: Causal(np.zeros((2, 2), int)), "got int64[2, 2]"),
        (lambda: Full().shift(0.5), "offset=0.5 must be an int"),
        (lambda: Lengths(key="a"), "Lengths key='a' must be an int"),
        (lambda: SegmentIds(np.zeros(3)), "SegmentIds query must be an integer array of shape [length] or [B, length]"),
        (lambda: SegmentIds(3), "got int64[]"),
        (lambda: Dense(np.zeros((2, 2))), "Dense array must be boolean with 2 to 4 dimensions"),
        (lambda: Dense(np.zeros(2, bool)), "got bool[2]"),
        (lambda: Blocks(Causal(), 0), "Blocks size=0 must be an int from 1"),
    ],
)
def test_wrong_numbers_say_what_would_be_right(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_arrays_and_truth_values_are_refused_with_the_remedy():
    for combine in (
        lambda: Causal() & np.ones((2, 2), bool),
        lambda: np.ones((2, 2), bool) & Causal(),
        lambda: Causal() | jnp.ones((2, 2), bool),
        lambda: Blocks(np.ones((2, 2), bool), 2),
    ):
        with pytest.raises(TypeError, match=r"ndarray|wrap a boolean array in Dense"):
            combine()
    with pytest.raises(TypeError, match="wrap a boolean array in Dense"):
        Causal() & True
    with pytest.raises(TypeError, match=r"combine masks with & \| ~"):
        Causal() and Window(1, 1)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Causal(np.arange(3)), "Causal offset has shape [3], but must fit [B=2]"),
        (SegmentIds(np.zeros((3, 8), int)), "SegmentIds query has shape [3, 8], but must fit [B=2, T=8]"),
        (SegmentIds(np.zeros(8, int), np.zeros(7, int)), "SegmentIds key has shape [7], but must fit [S=8]"),
        (Dense(np.ones((1, 3, 8, 8), bool)), "Dense array has shape [1, 3, 8, 8], but must fit [B=2, N=2, T=8, S=8]"),
        (Full() | ~Lengths(key=np.arange(5)), "Lengths key has shape [5], but must fit [B=2]"),
        (SegmentIds(np.zeros(9, int), np.zeros(7, int)).shift(1), "SegmentIds key has shape [7]"),
        (Blocks(SegmentIds(np.zeros(3, int)), 4), "SegmentIds query has shape [3], but must fit [T=2]"),
    ],
)
def test_arrays_that_do_not_fit_the_call_are_named(mask, message):
    with pytest.raises(ValueError) as error:
        attend(mask, X)
    assert message in str(error.value)


def test_arrays_that_fit_below_a_shift_or_blocks_are_accepted():
    ids = np.arange(12) // 3
    shifted = SegmentIds(ids, ids[:8]).shift(4)
    np.testing.assert_array_equal(shifted.to_array(8, 8), pairs(lambda t, s: ids[t + 4] == ids[s], 8, 8))
    blocked = Blocks(SegmentIds(np.array([0, 0, 1])), 3)
    np.testing.assert_array_equal(blocked.to_array(8, 8), pairs(lambda t, s: (t < 6) == (s < 6), 8, 8))
    for mask in (shifted, blocked):
        assert attend(mask, X).shape == X.shape


def test_indices_outside_an_array_attend_nothing():
    ids = SegmentIds(np.array([0, 0, 0, 0]))
    np.testing.assert_array_equal(ids.shift(2).to_array(4, 4), pairs(lambda t, s: t < 2, 4, 4))
    np.testing.assert_array_equal(ids.shift(-1).to_array(4, 4), pairs(lambda t, s: t > 0, 4, 4))
    dense = Dense(np.ones((4, 4), bool))
    np.testing.assert_array_equal(dense.shift(3).to_array(4, 4), pairs(lambda t, s: t < 1, 4, 4))
