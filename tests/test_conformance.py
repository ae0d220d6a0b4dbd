"""Every implementation gives what float64 gives, for every argument: outputs, log-sum-exp and gradients."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_close

from bench import conformance, conformance_cases
from bench.conformance import compute_jax
from bench.conformance_cases import Case, cover, grid, inputs
from jaxattn import Blockwise, Causal, Triton, dot_product_attention, merge, online_softmax, tiles
from jaxattn.impl import base, blockwise, naive
from jaxattn.impl.triton import Tiling

oracle = pytest.importorskip("oracle.attention")

# Blocks that divide nothing: tiles of every kind, and rows and keys that the last ones cut. naive is listed twice
# to be drawn as often as both blockwise: it compiles in half their time.
TILED = Blockwise(block_q=40, block_k=56)
IMPLEMENTATIONS = {"naive": "naive", "blockwise": "blockwise", "blockwise 40x56": TILED}
DRAWN = ("naive", *IMPLEMENTATIONS)
_SMALL = Tiling(16, 16, 4, 1)
INTERPRETED = Triton(block_q=16, block_k=16, dq=_SMALL, dkv=_SMALL, interpret=True)


def compute(case: Case, implementation):
    """The inputs, and outputs and gradients by name, twice; keys that nothing may attend hold NaN."""
    x = inputs(case)
    hole = ~x.attended[:, :, None, None]
    k, v = (np.where(hole, np.nan, array).astype(array.dtype) for array in (x.k, x.v))

    def attend(q, k, v, bias, **arguments):
        return dot_product_attention(
            q, k, v, bias, scale=x.scale, logits_soft_cap=x.soft_cap, implementation=implementation,
            return_residual=True, **arguments,
        )  # fmt: skip

    return x, *compute_jax(attend, dataclasses.replace(x, k=k, v=v), runs=2)


def assert_conforms(case: Case, implementation=None) -> None:
    x, results, again = compute(case, implementation or IMPLEMENTATIONS[case.implementation])
    targets = oracle.accuracy_bound(
        x.q, x.k, x.v, x.bias, x.allowed, scale=x.scale, logits_soft_cap=x.soft_cap, cotangent=x.d_out,
        lse_cotangent=x.d_lse,
    )  # fmt: skip
    assert_accurate(results, targets, case)
    for name, result in results.items():
        if result is not None:
            assert result.tobytes() == again[name].tobytes(), f"{case}: {name} differs between two runs"
    assert (results["out"][x.empty] == 0).all()
    assert (results["lse"][x.empty] == -np.inf).all()
    assert (results["dq"][x.empty] == 0).all()
    assert (results["dk"][~x.attended] == 0).all()
    assert (results["dv"][~x.attended] == 0).all()


CASES = cover(DRAWN)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_implementation_is_as_accurate_as_torch_and_exact_where_nothing_may_be_attended(case):
    assert_conforms(case)


def test_the_cases_cover_every_two_values_and_are_at_least_three_hundred():
    assert len(set(CASES)) == len(CASES) >= 300
    axes = {"implementation": tuple(IMPLEMENTATIONS), **conformance_cases.AXES}
    for a in axes:
        for b in axes:
            met = {(getattr(case, a), getattr(case, b)) for case in CASES}
            wanted = {(x, y) for x in axes[a] for y in axes[b] if conformance_cases.possible({a: x, b: y})}
            assert a == b or met == wanted, f"{a} and {b}: {wanted - met}"


def sample(cases: list[Case], count: int) -> list[Case]:
    """Cases that show, one after the other, the most values that none before them has shown."""
    chosen, shown = [], set()
    for _ in range(count):
        best = max(cases, key=lambda case: len(set(dataclasses.astuple(case)) - shown))
        chosen.append(best)
        shown |= set(dataclasses.astuple(best))
    return chosen


SMALL = [case for case in cover(("triton",)) if max(case.lengths) <= 64 and case.dtype != "float64"]
SAMPLE = sample(SMALL, 9)


def test_the_sample_for_interpreted_kernels_has_every_head_dim_and_kind_of_logits():
    for axis in ("head_dim", "value_dim", "logits", "heads"):
        assert {getattr(case, axis) for case in SAMPLE} == set(conformance_cases.AXES[axis]), axis
    assert len({case.mask for case in SAMPLE}) == len(SAMPLE)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_interpreted_kernels_pass_a_sample_of_the_same_cases(case):
    assert_conforms(case, INTERPRETED)


def masking_with(fill, clear=True):
    """`_Groups.cut` that writes `fill` where nothing may be attended, and may leave what unattended keys hold."""
    cut = blockwise._Groups.cut

    def wrong(self, b, k, i, j, logits, *key_tiles):
        masked, *cleared = cut(self, b, k, i, j, logits, *key_tiles)
        masked = jnp.where(masked == -jnp.inf, logits if fill is None else fill, masked)
        return masked, *(cleared if clear else key_tiles)

    return wrong


def trembling(logits, cap):
    """The logits, their last bits different from run to run."""
    factor = jax.pure_callback(lambda: np.float32(1 + 2.0**-23 * next(_runs)), jax.ShapeDtypeStruct((), "float32"))
    return _soft_cap(logits, cap) * factor


_runs = itertools.count()
_causal, _codes, _soft_cap = Causal.allows, tiles.tile_codes, base.soft_cap
_tiles, _backward = blockwise._Groups.tiles, blockwise._backward

# fault: (what it is planted in, its name there, the wrong thing, an implementation, a mask or kind of logits)
FAULTS = {
    "an accumulator that is not rescaled": (online_softmax, "rescale", lambda o, factor: o, "blockwise 40x56", "none"),
    "a causal mask that is off by one": (
        Causal, "allows", lambda self, t, s, take=None: _causal(self, t - 1, s), "naive", "is_causal",
    ),
    "logits a thousandth too large": (
        naive, "soft_cap", lambda logits, cap: _soft_cap(1.001 * logits, cap), "naive", "none",
    ),
    "results that differ from run to run": (naive, "soft_cap", trembling, "naive", "none"),
    "a tile of keys that is not visited": (
        tiles, "tile_codes", lambda *a: _codes(*a) * (np.arange(-(-a[2] // a[4])) != 1), "blockwise 40x56", "none",
    ),
    "partial tiles that are not masked": (blockwise._Groups, "cut", masking_with(None), "blockwise 40x56", "dilated"),
    "NaN that leaks from keys that nothing may attend": (
        blockwise._Groups, "cut", masking_with(-np.inf, clear=False), "blockwise 40x56", "key lengths",
    ),
    "a mean over masked keys where a query may attend nothing": (
        blockwise._Groups, "cut", masking_with(-1e9), "blockwise 40x56", "array of heads",
    ),
    "query heads that read another head's keys": (
        blockwise._Groups, "tiles", lambda self, array, b, k: _tiles(self, array, b, (k + 1) % self.K),
        "blockwise 40x56", "none",
    ),
    "a gradient without the rows' mean": (
        blockwise, "_backward", lambda *args: _backward(*args[:-4], jnp.zeros_like(args[-4]), *args[-3:]),
        "blockwise 40x56", "none",
    ),
    "a bias without gradient": (
        blockwise._Groups, "add_bias_tile", lambda self, d_bias, *tile: d_bias, "blockwise 40x56", "bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_the_cases(fault, monkeypatch):
    owner, name, wrong, implementation, value = FAULTS[fault]
    chosen = [
        case
        for case in CASES
        if case.implementation == implementation
        and value in (case.mask, case.logits)
        and min(case.lengths) > 8
        and (implementation == "naive" or case.lengths[1] > TILED.block_k)
    ]
    case = min(chosen, key=lambda case: (case.heads[0] == 1, case.lengths[0] * case.lengths[1], case.head_dim))
    right = IMPLEMENTATIONS[implementation]
    right = naive.Naive() if right == "naive" else right
    # A class of its own, so that nothing compiled for the right one is taken, nor this for the right one.
    faulty = type("Faulty", (type(right),), {})(**vars(right))
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        assert_conforms(case, faulty)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in cover(("triton",)) if case.dtype != "float64"], ids=str)
def test_kernels_pass_the_same_cases_natively(case):
    assert_conforms(case, Triton())


@pytest.mark.grid
@pytest.mark.parametrize("mask", conformance_cases.MASKS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_combination_of_the_axes(implementation, mask):
    for case in grid((implementation,)):
        if case.mask == mask:
            assert_conforms(case)


@pytest.mark.parametrize("ours", [True, False])
def test_the_command_fails_where_one_of_ours_is_wrong_or_crashes_and_only_there(ours, monkeypatch, capsys):
    naive, known = conformance.jaxattn("naive"), {}

    def right(x):
        if x.q.tobytes() not in known:
            known[x.q.tobytes()] = naive(x)
        return known[x.q.tobytes()]

    cases = [case for case in CASES if case.lengths == (17, 64) and case.dtype == "float32"][:2]
    monkeypatch.setattr(conformance, "cover", lambda implementations: cases)

    def doubled(x):
        return right(x) | {"out": 2 * np.asarray(right(x)["out"])}

    def crashing(x):
        raise TypeError("a crash")

    peers = {"right": right, "doubled": doubled, "crashing": crashing}
    found = {}
    for name, run in peers.items():
        monkeypatch.setattr(conformance, "PEERS", {name: conformance.Peer(run, "jax", ours=ours)})
        found[name] = conformance.main([])
        printed = capsys.readouterr().out
        assert ("wrong" in printed) == (name == "doubled" or (name == "crashing" and ours)), printed
    assert found == {"right": 0, "doubled": int(ours), "crashing": int(ours)}


# Properties: shapes from a small set, so that hypothesis' examples share a few compilations.
PROPERTY_SHAPES = st.sampled_from([(7, 13), (16, 16)])
NARROW = Blockwise(block_q=4, block_k=6)
SEEDS = st.integers(0, 10**6)


@functools.partial(jax.jit, static_argnames=("implementation", "is_causal", "local_window_size"))
def attend(q, k, v, bias=None, mask=None, implementation="naive", is_causal=False, local_window_size=None):
    return dot_product_attention(
        q, k, v, bias, mask, is_causal=is_causal, local_window_size=local_window_size,
        implementation=implementation, return_residual=True,
    )  # fmt: skip


def operands(seed, T, S, N=4, K=2, H=8):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))], rng


@pytest.mark.parametrize("implementation", ["naive", NARROW], ids=str)
class TestProperties:
    @settings(max_examples=10)
    @given(SEEDS, PROPERTY_SHAPES)
    def test_permuting_keys_with_their_values_changes_nothing(self, implementation, seed, lengths):
        (q, k, v), rng = operands(seed, *lengths)
        mask, order = rng.random((2, 1, *lengths)) < 0.5, rng.permutation(lengths[1])
        expected = attend(q, k, v, mask=mask, implementation=implementation)
        permuted = attend(q, k[:, order], v[:, order], mask=mask[..., order], implementation=implementation)
        assert_close(permuted, expected)

    @settings(max_examples=5)
    @given(SEEDS, PROPERTY_SHAPES)
    def test_a_window_as_long_as_the_sequence_is_full_attention(self, implementation, seed, lengths):
        (q, k, v), _ = operands(seed, *lengths)
        longest = max(lengths)
        windowed = attend(q, k, v, implementation=implementation, local_window_size=(longest, longest))
        assert_close(windowed, attend(q, k, v, implementation=implementation))

    @settings(max_examples=5)
    @given(SEEDS, PROPERTY_SHAPES)
    def test_grouped_heads_are_repeated_heads(self, implementation, seed, lengths):
        (q, k, v), _ = operands(seed, *lengths)
        repeated = attend(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2), is_causal=True, implementation=implementation)
        assert_close(attend(q, k, v, is_causal=True, implementation=implementation), repeated)

    @settings(max_examples=5)
    @given(SEEDS, PROPERTY_SHAPES)
    def test_attention_over_two_sets_of_keys_merges_to_attention_over_both(self, implementation, seed, lengths):
        (q, k, v), rng = operands(seed, *lengths)
        first = rng.random((1, 1, 1, lengths[1])) < 0.5
        parts = [attend(q, k, v, mask=mask, implementation=implementation) for mask in (first, ~first)]
        assert_close(merge(*parts[0], *parts[1]), attend(q, k, v, implementation=implementation))

    @settings(max_examples=5)
    @given(SEEDS, PROPERTY_SHAPES, st.sampled_from([-50.0, 8.0, 300.0]))
    def test_a_shifted_row_of_logits_shifts_its_log_sum_exp_alone(self, implementation, seed, lengths, shift):
        (q, k, v), rng = operands(seed, *lengths)
        rows = np.float32(shift * rng.integers(0, 2, (2, 1, lengths[0], 1)))
        out, lse = attend(q, k, v, bias=rows, implementation=implementation)
        expected_out, expected_lse = attend(q, k, v, bias=0 * rows, implementation=implementation)
        # The shift costs the logits bits: an error of u * shift in each becomes one of the weights.
        np.testing.assert_allclose(out, expected_out, atol=4 * 2**-24 * (32 + abs(shift)))
        assert_close(lse, expected_lse + rows[:, 0])

    @settings(max_examples=10)
    @given(SEEDS, PROPERTY_SHAPES, st.integers(0, 15))
    def test_causal_outputs_do_not_depend_on_the_future(self, implementation, seed, lengths, present):
        (q, k, v), rng = operands(seed, *lengths)
        changed_k, changed_v = k.copy(), v.copy()
        changed_k[:, present + 1 :], changed_v[:, present + 1 :] = 1e4, -1e4
        before = attend(q, k, v, is_causal=True, implementation=implementation)
        after = attend(q, changed_k, changed_v, is_causal=True, implementation=implementation)
        past = slice(0, present + 1)
        assert_close([x[:, past] for x in after], [x[:, past] for x in before], "same")
        if present + 1 < min(lengths):
            assert (np.asarray(after[0])[:, present + 1] != np.asarray(before[0])[:, present + 1]).all()
