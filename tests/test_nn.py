"""Layers: attention in every configuration, the KV cache, the language model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tolerance import assert_close

from jaxattn import Blockwise, Causal, Dense, Full, Window, dot_product_attention, nn, rope

SMALL_BLOCKS = Blockwise(block_q=4, block_k=4)


def inputs(T=9, D=32, B=2, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)).astype(dtype))


def numpy_normal(key, shape, dtype):
    """Initial weights without JAX's random numbers, whose compilation takes longer than all else here."""
    fan_in = shape[0] if len(shape) == 2 or shape[0] == 32 else shape[0] * shape[1]
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) * fan_in**-0.5, dtype)


def attention(**options):
    options = dict(n_kv_heads=2, rope=rope.RopeConfig(8), implementation="naive", kernel_init=numpy_normal) | options
    return nn.Attention(32, 4, rngs=nnx.Rngs(0), **options)


@nnx.jit
def call(layer, x, positions=None):
    return layer(x, positions=positions)


@functools.cache
def made_once():
    def block(rngs):
        norms = [nn.RMSNorm(16, rngs=rngs) for _ in range(2)]
        layer = nn.Attention(16, 4, n_kv_heads=2, rope=rope.RopeConfig(4), implementation="naive", rngs=rngs)
        return nn.Block(layer, nn.GatedMLP(16, 24, rngs=rngs), *norms)

    return nn.Transformer(20, 16, 3, block, rngs=nnx.Rngs(1))


def model(remat=None):
    lm = nnx.clone(made_once())
    lm.remat = remat
    return lm


def written_out(layer, x, positions):
    """The layer in NumPy, float64, one head at a time."""
    x = np.asarray(x, np.float64)
    wq, wk, wv, wo = (np.asarray(w[...], np.float64) for w in (layer.wq, layer.wk, layer.wv, layer.wo))
    N, K, H = wq.shape[1], wk.shape[1], wq.shape[2]
    out = np.zeros(x.shape[:2] + wo.shape[2:])
    for n in range(N):
        q, k, v = x @ wq[:, n], x @ wk[:, n // (N // K)], x @ wv[:, n // (N // K)]
        if layer.bq is not None:
            group = n // (N // K)
            q, k, v = q + np.asarray(layer.bq[n]), k + np.asarray(layer.bk[group]), v + np.asarray(layer.bv[group])
        if layer.rope is not None:
            angles = np.asarray(positions)[:, None] * np.array(layer.rope.inv_freq)
            R, cos, sin = 2 * angles.shape[1], np.cos(angles), np.sin(angles)
            for y in (q, k):
                a, b = y[..., : R // 2].copy(), y[..., R // 2 : R].copy()
                y[..., : R // 2], y[..., R // 2 : R] = a * cos - b * sin, b * cos + a * sin
        scores = q @ k.swapaxes(1, 2) * (H**-0.5 if layer.scale is None else layer.scale)
        if layer.logits_soft_cap is not None:
            scores = layer.logits_soft_cap * np.tanh(scores / layer.logits_soft_cap)
        scores = np.where(np.asarray(layer.mask.to_array(*scores.shape[1:])), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out += weights / weights.sum(-1, keepdims=True) @ v @ wo[n]
    return out if layer.bo is None else out + np.asarray(layer.bo[...])


CONFIGURATIONS = {
    "llama": {},
    "mha": dict(n_kv_heads=None),
    "mqa": dict(n_kv_heads=1),
    "heads wider than the model": dict(head_dim=24, rope=rope.RopeConfig(24)),
    "value dim of its own": dict(value_dim=5),
    "biases": dict(qkv_bias=True, out_bias=True),
    "no rope, not causal": dict(rope=None, mask=Full()),
    "partial rope, window": dict(rope=rope.RopeConfig(8, rotary_dim=4), mask=Causal() & Window(3, None)),
    "scale": dict(scale=0.7),
    "soft cap": dict(scale=0.7, logits_soft_cap=1.5),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_attention_is_what_its_formula_says(name):
    layer = attention(**CONFIGURATIONS[name])
    for parameter in (layer.bq, layer.bk, layer.bv, layer.bo):
        if parameter is not None:
            parameter.set_value(jnp.asarray(np.random.default_rng(3).normal(size=parameter.shape), jnp.float32))
    x, positions = inputs(), 5 + np.arange(9)
    expected = written_out(layer, x, positions).astype(np.float32)
    assert_close(call(layer, x, jnp.asarray(positions)), expected)


def test_blockwise_gives_the_gradients_of_naive():
    x, grads = inputs(), []
    for implementation in ("naive", SMALL_BLOCKS):
        layer = attention(implementation=implementation)
        grads.append(nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x) ** 2)))(layer))
    assert len(jax.tree.leaves(grads[0])) == 4
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))
    assert_close(jax.tree.leaves(grads[1]), jax.tree.leaves(grads[0]), "gradient")


def test_stages_are_those_of_the_call_and_the_residual_is_the_api_s():
    layer, x = attention(), inputs()
    stages = nnx.jit(lambda layer, x: layer.stages(x, residual=True))(layer, x)
    assert_close(stages.output, call(layer, x))
    assert nnx.eval_shape(lambda layer, x: layer.stages(x), layer, x).log_sum_exp is None
    _, lse = dot_product_attention(
        stages.rotated_query, stages.rotated_key, stages.value, is_causal=True, return_residual=True
    )
    assert_close(stages.log_sum_exp, lse)


def test_a_call_narrows_the_layer_s_mask():
    layer, x = attention(), inputs()
    only_self = Dense(jnp.eye(9, dtype=bool)[None, None])
    narrowed = nnx.jit(lambda layer, x: layer(x, mask=only_self))(layer, x)
    value_alone = nnx.jit(lambda layer, x: layer.combine(jnp.repeat(layer.project(x)[2], 2, axis=2)))(layer, x)
    assert_close(narrowed, value_alone)


def test_dtype_is_that_of_the_computation_and_param_dtype_that_of_the_parameters():
    def dtype(x, **options):
        return nnx.eval_shape(lambda layer: layer(x), attention(**options)).dtype

    assert attention(dtype=jnp.bfloat16).wq.dtype == jnp.float32
    assert dtype(inputs(), dtype=jnp.bfloat16) == jnp.bfloat16
    assert dtype(inputs(), param_dtype=jnp.bfloat16) == jnp.float32
    assert dtype(inputs(dtype=np.float16)) == jnp.float16


def test_kernels_start_with_variance_one_over_fan_in():
    layer = nn.Attention(256, 8, n_kv_heads=2, rngs=nnx.Rngs(0))
    for kernel, fan_in in ((layer.wq, 256), (layer.wk, 256), (layer.wv, 256), (layer.wo, 256)):
        assert np.std(kernel[...]) == pytest.approx(fan_in**-0.5, rel=0.05)


@pytest.mark.parametrize("implementation", ["naive", SMALL_BLOCKS], ids=["naive", "blockwise"])
def test_prefill_and_decode_with_the_cache_give_what_the_whole_sequence_gives(implementation):
    layer, x = attention(implementation=implementation, mask=Causal() & Window(6, None)), np.asarray(inputs())
    step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
    y, cache = step(layer, x[:, :5], layer.init_cache(2, slots=12))
    parts = [y]
    for t in range(5, 9):
        y, cache = step(layer, x[:, t : t + 1], cache)
        parts.append(y)
    assert int(cache.length) == 9
    assert_close(np.concatenate(parts, 1), call(layer, x))


def test_left_padding_changes_nothing_whatever_the_padding_holds():
    layer, x = attention(), np.asarray(inputs())
    padded = np.stack([x[0], np.concatenate([np.full((4, 32), 1e3), x[1, :5]])]).astype(np.float32)
    cache = layer.init_cache(2, slots=9, start=jnp.array([0, 4]))
    y, _ = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))(layer, padded, cache)
    alone = call(layer, x)
    assert_close(y[0], alone[0])
    assert_close(y[1, 4:], alone[1, :5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(n_kv_heads=3), "n_heads=4 must be a multiple of n_kv_heads=3"),
        (dict(n_kv_heads=0), "n_kv_heads=0 must be at least 1"),
        (dict(value_dim=0), "head_dim=8 and value_dim=0 must be at least 1"),
        (dict(rope=rope.RopeConfig(16)), "rope.head_dim=16 must be the layer's head_dim=8"),
        (dict(mask=Dense(jnp.ones((3, 3), bool))), "must hold no arrays"),
    ],
)
def test_wrong_configuration_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        attention(**options)


@pytest.mark.parametrize(
    ("shape", "batch", "words"),
    [
        ((2, 5, 16), 2, r"x of shape \(2, 5, 16\) must end with d_model=32"),
        ((2, 5, 32), 1, r"x of shape \(2, 5, 32\) must be \[B=1, T, D\], T at most 8"),
        ((5, 32), 1, r"x of shape \(5, 32\) must be \[B=1, T, D\]"),
        ((1, 9, 32), 1, r"x of shape \(1, 9, 32\) must be \[B=1, T, D\], T at most 8"),
    ],
)
def test_tokens_that_do_not_fit_the_layer_or_its_cache_are_named(shape, batch, words):
    layer = attention()
    with pytest.raises(ValueError, match=words):
        nnx.eval_shape(lambda x: layer(x, cache=layer.init_cache(batch, slots=8)), jnp.zeros(shape))


def test_rms_norm_divides_by_the_root_mean_square():
    x = np.asarray(inputs(D=16))
    norm = nn.RMSNorm(16, eps=1e-5, rngs=nnx.Rngs(0))
    norm.scale.set_value(jnp.arange(16.0))
    expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5) * np.arange(16.0)
    assert_close(norm(x), np.asarray(expected, np.float32))
    assert nnx.eval_shape(norm, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_gated_mlp_is_silu_of_the_gate_times_up():
    x, mlp = np.asarray(inputs(D=16)), nn.GatedMLP(16, 24, bias=True, rngs=nnx.Rngs(0))
    for bias in (mlp.bg, mlp.bu, mlp.bd):
        bias.set_value(jnp.full(bias.shape, 0.5))
    wg, wu, wd = (np.asarray(w[...]) for w in (mlp.wg, mlp.wu, mlp.wd))
    gate, up = x @ wg + 0.5, x @ wu + 0.5
    assert_close(nnx.jit(lambda mlp, x: mlp(x))(mlp, x), (gate / (1 + np.exp(-gate)) * up) @ wd + 0.5)


def test_scanned_blocks_are_the_blocks_one_after_the_other():
    @nnx.jit
    def one_after_the_other(lm, tokens):
        graph, parameters = nnx.split(lm.blocks)
        x = lm.embedding[...][tokens]
        for i in range(3):
            x = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], parameters))(x)
        return lm.norm(x) @ (lm.embedding if lm.unembedding is None else lm.unembedding)[...].T

    tokens = jnp.arange(7)[None]
    untied = model()
    untied.unembedding = nnx.data(nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(20, 16)), jnp.float32)))
    for lm in (model(), untied):
        assert_close(nnx.jit(lambda lm, tokens: lm(tokens))(lm, tokens), one_after_the_other(lm, tokens))


def test_blocks_start_with_different_parameters():
    wq = model().blocks.attention.wq[...]
    assert wq.shape[0] == 3
    assert np.abs(wq[0] - wq[1]).max() > 0.01


def test_rematerialised_blocks_give_the_same_gradients():
    tokens = jnp.arange(8)[None]
    policies = jax.checkpoint_policies
    grads = []
    for remat in (None, policies.nothing_saveable, policies.save_only_these_names("context")):
        lm = model(remat=remat)
        grads.append(jax.tree.leaves(nnx.jit(nnx.grad(lambda lm: jnp.mean(lm(tokens) ** 2)))(lm)))
    for other in grads[1:]:
        for ours, expected in zip(other, grads[0], strict=True):
            assert np.abs(ours - expected).max() <= 2e-6 * np.abs(expected).max()


def test_generation_is_greedy_and_prefill_and_decode_are_compiled_once(monkeypatch):
    lm, tokens, traces = model(), jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]]), []
    original = nn.Transformer.hidden
    monkeypatch.setattr(nn.Transformer, "hidden", lambda *a, **k: traces.append(1) or original(*a, **k))
    chosen = nn.generate(lm, tokens, 6)
    assert len(traces) == 2  # one prefill, one decode step
    fixed = nnx.jit(lambda lm, tokens: jnp.argmax(lm(tokens), -1))
    so_far = np.concatenate([tokens, np.zeros((2, 6), int)], 1)
    for t in range(4, 10):
        so_far[:, t] = fixed(lm, so_far)[:, t - 1]
    np.testing.assert_array_equal(chosen, so_far[:, 4:])


def test_generation_from_left_padded_prompts_is_that_of_each_prompt_alone():
    lm = model()
    alone = nn.generate(lm, jnp.array([[7, 8]]), 5)
    together = nn.generate(lm, jnp.array([[1, 2, 3, 4], [0, 0, 7, 8]]), 5, padding=jnp.array([0, 2]))
    np.testing.assert_array_equal(together[1], alone[0])


def test_a_rematerialised_block_is_trained_by_nnx_s_own_tools():
    def make():
        rngs = nnx.Rngs(0)
        norms = [nn.RMSNorm(32, rngs=rngs) for _ in range(2)]
        mlp = nn.GatedMLP(32, 8, kernel_init=numpy_normal, rngs=rngs)
        return nn.Block(attention(), mlp, *norms)

    def train(forward):
        block = make()
        optimizer = nnx.Optimizer(block, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(block, optimizer):
            loss, gradients = nnx.value_and_grad(lambda block: jnp.mean(forward(block, inputs()) ** 2))(block)
            optimizer.update(block, gradients)
            return loss

        losses = [float(step(block, optimizer)) for _ in range(3)]
        return losses, jax.tree.leaves(nnx.state(block, nnx.Param))

    losses, plain = train(lambda block, x: block(x))
    again, remat = train(nnx.remat(lambda block, x: block(x)))
    assert losses[2] < losses[1] < losses[0]
    assert again == pytest.approx(losses, rel=1e-6)
    assert len(plain) == 9
    start = jax.tree.leaves(nnx.state(make(), nnx.Param))
    assert all(np.abs(now - before).max() > 0 for now, before in zip(plain, start, strict=True))
    for ours, expected in zip(remat, plain, strict=True):
        assert_close(ours, expected, "gradient")
