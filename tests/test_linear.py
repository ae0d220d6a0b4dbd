"""Linear attention: its forms agree, its state decodes, its random features converge, its cost is linear."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from jaxattn import profiler
from jaxattn.linear import Cosine, EluPlusOne, PositiveRandomFeatures, initial_state, linear_attention

B, T, N, K, H, HV = 2, 13, 4, 2, 8, 5
MAPS = {
    "elu": EluPlusOne(),
    "cosine": Cosine(max_length=64),
    "random features": PositiveRandomFeatures(np.random.default_rng(5).standard_normal((24, H), np.float32)),
}


def operands(T=T, S=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S or T, K, H), (B, S or T, K, HV)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def by_hand(q, k, v, feature_map, is_causal, scale):
    """The definition, one query at a time, in float64."""

    def features(x, is_query):
        run = jax.jit(lambda x, positions: feature_map(x, positions, is_query))
        return np.asarray(run(x.swapaxes(1, 2) * scale**0.5, np.arange(x.shape[1])), np.float64)

    query_features, key_features = features(q, True), features(k, False)
    v = np.asarray(v, np.float64)
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(q.shape[:3]):
        last = t + 1 if is_causal else k.shape[1]
        weights = key_features[b, n // (N // K), :last] @ query_features[b, n, t]
        out[b, t, n] = weights @ v[b, :last, n // (N // K)] / (weights.sum() or 1)
    return out


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_equals_the_definition(name, is_causal):
    q, k, v = operands(S=None if is_causal else 9)
    scale = H**-0.5 if name == "random features" else 1
    expected = by_hand(q, k, v, MAPS[name], is_causal, scale).astype("float32")
    forms = ("parallel", "chunked", "recurrent") if is_causal else ("parallel",)

    @jax.jit
    def run(q, k, v):
        options = {"feature_map": MAPS[name], "is_causal": is_causal, "chunk": 4}
        return {form: linear_attention(q, k, v, form=form, **options) for form in forms}

    assert_close(run(q, k, v), dict.fromkeys(forms, expected))


@pytest.fixture(scope="module")
def with_gradients():
    """Output, state and gradients of a form, worked out once."""

    @functools.cache
    def run(form, chunk=None):
        def f(q, k, v):
            out, state = linear_attention(
                q, k, v, feature_map=EluPlusOne(), is_causal=True, form=form, chunk=chunk or 64, return_state=True
            )
            return (out**2).sum() + (state.values**2).sum(), (out, state)

        (_, results), gradients = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*operands())
        out, state = results
        return out, state.values, state.normaliser, gradients

    return run


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_any_chunk_gives_the_same_output_state_and_gradients(with_gradients, chunk):
    assert_close(with_gradients("chunked", chunk), with_gradients("parallel"), "gradient")


def test_decoding_a_token_at_a_time_from_the_state_continues_the_prompt():
    q, k, v = operands()
    for feature_map in MAPS.values():
        options = {"feature_map": feature_map, "is_causal": True, "return_state": True}
        prompt = jax.jit(functools.partial(linear_attention, chunk=4, **options))
        whole, _ = prompt(q, k, v)
        _, state = prompt(*(x[:, :6] for x in (q, k, v)))
        shapes = jax.tree.map(jnp.shape, state)
        step = jax.jit(functools.partial(linear_attention, form="recurrent", **options))
        for t in range(6, 9):
            token, state = step(*(x[:, t : t + 1] for x in (q, k, v)), state=state)
            assert_close(token[:, 0], whole[:, t])
        assert jax.tree.map(jnp.shape, state) == shapes
        assert int(state.length) == 9


def test_random_features_estimate_softmax_attention_at_the_rate_of_one_over_the_root_of_their_number():
    # Lemma 2: the error of one weight is exp(|q + k|^2 / 2) / sqrt(F) times the weight: short vectors, to see the rate.
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 16, 2, 16), np.float32)
    q, k = 0.35 * q, 0.35 * k

    @functools.partial(jax.jit, static_argnums=1)
    def error(seeds, count):
        def squared(seed):
            features = PositiveRandomFeatures.orthogonal(jax.random.key(seed), count, 16)
            return (linear_attention(q, k, v, feature_map=features) - jax.nn.dot_product_attention(q, k, v)) ** 2

        return jnp.sqrt(jax.lax.map(squared, seeds).mean())

    counts = (128, 512, 2048)
    errors = [float(error(np.arange(10), count)) for count in counts]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.08), errors


def test_random_features_are_orthogonal_within_a_block_with_gaussian_norms():
    w = np.asarray(PositiveRandomFeatures.orthogonal(jax.random.key(0), 1024, 16).projection).reshape(-1, 16, 16)
    gram = np.einsum("bih,bjh->bij", w, w)
    off = gram * (1 - np.eye(16))
    assert np.abs(off).max() < 1e-4 * np.abs(gram).max()
    assert abs((w**2).sum(-1).mean() - 16) < 1


def test_random_features_have_no_preferred_direction():
    w = np.asarray(PositiveRandomFeatures.orthogonal(jax.random.key(0), 4096, 8).projection)
    mean_of_one = (w / np.linalg.norm(w, axis=1, keepdims=True)).mean(0)
    assert np.abs(mean_of_one).max() < 5 * (8 * 4096) ** -0.5


def test_cosine_weighs_near_tokens_more_and_never_negatively():
    features = jax.jit(Cosine(max_length=32), static_argnums=2)(np.ones((1, 32, 4), np.float32), np.arange(32), True)[0]
    weights = np.asarray(features) @ np.asarray(features).T
    assert weights.min() > 0
    assert np.all(np.diff(weights[0]) < 0)


def causal(T):
    q = jax.ShapeDtypeStruct((1, T, 2, 16), "float32")
    return lambda q, k, v: linear_attention(q, k, v, feature_map=EluPlusOne(), is_causal=True), (q, q, q)


def test_operations_are_linear_in_length():
    short, long = (profiler.profile(f, *operands).flops for f, operands in map(causal, (1024, 2048)))
    assert 1.9 * short <= long <= 2.1 * short
    assert long > 2048 * 2 * 4 * 16 * 16  # the state is added to and read, for each token and head


def test_memory_is_linear_in_length():
    def cost(T):
        f, operands = causal(T)
        return jax.jit(f).lower(*operands).compile().memory_analysis().temp_size_in_bytes

    short, middle, long = (cost(T) for T in (4096, 8192, 16384))
    assert long - middle <= 2.1 * (middle - short)
    assert long < 16384 * 1024


def test_a_query_whose_weights_are_all_zero_gives_zero():
    q, k, v = operands()
    out = jax.jit(functools.partial(linear_attention, feature_map=Cosine(64), is_causal=True))(-np.abs(q), k, v)
    assert np.all(np.asarray(out) == 0)


def test_decoding_past_the_longest_length_is_refused():
    q, k, v = (x[:, :1] for x in operands())
    options = {"feature_map": Cosine(max_length=12), "is_causal": True}
    state = initial_state(B, K, 2 * H, HV)
    linear_attention(q, k, v, state=state._replace(length=jnp.asarray(11)), **options)
    with pytest.raises(ValueError, match="max_length=12 must be above the last position, 12"):
        linear_attention(q, k, v, state=state._replace(length=jnp.asarray(12)), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "fast"}, "form='fast' must be one of parallel, chunked, recurrent"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"key": np.ones((B, 9, K, H), np.float32), "is_causal": True}, "needs T = S, got T=13 and S=9"),
        ({"key": np.ones((B, T, 3, H), np.float32)}, "N=4 query heads must be a multiple of K=3"),
        ({"state": initial_state(B, K, H, HV)}, "it needs is_causal=True"),
        ({"query": np.ones((T, N, H), np.float32)}, r"query of shape \(13, 4, 8\) must have the four axes"),
        ({"value": np.ones((B, 9, K, HV), np.float32)}, r"value \(2, 9, 2, 5\) must be \[B=2, S, K, H=8\]"),
        ({"feature_map": Cosine(max_length=12)}, "max_length=12 must be at least the 13 tokens"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    q, k, v = operands()
    with pytest.raises(ValueError, match=message):
        linear_attention(**({"query": q, "key": k, "value": v, "feature_map": EluPlusOne()} | arguments))
