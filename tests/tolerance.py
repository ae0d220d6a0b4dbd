"""How far apart two results may lie: one table, each entry with its reason, and the two assertions that read it.

`assert_accurate` judges results against float64 by the accuracy rule of `oracle.attention`, whose bounds come from
plain torch on the same inputs. `assert_close` compares two results with each other, where no float64 truth is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

# kind: multiples of the unit roundoff u of the coarser dtype, relative to the largest entry expected. An entry that
# is small by cancellation carries the rounding errors of large terms, so no entry is judged by its own size.
TOLERANCE = {
    "same": 0,  # the same operations in the same order: the same bits
    "cast": 2,  # equal before one rounding to the dtype: half an ulp on each side
    "reordered": 32,  # the same sum of terms in another order, or with other rescalings; a few u per exp, dot and sum
    "gradient": 128,  # gradients: p (dp - delta) cancels, so their errors are those of terms several times larger
}


def assert_close(actual: Any, expected: Any, kind: str = "reordered") -> None:
    """Asserts that two arrays, or two pytrees of them, agree; `kind` names a row of `TOLERANCE`.

    Infinities must match in place and sign, NaN never passes, and shapes must be equal.
    """
    actual_leaves, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
    expected_leaves, expected_tree = jax.tree_util.tree_flatten_with_path(expected)
    assert actual_tree == expected_tree, f"structures differ: {actual_tree} and {expected_tree}"
    for (path, a), (_, b) in zip(actual_leaves, expected_leaves, strict=True):
        _assert_close(np.asarray(a), np.asarray(b), kind, jax.tree_util.keystr(path))


def _assert_close(actual: np.ndarray, expected: np.ndarray, kind: str, where: str) -> None:
    assert actual.shape == expected.shape, f"{where} shape {actual.shape}, should be {expected.shape}"
    u = max(float(ml_dtypes.finfo(x.dtype).eps) / 2 for x in (actual, expected))
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    assert not np.isnan(expected).any(), f"{where} NaN in what is expected"
    same_infinity = np.isinf(expected) & (actual == expected)
    difference = np.abs(np.where(same_infinity, 0, actual) - np.where(same_infinity, 0, expected))
    finite = np.abs(expected[np.isfinite(expected)])
    bound = TOLERANCE[kind] * u * (finite.max() if finite.size else 0)
    wrong = ~(difference <= bound)  # NaN counts
    if wrong.any():
        at = tuple(int(i) for i in np.unravel_index(np.argmax(np.where(wrong, difference, -1)), wrong.shape))
        raise AssertionError(
            f"{where} {wrong.sum()} of {wrong.size} entries differ by more than {bound:.3g} ({kind}); "
            f"at {at}: {actual[at]!r}, should be {expected[at]!r}"
        )


def assert_accurate(actual: Mapping[str, Any], targets: Mapping[str, Any], about: Any = "") -> None:
    """Asserts the accuracy rule for results by name ("out", "lse", "dq", ...) against `accuracy_bound`'s targets.

    The rule: RMSE against float64 at most twice that of plain torch in the same dtype, plus one unit roundoff of the
    same formula with every term in absolute value. A name whose result is None is left out.
    """
    from oracle.attention import check  # needs torch, which comparing two results does not

    verdicts = check({name: np.asarray(x) for name, x in actual.items() if x is not None}, targets)
    assert all(verdicts.values()), f"{about}\n" + "\n".join(map(str, verdicts.values()))
