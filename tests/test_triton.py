"""The Triton kernels, through Pallas' interpreter against the definition, and lowered for CUDA without a GPU."""

import functools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import (
    Causal,
    Dense,
    Dilated,
    Global,
    Lengths,
    RandomBlocks,
    SegmentIds,
    Triton,
    Window,
    dot_product_attention,
    explain,
)
from jaxattn.impl.triton import Tiling
from tests.tolerance import assert_close

_TILING = Tiling(16, 16, 4, 1)
TINY = Triton(block_q=16, block_k=16, dq=_TILING, dkv=_TILING, interpret=True)


def operands(B, T, S, N, K, H, H_v=None, dtype="float32"):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H_v or H)
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def random(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


def attention(implementation, q, k, v, bias=None, mask=None, **options):
    """Output and log-sum-exp; compiled without optimisation, for interpreted kernels take long to optimise."""

    def function(q, k, v, bias, mask):
        return dot_product_attention(
            q, k, v, bias, mask, implementation=implementation, return_residual=True, **options
        )

    return _compiled(function)(q, k, v, bias, mask)


def gradients(implementation, q, k, v, bias=None, mask=None, **options):
    """Gradients of a sum, weighted at random, of the output and of the log-sum-exp where it is finite."""

    def loss(q, k, v, bias):
        out, lse = dot_product_attention(
            q, k, v, bias, mask, implementation=implementation, return_residual=True, **options
        )
        return (out * random(*out.shape)).sum() + jnp.where(jnp.isfinite(lse), lse * random(*lse.shape), 0).sum()

    return _compiled(jax.grad(loss, (0, 1, 2) if bias is None else (0, 1, 2, 3)))(q, k, v, bias)


def _compiled(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


CASES = {
    "full_where_blocks_divide": ((1, 32, 32, 2, 2, 16), {}),
    "causal_where_blocks_do_not_divide": ((2, 37, 53, 4, 2, 16, 24), {"is_causal": True}),
    "one_query_group_of_three_heads": ((1, 1, 60, 6, 2, 40), {}),
    "heads_packed_into_one_tile": ((1, 5, 60, 8, 2, 16), {"mask": Causal(55)}),
    "odd_head_dim_bottom_right_causal": ((2, 19, 45, 3, 1, 59), {"mask": Causal(26)}),
    "rows_before_every_key": ((1, 40, 24, 1, 1, 16), {"mask": Causal(-16)}),
    "group_larger_than_a_tile": ((1, 9, 20, 34, 1, 16), {"is_causal": True}),
    "window": ((1, 64, 64, 1, 1, 16), {"local_window_size": (7, 3)}),
    "dilated": ((1, 40, 40, 1, 1, 16), {"mask": Dilated(3)}),
    "window_with_global_tokens": ((1, 64, 64, 1, 1, 16), {"mask": Window(4, 4) | Global((0, 40))}),
    "random_blocks": ((1, 64, 64, 1, 1, 16), {"mask": RandomBlocks(8, 2, 8)}),
    "lengths": (
        (2, 33, 40, 4, 2, 16),
        {"key_value_seq_lengths": np.array([7, 40]), "query_seq_lengths": np.array([33, 5])},
    ),
    "segments": ((2, 40, 40, 2, 1, 16), {"mask": SegmentIds(np.sort(random(2, 40) * 4).astype(np.int32))}),
    "dense_mask_per_head": ((2, 20, 40, 4, 2, 16), {"mask": Dense(random(2, 4, 20, 40) < 0.2)}),
    "bias_and_soft_cap": ((1, 20, 40, 4, 2, 16), {"bias": random(1, 4, 20, 40), "logits_soft_cap": 2.0}),
    "bias_per_key_with_minus_infinity": (
        (2, 20, 40, 2, 2, 16),
        {"bias": np.where(random(1, 1, 1, 40) < 0.5, -np.inf, 1.0).astype(np.float32), "scale": -0.5},
    ),
    "bias_per_batch_element": ((2, 20, 24, 2, 1, 16), {"bias": 5 * random(2, 1, 1, 1), "is_causal": True}),
    "offset_per_batch_element": ((2, 20, 40, 2, 1, 16), {"mask": Causal(np.array([3, 20])) & Window(9, None)}),
}

QUICK = (
    "causal_where_blocks_do_not_divide",
    "heads_packed_into_one_tile",
    "group_larger_than_a_tile",
    "lengths",
    "bias_and_soft_cap",
    "bias_per_key_with_minus_infinity",
)


@pytest.mark.parametrize("case", CASES)
def test_output_and_log_sum_exp_match_naive(case):
    sizes, options = CASES[case]
    q, k, v = operands(*sizes)
    assert_close(attention(TINY, q, k, v, **options), attention("naive", q, k, v, **options))


@pytest.mark.parametrize("case", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_gradients_match_naive(case):
    sizes, options = CASES[case]
    q, k, v = operands(*sizes)
    assert_close(gradients(TINY, q, k, v, **options), gradients("naive", q, k, v, **options), "gradient")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_kernels_match_naive_in_16_bits(dtype):
    q, k, v = operands(1, 33, 33, 2, 1, 32, dtype=dtype)
    for function, kind in ((attention, "reordered"), (gradients, "gradient")):
        actual, expected = [function(implementation, q, k, v, is_causal=True) for implementation in (TINY, "naive")]
        assert actual[0].dtype == dtype
        assert_close(actual, expected, kind)


@pytest.mark.parametrize("splits", [2, 4])
def test_keys_split_and_merged_match_naive(splits):
    q, k, v = operands(2, 1, 90, 4, 2, 16)
    mask = Causal(np.array([10, 89])) & Lengths(None, np.array([90, 70]))
    split = Triton(block_k=16, splits=splits, interpret=True)
    assert_close(attention(split, q, k, v, mask=mask), attention("naive", q, k, v, mask=mask))


UNREAD = {
    "lengths": Lengths(None, np.array([21, 40])),
    "causal": Causal(-19),
    "dense": Dense(np.arange(40)[None, :] < 21),
}


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (attention, "lengths"),
        (attention, "causal"),
        (gradients, "causal"),
        pytest.param(attention, "dense", marks=pytest.mark.slow),
        pytest.param(gradients, "lengths", marks=pytest.mark.slow),
        pytest.param(gradients, "dense", marks=pytest.mark.slow),
    ],
)
def test_keys_that_no_query_reads_may_hold_nan(function, mask):
    q, k, v = operands(2, 40, 40, 2, 1, 16)
    mask, bias = UNREAD[mask], np.zeros((1, 1, 40, 40), np.float32)
    expected = function(TINY, q, k, v, bias, mask)
    unused = ~np.broadcast_to(mask.to_array(40, 40), (2, 1, 40, 40)).any((1, 2))
    k, v = [np.where(unused[:, :, None, None], np.nan, x) for x in (k, v)]
    assert_close(function(TINY, q, k, v, bias, mask), expected, "same")


def test_rows_past_the_end_add_nothing_under_a_large_bias():
    q, k, v = operands(1, 17, 16, 1, 1, 16)
    actual = gradients(TINY, q, k, v, np.full((1, 1), 1e3, np.float32))
    assert all(np.isfinite(x).all() for x in actual)


def test_batch_and_heads_sharded_over_devices_need_no_collective():
    q, k, v = operands(2, 20, 20, 4, 2, 16)
    ids = np.sort(random(2, 20) * 3).astype(np.int32)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    heads, data = NamedSharding(mesh, P("data", None, "model")), NamedSharding(mesh, P("data"))

    def run(q, k, v, ids):
        mask = Causal() & SegmentIds(ids)
        out, pullback = jax.vjp(lambda *x: dot_product_attention(*x, mask=mask, implementation=TINY), q, k, v)
        return out, pullback(out)

    expected = _compiled(run)(q, k, v, ids)
    sharded = [jax.device_put(x, heads) for x in (q, k, v)]
    program = _compiled(run).lower(*sharded, jax.device_put(ids, data)).compile()
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [name for name in names if name in program.as_text()]
    assert_close(jax.device_get(program(*sharded, jax.device_put(ids, data))), expected)


def test_vmap_maps_the_kernel():
    q, k, v = operands(2, 20, 20, 2, 2, 16)
    mapped = _compiled(jax.vmap(functools.partial(dot_product_attention, is_causal=True, implementation=TINY)))
    assert_close(mapped(q, k, v), attention(TINY, q, k, v, is_causal=True)[0])


def test_lowers_for_cuda_without_a_gpu():
    q, k, v = operands(1, 40, 40, 4, 2, 59, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the backend's deprecation must not reach the user
        text = lowered_for_cuda(Triton(platform="cuda"), q, k, v, np.zeros((40, 40), np.float32), is_causal=True)
    for kernel in ("attention_forward", "attention_dq", "attention_dkv", "attention_d_bias"):
        assert kernel in text


def lowered_for_cuda(implementation, q, k, v, bias=None, mask=None, **options):
    def loss(q, k, v, bias):
        return dot_product_attention(q, k, v, bias, mask, implementation=implementation, **options).sum()

    function = jax.jit(jax.grad(loss, (0, 1, 2) if bias is None else (0, 1, 2, 3)))
    return function.trace(q, k, v, bias).lower(lowering_platforms=("cuda",)).as_text()


def test_an_absent_backend_is_a_reason_not_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    q, k, v = operands(1, 8, 8, 1, 1, 16)
    with pytest.raises(NotImplementedError, match="has no Triton backend for Pallas"):
        dot_product_attention(q, k, v, implementation=TINY)
    assert dot_product_attention(q, k, v).shape == q.shape


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what happens on a CPU")
def test_a_cpu_runs_the_kernel_only_when_asked_to_interpret():
    q, k, v = operands(1, 8, 8, 1, 1, 16)
    with pytest.raises(NotImplementedError, match=r"NVIDIA GPU.*interpret=True"):
        dot_product_attention(q, k, v, implementation="triton")
    assert "triton     cannot run: the kernels need an NVIDIA GPU" in explain(q, k, v)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_q": 24}, "Tiling block_q=24 must be a power of two of at least 16"),
        ({"num_stages": 0}, "Tiling num_stages=0 must be an int of at least 1"),
        ({"splits": 3}, "Triton splits=3 must be a power of two"),
        ({"platform": "tpu"}, "Triton platform='tpu' must be"),
    ],
)
def test_wrong_tuning_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        Triton(**arguments)
