"""Every implementation gives what float64 gives, for every argument: outputs, log-sum-exp and gradients."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import conformance_cases
from bench.conformance_cases import Case, cover, grid, inputs
from jaxattn import Blockwise, Mask, dot_product_attention
from tests.tolerance import assert_accurate

oracle = pytest.importorskip("oracle.attention")

# Small blocks that divide nothing: many tiles of every kind, and rows and keys that the last ones cut.
IMPLEMENTATIONS = {"naive": "naive", "blockwise": "blockwise", "blockwise 24x40": Blockwise(block_q=24, block_k=40)}


def quick_to_compile() -> dict[str, int | bool]:
    """Compiler options for three hundred programs that run twice each: what counts is the time to compile them."""
    options = {"xla_backend_optimization_level": 0}
    emitters = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=emitters)(0.0)
    except jax.errors.JaxRuntimeError:  # newer XLA has no other emitters
        return options
    return emitters


COMPILER_OPTIONS = quick_to_compile()


def compute(case: Case):
    """Outputs and gradients by name, twice, and the inputs; keys that nothing may attend hold NaN."""
    x = inputs(case)
    hole = ~x.attended[:, :, None, None]
    implementation = IMPLEMENTATIONS[case.implementation]
    traced = {name: a for name, a in x.arguments.items() if isinstance(a, (np.ndarray, Mask))}
    static = {name: a for name, a in x.arguments.items() if name not in traced}

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(q, k, v, bias, traced, d_out, d_lse):
        def attend(q, k, v, bias):
            return dot_product_attention(
                q, k, v, bias, scale=x.scale, logits_soft_cap=x.soft_cap, implementation=implementation,
                return_residual=True, **traced, **static,
            )  # fmt: skip

        (out, lse), pull = jax.vjp(attend, q, k, v, bias)
        return dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *pull((d_out, d_lse))), strict=True))

    with jax.enable_x64() if case.dtype == "float64" else contextlib.nullcontext():
        arrays = jax.tree.map(
            jnp.asarray,
            (
                x.q,
                np.where(hole, np.nan, x.k).astype(x.k.dtype),
                np.where(hole, np.nan, x.v).astype(x.v.dtype),
                x.bias,
                traced,
                x.d_out,
                x.d_lse,
            ),
        )
        first, second = (jax.tree.map(np.asarray, run(*arrays)) for _ in range(2))
    return x, first, second


def check(case: Case) -> None:
    x, results, again = compute(case)
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


CASES = cover(tuple(IMPLEMENTATIONS))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_implementation_is_as_accurate_as_torch_and_exact_where_nothing_may_be_attended(case):
    check(case)


def test_the_cases_cover_every_two_values_and_are_at_least_three_hundred():
    assert len(set(CASES)) == len(CASES) >= 300
    axes = {"implementation": tuple(IMPLEMENTATIONS), **conformance_cases.AXES}
    for a in axes:
        for b in axes:
            met = {(getattr(case, a), getattr(case, b)) for case in CASES}
            wanted = {(x, y) for x in axes[a] for y in axes[b] if conformance_cases.possible({a: x, b: y})}
            assert a == b or met == wanted, f"{a} and {b}: {wanted - met}"


@pytest.mark.grid
@pytest.mark.parametrize("mask", conformance_cases.MASKS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_combination_of_the_axes(implementation, mask):
    for case in grid((implementation,)):
        if case.mask == mask:
            check(case)
