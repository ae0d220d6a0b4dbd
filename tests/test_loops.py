"""Explicit loops, tiny: they are the definition, so they are held to float64 for every mask and every argument."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tolerance import assert_accurate, assert_close

from bench import conformance_cases
from bench.conformance_cases import Case, inputs
from jaxattn import Causal, dot_product_attention

oracle = pytest.importorskip("oracle.attention")

CASES = [
    Case("loops", mask, dtype, (3, 4), (2, 1), 8, 5, logits)
    for mask, dtype, logits in zip(
        conformance_cases.MASKS,
        ["float32", "bfloat16", "float16"] * 8,
        conformance_cases.LOGITS * 4,
        strict=False,
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loops_are_as_accurate_as_torch(case):
    x = inputs(case)
    out, lse = dot_product_attention(
        x.q, x.k, x.v, x.bias, scale=x.scale, logits_soft_cap=x.soft_cap, implementation="loops",
        return_residual=True, **x.arguments,
    )  # fmt: skip
    targets = oracle.accuracy_bound(x.q, x.k, x.v, x.bias, x.allowed, scale=x.scale, logits_soft_cap=x.soft_cap)
    assert_accurate({"out": out, "lse": lse}, targets, case)
    assert (np.asarray(out)[x.empty] == 0).all()


@pytest.mark.parametrize("case", [CASES[3], CASES[15], CASES[19]], ids=str)
def test_gradients_of_loops_are_as_accurate_as_torch_and_nan_does_not_leak(case):
    case = dataclasses.replace(case, dtype="float32", lengths=(2, 4))
    x = inputs(case)
    hole = ~x.attended[:, :, None, None]
    assert hole.any()
    k, v = (np.where(hole, np.nan, array) for array in (x.k, x.v))

    @jax.jit
    def run(q, k, v, bias):
        def attend(q, k, v, bias):
            return dot_product_attention(
                q, k, v, bias, scale=x.scale, logits_soft_cap=x.soft_cap, implementation="loops",
                return_residual=True, **x.arguments,
            )  # fmt: skip

        (out, lse), pull = jax.vjp(attend, q, k, v, bias)
        return dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *pull((x.d_out, x.d_lse))), strict=True))

    results = run(x.q, k, v, x.bias)
    targets = oracle.accuracy_bound(
        x.q, x.k, x.v, x.bias, x.allowed, scale=x.scale, logits_soft_cap=x.soft_cap, cotangent=x.d_out,
        lse_cotangent=x.d_lse,
    )  # fmt: skip
    assert_accurate(results, targets, case)
    assert (np.asarray(results["dq"])[x.empty] == 0).all()


def test_second_derivatives_are_those_of_the_dense_formula():
    q, k = (np.float32(np.random.default_rng(i).standard_normal((1, n, 1, 2))) for i, n in enumerate((2, 3)))

    @functools.partial(jax.jit, static_argnums=0)
    def hessian(implementation, q, k):
        def loss(q, k):
            return (dot_product_attention(q, k, k, mask=Causal(1), implementation=implementation) ** 2).sum()

        return jax.hessian(loss, argnums=(0, 1))(q, k)

    assert_close(hessian("loops", q, k), hessian("naive", q, k), "gradient")


def test_more_scores_than_loops_are_meant_for_are_refused():
    x = np.zeros((1, 257, 1, 4), np.float32)
    with pytest.raises(NotImplementedError, match=r"'loops' cannot compute this: B\*N\*T\*S = 66049 scores"):
        dot_product_attention(x, x, x, implementation="loops")
