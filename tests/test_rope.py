"""RoPE against transformers and against its definition as a complex rotation."""

import copy
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import rope


@functools.cache
def hugging_face():
    """torch, transformers and its Llama module; the tests that need them are skipped where they are
    missing."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    transformers.logging.set_verbosity_error()
    return torch, transformers, modeling_llama


def hf_frequencies(config, length=None):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        inv_freq, scaling = hugging_face()[2].LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    return inv_freq.numpy(), scaling


def ulps(a, b):
    as_integers = [np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b)]
    return int(np.abs(as_integers[0] - as_integers[1]).max())


def hf_config(head_dim, rules, longest=131072):
    _, transformers, _ = hugging_face()
    return transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rope_parameters=rules,
    )


RULES = {
    "llama-3.2-1b": (64, dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-3.1-8b": (128, dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "yarn": (128, dict(rope_type="yarn", factor=4.0)),
    "linear": (128, dict(rope_type="linear", factor=4.0)),
    "default": (64, dict(rope_type="default")),
}


@pytest.mark.parametrize("name", RULES)
def test_frequencies_of_published_models_are_within_1_ulp_of_transformers(name):
    head_dim, rules = RULES[name]
    rules = {"rope_theta": 500000.0, **rules}
    if rules["rope_type"] in ("llama3", "yarn"):
        rules["original_max_position_embeddings"] = 8192
    config = hf_config(head_dim, rules)
    inv_freq, scaling = hf_frequencies(config)
    ours = rope.frequencies(rope.from_hf(config.to_dict()))
    assert ulps(ours.inv_freq, inv_freq) <= 1
    assert ours.attention_scaling == scaling


@st.composite
def rope_rules(draw):
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3"]))
    original = draw(st.sampled_from([256, 1000, 4096, 8192]))
    rules = {"rope_type": kind, "rope_theta": draw(st.floats(100, 5e6))}
    if kind != "default":
        rules["factor"] = draw(st.floats(1, 40))
        rules["partial_rotary_factor"] = draw(st.sampled_from([0.25, 0.5, 1.0]))
    if kind in ("yarn", "llama3"):
        rules["original_max_position_embeddings"] = original
    if kind == "yarn":
        rules |= draw(st.sampled_from([{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.25}]))
        rules |= draw(st.sampled_from([{}, {"truncate": False}, {"mscale": 1.5, "mscale_all_dim": 0.75}]))
    if kind == "llama3":
        rules["low_freq_factor"] = draw(st.floats(0.5, 2))
        rules["high_freq_factor"] = draw(st.floats(2.5, 8))
    longest = original * draw(st.sampled_from([2, 4, 16]))
    length = draw(st.sampled_from([None, longest // 2, 3 * longest])) if kind == "dynamic" else None
    return draw(st.sampled_from([16, 32, 64, 80, 128])), rules, longest, length


@given(rope_rules(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_frequencies_agree_with_transformers_from_either_shape_of_config(drawn, old_shape):
    head_dim, rules, longest, length = drawn
    json = {"head_dim": head_dim, "max_position_embeddings": longest}
    if old_shape:
        rest = {k: v for k, v in rules.items() if k not in ("rope_theta", "rope_type", "partial_rotary_factor")}
        json["rope_theta"] = rules["rope_theta"]
        json["partial_rotary_factor"] = rules.get("partial_rotary_factor")
        json["rope_scaling"] = None if rules["rope_type"] == "default" else {"type": rules["rope_type"], **rest}
    else:
        json["rope_parameters"] = rules
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2}
    inv_freq, scaling = hf_frequencies(hugging_face()[1].LlamaConfig.from_dict(copy.deepcopy(json | sizes)), length)
    ours = rope.frequencies(rope.from_hf(json), length)
    # torch's vectorised pow is not correctly rounded: 1 ulp there is 2 after the reciprocal, and Llama 3's
    # interpolation, a difference of near numbers, enlarges it.
    assert ulps(ours.inv_freq, inv_freq) <= (16 if rules["rope_type"] == "llama3" else 3)
    assert ours.attention_scaling == pytest.approx(scaling, rel=1e-15)


def test_dynamic_ntk_depends_on_the_length_only_beyond_the_longest_position():
    config = rope.RopeConfig(64, scaling=rope.DynamicNtk(4.0, 2048))
    plain = rope.frequencies(rope.RopeConfig(64))
    assert rope.frequencies(config) == rope.frequencies(config, 2048) == plain
    assert rope.frequencies(config, 4096).inv_freq[-1] < plain.inv_freq[-1]


@pytest.mark.parametrize("first", [0, 1000, 120000])
def test_tables_agree_with_transformers_given_the_same_frequencies(first):
    config = hf_config(64, dict(RULES["llama-3.2-1b"][1], rope_theta=5e5, original_max_position_embeddings=8192))
    torch, _, modeling_llama = hugging_face()
    rotary = modeling_llama.LlamaRotaryEmbedding(config)
    positions = first + np.arange(300)
    cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
    freqs = rope.Frequencies(tuple(map(float, rotary.inv_freq)))
    ours = rope.tables(freqs, jnp.asarray(positions))
    for table, theirs in zip(ours, (cos, sin), strict=True):
        assert table.dtype == jnp.float32
        assert np.abs(np.asarray(table) - theirs[0, :, :32].numpy()).max() <= 2e-7


def test_half_layout_rotates_as_transformers_does():
    torch, _, modeling_llama = hugging_face()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 3, 16)).astype(np.float32)
    cos, sin = rope.tables(rope.frequencies(rope.RopeConfig(16)), jnp.arange(7) + 5)
    twice = [torch.from_numpy(np.concatenate([t, t], -1))[None] for t in (np.asarray(cos), np.asarray(sin))]
    theirs, _ = modeling_llama.apply_rotary_pos_emb(torch.from_numpy(x), torch.from_numpy(x), *twice, unsqueeze_dim=2)
    np.testing.assert_allclose(rope.apply(x, cos, sin), theirs.numpy(), atol=1e-6)


def test_interleaved_layout_is_a_product_of_complex_numbers():
    rng = np.random.default_rng(1)
    x, positions = rng.normal(size=(6, 2, 8)).astype(np.float32), np.array([3, 0, 9, 2, 2, 70])
    freqs = rope.frequencies(rope.RopeConfig(8, layout="interleaved"))
    turned = x.view(np.complex64) * np.exp(1j * positions[:, None, None] * np.array(freqs.inv_freq))
    expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(rope.rotate(jnp.asarray(x), jnp.asarray(positions), freqs), expected, atol=2e-6)


@given(st.sampled_from([(8, 8), (8, 4), (16, 6)]), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_layouts_convert_into_each_other_for_activations(dims, seed):
    H, R = dims
    x = np.random.default_rng(seed).normal(size=(5, 2, H)).astype(np.float32)
    config = rope.RopeConfig(H, rotary_dim=R)
    half = rope.frequencies(config)
    interleaved = rope.Frequencies(half.inv_freq, layout="interleaved")
    positions = jnp.arange(5) * 3
    one = rope.rotate(jnp.asarray(x), positions, interleaved)
    other = rope.to_interleaved(rope.rotate(jnp.asarray(rope.to_half(x, R)), positions, half), R)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(rope.to_interleaved(rope.to_half(x, R), R), x)


def test_layouts_convert_into_each_other_for_weights():
    rng = np.random.default_rng(2)
    N, H, D = 3, 8, 10
    x, weight = rng.normal(size=(4, D)), rng.normal(size=(N * H, D))
    converted = rope.to_half(weight.reshape(N, H, D), axis=1).reshape(N * H, D)
    np.testing.assert_array_equal((x @ converted.T).reshape(4, N, H), rope.to_half((x @ weight.T).reshape(4, N, H)))


def stablelm_rotation(x, positions):
    torch, _, modeling_llama = hugging_face()
    from transformers import StableLmConfig
    from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

    config = StableLmConfig(
        hidden_size=64,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    cos, sin = StableLmRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)[None])
    R = cos.shape[-1]
    x = torch.from_numpy(x)
    turned, _ = modeling_llama.apply_rotary_pos_emb(x[..., :R], x[..., :R], cos, sin, unsqueeze_dim=2)
    return torch.cat([turned, x[..., R:]], -1).numpy(), rope.from_hf(config.to_dict())


def test_partial_rotary_rotates_the_first_dimensions_and_passes_the_others():
    x, positions = np.random.default_rng(3).normal(size=(1, 9, 2, 32)).astype(np.float32), 4 + np.arange(9)
    theirs, config = stablelm_rotation(x, positions)
    assert config.rotary_dim == 8
    ours = rope.rotate(jnp.asarray(x), jnp.asarray(positions), rope.frequencies(config))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_array_equal(ours[..., 8:], x[..., 8:])
    whole = rope.rotate(jnp.asarray(x), jnp.asarray(positions), rope.frequencies(rope.RopeConfig(32)))
    assert np.abs(whole - theirs).max() > 0.1


def test_scores_depend_on_the_distance_of_positions_alone():
    rng = np.random.default_rng(4)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 32)), jnp.float32) for _ in range(2))
    freqs = rope.frequencies(rope.RopeConfig(32))

    def score(t, s):
        return jnp.sum(rope.rotate(q, jnp.array([t]), freqs) * rope.rotate(k, jnp.array([s]), freqs))

    np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3


def test_packed_positions_may_differ_per_batch_element_and_be_traced():
    x = jnp.ones((2, 3, 1, 8))
    freqs = rope.frequencies(rope.RopeConfig(8))
    positions = jnp.array([[0, 1, 0], [5, 6, 7]])
    together = jax.jit(rope.rotate, static_argnums=2)(x, positions, freqs)
    for b in range(2):
        np.testing.assert_allclose(together[b], rope.rotate(x[b], positions[b], freqs), atol=1e-6)


def test_bfloat16_is_rounded_once():
    x = np.random.default_rng(5).normal(size=(50, 2, 16)).astype(ml_dtypes.bfloat16)
    freqs = rope.frequencies(rope.RopeConfig(16))
    wide = rope.rotate(jnp.asarray(x, jnp.float32), jnp.arange(50), freqs)
    np.testing.assert_array_equal(rope.rotate(jnp.asarray(x), jnp.arange(50), freqs), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rope.RopeConfig(64, rotary_dim=7), "rotary_dim=7 must be even"),
        (lambda: rope.RopeConfig(64, rotary_dim=66), "at most head_dim=64"),
        (lambda: rope.RopeConfig(64, layout="meta"), "layout='meta'"),
        (lambda: rope.from_hf({"head_dim": 8, "rope_scaling": {"type": "linear"}}), "'factor'"),
        (lambda: rope.from_hf({"head_dim": 8, "rope_parameters": {"rope_type": "axial"}}), "'axial' is not one of"),
        (lambda: rope.from_hf({"rope_parameters": {"a": 1}, "rope_scaling": {"b": 1}}), "both"),
        (lambda: rope.apply(jnp.ones((1, 1, 4)), jnp.ones((1, 4)), jnp.ones((1, 4))), "H=4"),
    ],
)
def test_wrong_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
