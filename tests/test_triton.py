"""The Triton kernels, through Pallas' interpreter against the definition, and lowered for CUDA without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Causal, Dense, Dilated, Global, Lengths, SegmentIds, Triton, Window, dot_product_attention, explain
from tests.tolerance import assert_close

TINY = Triton(block_q=16, block_k=16, interpret=True)


def operands(B, T, S, N, K, H, H_v=None, dtype="float32"):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H_v or H)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def random(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


CASES = {
    "full_where_blocks_divide": ((1, 32, 32, 2, 2, 16), {}),
    "causal_where_blocks_do_not_divide": ((2, 37, 53, 4, 2, 16, 24), {"is_causal": True}),
    "one_query_group_of_three_heads": ((1, 1, 60, 6, 2, 40), {}),
    "heads_packed_into_one_tile": ((1, 5, 60, 8, 2, 16), {"mask": Causal(55)}),
    "odd_head_dim_bottom_right_causal": ((2, 19, 45, 3, 1, 59), {"mask": Causal(26)}),
    "rows_before_every_key": ((1, 40, 24, 1, 1, 16), {"mask": Causal(-16)}),
    "window": ((1, 64, 64, 1, 1, 16), {"local_window_size": (7, 3)}),
    "dilated": ((1, 40, 40, 1, 1, 16), {"mask": Dilated(3)}),
    "window_with_global_tokens": ((1, 64, 64, 1, 1, 16), {"mask": Window(4, 4) | Global((0, 40))}),
    "lengths": (
        (2, 33, 40, 4, 2, 16),
        {"key_value_seq_lengths": np.array([7, 40]), "query_seq_lengths": np.array([33, 5])},
    ),
    "segments": ((2, 40, 40, 2, 1, 16), {"mask": SegmentIds(np.sort(random(2, 40) * 4).astype(np.int32))}),
    "dense_mask_per_head": ((2, 20, 40, 4, 2, 16), {"mask": random(2, 4, 20, 40) < 0.2}),
    "bias_and_soft_cap": ((1, 20, 40, 4, 2, 16), {"bias": random(1, 4, 20, 40), "logits_soft_cap": 2.0}),
    "bias_per_key_with_minus_infinity": (
        (1, 20, 40, 2, 2, 16),
        {"bias": np.where(random(1, 1, 1, 40) < 0.5, -np.inf, 1.0).astype(np.float32), "scale": -0.5},
    ),
    "offset_per_batch_element": ((2, 20, 40, 2, 1, 16), {"mask": Causal(np.array([3, 20])) & Window(9, None)}),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_naive(case):
    sizes, options = CASES[case]
    q, k, v = operands(*sizes)
    actual, expected = [
        dot_product_attention(q, k, v, **options, implementation=implementation, return_residual=True)
        for implementation in (TINY, "naive")
    ]
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernel_matches_naive_in_16_bits(dtype):
    q, k, v = operands(1, 33, 33, 2, 1, 32, dtype=dtype)
    actual, expected = [
        dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        for implementation in (TINY, "naive")
    ]
    assert actual.dtype == dtype
    assert_close(actual, expected)


@pytest.mark.parametrize("splits", [2, 4])
def test_keys_split_and_merged_match_naive(splits):
    q, k, v = operands(2, 1, 90, 4, 2, 16)
    mask = Causal(np.array([10, 89])) & Lengths(None, np.array([90, 70]))
    split = Triton(block_k=16, splits=splits, interpret=True)
    actual, expected = [
        dot_product_attention(q, k, v, mask=mask, implementation=implementation, return_residual=True)
        for implementation in (split, "naive")
    ]
    assert_close(actual, expected)


@pytest.mark.parametrize("mask", [Lengths(None, np.array([21, 40])), Causal(-19), Dense(np.arange(40)[None, :] < 21)])
def test_keys_that_no_query_reads_may_hold_nan(mask):
    q, k, v = operands(2, 40, 40, 2, 1, 16)
    expected = dot_product_attention(q, k, v, mask=mask, implementation=TINY)
    unused = ~np.broadcast_to(mask.to_array(40, 40), (2, 1, 40, 40)).any((1, 2))
    k, v = [jnp.where(unused[:, :, None, None], jnp.nan, x) for x in (k, v)]
    assert_close(dot_product_attention(q, k, v, mask=mask, implementation=TINY), expected, "same")


def test_lowers_for_cuda_without_a_gpu():
    q, k, v = operands(1, 40, 40, 4, 2, 59, dtype="bfloat16")
    function = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, implementation=Triton(platform="cuda")))
    text = function.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert "attention_forward" in text
    assert "triton" in text


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
