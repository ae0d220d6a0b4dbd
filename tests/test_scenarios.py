"""Attention as models call it, at their own sizes: outputs and gradients against float64 by the accuracy rule."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tolerance import assert_accurate, assert_close

from bench.conformance_cases import allowed_pairs
from jaxattn import Causal, dot_product_attention

oracle = pytest.importorskip("oracle.attention")


@dataclasses.dataclass(frozen=True)
class Scenario:
    batch: int
    lengths: tuple[int, int]
    heads: tuple[int, int]
    head_dim: int
    dtype: Any
    arguments: dict[str, Any]


SCENARIOS = {
    "GPT-2, a whole context": Scenario(1, (1024, 1024), (12, 12), 64, np.float32, {"is_causal": True}),
    "BERT-base, a padded batch": Scenario(
        3, (64, 64), (12, 12), 64, np.float32, {"key_value_seq_lengths": np.array([64, 41, 7], np.int32)}
    ),
    "ViT-B/16, 196 patches and a class token": Scenario(1, (197, 197), (12, 12), 64, np.float32, {}),
    "CLIP's text encoder": Scenario(2, (77, 77), (8, 8), 64, np.float32, {"is_causal": True}),
    "LLaMA-2-7B": Scenario(1, (96, 96), (32, 32), 128, ml_dtypes.bfloat16, {"is_causal": True}),
    "Llama-3.2-1B": Scenario(1, (128, 128), (32, 8), 64, ml_dtypes.bfloat16, {"is_causal": True}),
    "Llama-3.2-1B, the second half of a prompt": Scenario(
        1, (64, 128), (32, 8), 64, ml_dtypes.bfloat16, {"mask": Causal(offset=64)}
    ),
    "Llama-3.2-1B, one token against a cache": Scenario(
        4, (1, 256), (32, 8), 64, ml_dtypes.bfloat16, {"mask": Causal(offset=np.array([255, 0, 17, 200], np.int32))}
    ),
}


@pytest.fixture(scope="module", params=SCENARIOS, ids=str)
def scenario(request):
    """The arrays of a scenario and its float64 targets, worked out once for all implementations."""
    x = SCENARIOS[request.param]
    rng = np.random.default_rng(0)
    (T, S), (N, K), B, H = x.lengths, x.heads, x.batch, x.head_dim
    q, k, v, d_out = (
        rng.standard_normal(shape, np.float32).astype(x.dtype)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    )
    allowed = allowed_pairs(x.arguments, T, S)
    return x.arguments, (q, k, v), d_out, oracle.accuracy_bound(q, k, v, mask=allowed, cotangent=d_out)


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_model_gets_accurate_outputs_and_gradients(scenario, implementation):
    arguments, operands, d_out, targets = scenario

    @jax.jit
    def run(q, k, v, d_out):
        attend = functools.partial(dot_product_attention, implementation=implementation, **arguments)
        out, pull = jax.vjp(attend, q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(d_out)), strict=True))

    results = run(*operands, d_out)
    assert results["out"].dtype == operands[0].dtype
    assert_accurate(results, targets)


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_decoding_token_by_token_against_a_cache_is_the_causal_pass(implementation):
    B, S, N, K, H = 2, 24, 8, 2, 64
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, S, heads, H), np.float32) for heads in (N, K, K))
    prompt = np.array([5, 11])  # tokens already in each sequence's cache
    steps = S - prompt.max()
    position = np.arange(S)[None, :, None, None]
    caches = tuple(np.where(position < prompt[:, None, None, None], x, np.nan) for x in (k, v))  # not yet written

    def step(carry, _):
        cache_k, cache_v, length = carry
        now = jnp.arange(B), length
        query, new_k, new_v = (jnp.asarray(x)[now] for x in (q, k, v))
        cache_k, cache_v = cache_k.at[now].set(new_k), cache_v.at[now].set(new_v)
        out = dot_product_attention(
            query[:, None], cache_k, cache_v, mask=Causal(length), implementation=implementation
        )
        return (cache_k, cache_v, length + 1), out[:, 0]

    _, decoded = jax.jit(lambda *carry: jax.lax.scan(step, carry, None, length=steps))(*caches, jnp.asarray(prompt))
    whole = dot_product_attention(q, k, v, is_causal=True, implementation="naive")
    for b in range(B):
        assert_close(decoded[:, b], whole[b, prompt[b] : prompt[b] + steps])
