"""The float64 reference against NumPy and finite differences, and the accuracy rule against wrong results."""

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
from oracle import attention as oracle

B, T, S, N, K, H, HV = 2, 5, 7, 4, 2, 6, 3


def case(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, S, K, H))
    v, bias = rng.normal(size=(B, S, K, HV)), rng.normal(size=(N, 1, S))
    bias[1, 0, 2] = -np.inf
    mask = rng.random((B, 1, T, S)) < 0.6
    mask[0, 0, 3] = False
    return *(x.astype(dtype) for x in (q, k, v, bias)), mask


def by_hand(q, k, v, bias, mask, scale, cap):
    out, lse = np.zeros((B, T, N, HV)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        logits = [cap * np.tanh(scale * q[b, t, n] @ k[b, s, n // 2] / cap) + bias[n, 0, s] for s in range(S)]
        terms = np.where(mask[b, 0, t], np.exp(logits), 0)
        if terms.sum():
            out[b, t, n], lse[b, t, n] = terms @ v[b, :, n // 2] / terms.sum(), np.log(terms.sum())
    return out, lse


def test_reference_is_the_definition():
    q, k, v, bias, mask = case()
    out, lse = by_hand(q, k, v, bias, mask, 0.3, 2.0)
    result = oracle.reference(q, k, v, bias, mask, scale=0.3, logits_soft_cap=2.0)
    np.testing.assert_allclose(result.out, out, atol=1e-14)
    np.testing.assert_allclose(result.lse, lse, atol=1e-14)
    assert (result.out[0, 3] == 0).all()
    assert np.isneginf(result.lse[0, 3]).all()


def test_reference_gradients_are_finite_differences():
    q, k, v, bias, mask = case()
    rng = np.random.default_rng(1)
    do, dlse = rng.normal(size=(B, T, N, HV)), rng.normal(size=(B, T, N))
    options = dict(scale=0.3, logits_soft_cap=2.0)
    result = oracle.reference(q, k, v, bias, mask, cotangent=do, lse_cotangent=dlse, **options)

    def loss(*inputs):
        there = oracle.reference(*inputs, mask, **options)
        return np.sum(there.out * do) + np.sum(np.where(np.isinf(there.lse), 0, there.lse * dlse))

    inputs = [q, k, v, bias]
    for i, grad in enumerate((result.dq, result.dk, result.dv, result.dbias)):
        direction = np.where(np.isinf(inputs[i]), 0, rng.normal(size=inputs[i].shape))
        two = [loss(*inputs[:i], inputs[i] + e * direction, *inputs[i + 1 :]) for e in (1e-6, -1e-6)]
        assert np.sum(grad * direction) == pytest.approx((two[0] - two[1]) / 2e-6, rel=1e-6)
    assert (result.dq[0, 3] == 0).all()
    assert result.dbias[1, 0, 2] == 0


def test_slicing_rows_changes_no_bit_of_the_output(monkeypatch):
    q, k, v, bias, mask = case(np.float32)
    whole = oracle.plain(q, k, v, bias, mask)
    monkeypatch.setattr(oracle, "_ELEMENTS_PER_SLICE", 1)
    np.testing.assert_allclose(oracle.plain(q, k, v, bias, mask).out, whole.out, rtol=1e-6)
    do = np.ones_like(whole.out)
    sliced = oracle.reference(q, k, v, bias, mask, cotangent=do)
    monkeypatch.undo()
    together = oracle.reference(q, k, v, bias, mask, cotangent=do)
    for name in ("dq", "dk", "dv", "dbias"):
        np.testing.assert_allclose(getattr(sliced, name), getattr(together, name), atol=1e-13)


def test_keys_that_nobody_may_attend_may_hold_nan():
    q, k, v, bias, mask = case()
    mask[1, :, :, 4] = False
    clean = oracle.reference(q, k, v, bias, mask, cotangent=np.ones((B, T, N, HV)))
    k[1, 4], v[1, 4] = np.nan, np.nan
    dirty = oracle.reference(q, k, v, bias, mask, cotangent=np.ones((B, T, N, HV)))
    for name in ("out", "lse", "dq", "dk", "dv", "dbias"):
        np.testing.assert_array_equal(getattr(dirty, name), getattr(clean, name))


def test_batch_axis_may_be_absent_and_two_dimensional_masks_broadcast():
    q, k, v, _, mask = case()
    one = oracle.reference(q[0], k[0], v[0], None, mask[0, 0], cotangent=np.ones((T, N, HV)))
    four = oracle.reference(q[:1], k[:1], v[:1], None, mask[:1], cotangent=np.ones((1, T, N, HV)))
    for name in ("out", "lse", "dq", "dk", "dv"):
        np.testing.assert_array_equal(getattr(one, name), getattr(four, name)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_plain_torch_passes_its_own_rule_and_small_mistakes_fail_it(dtype):
    q, k, v, bias, mask = case(dtype)
    do = np.random.default_rng(2).normal(size=(B, T, N, HV)).astype(dtype)
    targets = oracle.accuracy_bound(q, k, v, bias, mask, cotangent=do)
    result = oracle.plain(q, k, v, bias, mask, cotangent=do)
    right = {name: getattr(result, name) for name in targets}
    assert set(right) == {"out", "lse", "dq", "dk", "dv", "dbias"}
    verdicts = oracle.check(right, targets)
    assert all(verdicts.values()), "\n".join(map(str, verdicts.values()))
    for name, value in right.items():
        wide = np.asarray(value, np.float64)
        shifted = np.where(np.isfinite(wide), wide + 3 * targets[name].bound, wide)
        assert not oracle.judge(name, shifted, targets[name]), name


def test_rule_counts_nan_misplaced_infinities_and_shapes_as_wrong():
    target = oracle.Target(np.array([1.0, -np.inf]), plain_rmse=0.1, bound=0.5)
    assert oracle.judge("lse", np.array([1.2, -np.inf]), target)
    for wrong in ([1.0, 0.0], [-np.inf, -np.inf], [np.nan, -np.inf], [1.0], [2.0, -np.inf]):
        verdict = oracle.judge("lse", np.array(wrong), target)
        assert not verdict
        assert "FAIL" in str(verdict)


def test_rule_with_nothing_to_check_raises():
    with pytest.raises(ValueError, match="nothing to check"):
        oracle.check({}, {})
    with pytest.raises(ValueError, match="no target for"):
        oracle.check({"dx": np.zeros(1)}, {"out": oracle.Target(np.zeros(1), 0.0, 0.0)})


def test_bound_grows_with_the_unit_roundoff():
    bounds = [oracle.accuracy_bound(*case(dtype)[:3])["out"].bound for dtype in (np.float64, np.float32, np.float16)]
    assert bounds[0] < 1e-6 * bounds[1] < 1e-6 * bounds[2]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 2, 4)), "N=3 query heads must be a multiple of K=2"),
        (((1, 2, 2, 4), (1, 2, 2, 5), (1, 2, 2, 4)), "key has shape"),
        (((1, 2, 2, 4), (1, 3, 2, 4), (1, 2, 2, 4)), "value has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, words):
    with pytest.raises(ValueError, match=words):
        oracle.reference(*(np.zeros(shape) for shape in shapes))
