"""The online softmax state: any tiles in any order give softmax, and absent rows stay finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import jaxattn
from jaxattn import online_softmax

ROWS, S, H = 6, 12, 4


def whole(logits, values):
    """Softmax over all keys at once, in float64; rows of -inf give 0 and -inf."""
    logits, values = np.float64(logits), np.float64(values)
    m = np.maximum(logits.max(-1, keepdims=True), -1e300)
    weights = np.exp(logits - m)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total[:, 0] == 0, -np.inf, m[:, 0] + np.log(total[:, 0]))
    return weights / np.where(total == 0, 1, total) @ values, lse


@functools.partial(jax.jit, static_argnums=2)
def in_tiles(logits, values, tiles):
    state = online_softmax.start((ROWS,), H)
    for start, stop in tiles:
        state = online_softmax.update(state, logits[:, start:stop], values[start:stop])
    return online_softmax.finish(state)


TILES = st.sampled_from(
    [((0, 12),), ((6, 12), (0, 6)), ((0, 1), (5, 12), (1, 5)), ((11, 12), *((i, i + 1) for i in range(11)))]
)


@given(st.integers(0, 1000), TILES, st.sampled_from([0.0, 0.4, 0.9]), st.sampled_from([1.0, 30.0]))
def test_any_tiles_in_any_order_give_softmax(seed, tiles, masked, scale):
    rng = np.random.default_rng(seed)
    logits = np.where(rng.random((ROWS, S)) < masked, -np.inf, scale * rng.standard_normal((ROWS, S)))
    logits[0] = -np.inf
    logits[1, :6] = -np.inf  # its first tile, in one of the orders, is all masked
    values = rng.standard_normal((S, H))
    logits, values = np.float32(logits), np.float32(values)
    out, lse = in_tiles(logits, values, tiles)
    expected_out, expected_lse = whole(logits, values)
    assert_close((out, lse), (np.float32(expected_out), np.float32(expected_lse)))
    assert (out[0] == 0).all()
    assert lse[0] == -np.inf


def test_logits_too_large_for_exp_do_not_overflow():
    logits = np.float32([[1e4, -1e4] * 6] * ROWS)
    out, lse = in_tiles(logits, np.ones((S, H), np.float32), ((0, 1), (1, 12)))
    assert_close(out, np.ones((ROWS, H), np.float32))
    assert_close(lse, np.full(ROWS, 1e4 + np.log(6), np.float32))


def test_the_state_before_any_key_is_absent():
    out, lse = online_softmax.finish(online_softmax.start((3,), H))
    np.testing.assert_array_equal(out, np.zeros((3, H)))
    np.testing.assert_array_equal(lse, np.full(3, -np.inf))


def test_gradients_through_tiles_are_those_of_softmax_and_zero_for_absent_rows():
    rng = np.random.default_rng(0)
    logits, values = np.float32(rng.standard_normal((ROWS, S))), np.float32(rng.standard_normal((S, H)))
    logits[0], logits[1, :6] = -np.inf, -np.inf
    weigh = np.float32(rng.standard_normal((ROWS, H + 1)))

    def loss(function):
        def of(logits, values):
            out, lse = function(logits, values)
            return (out * weigh[:, :H]).sum() + jnp.where(lse == -jnp.inf, 0, lse * weigh[:, H]).sum()

        return jax.jit(jax.grad(of, argnums=(0, 1)))(logits, values)

    def plain(logits, values):
        m = jnp.where(logits.max(-1) == -jnp.inf, 0, logits.max(-1))
        weights = jnp.exp(logits - m[:, None])
        total = jnp.where(weights.sum(-1) == 0, 1, weights.sum(-1))
        return weights @ values / total[:, None], jnp.where(weights.sum(-1) == 0, -jnp.inf, m + jnp.log(total))

    tiled = loss(lambda logits, values: in_tiles(logits, values, ((6, 12), (0, 6))))
    assert_close(tiled, loss(plain), "gradient")
    assert (tiled[0][0] == 0).all()


def random_attention(seed, S=10):
    q, k, v = (np.float32(np.random.default_rng((seed, i)).standard_normal((2, S, 2, 8))) for i in range(3))
    return q[:, :5], k, v


@functools.partial(jax.jit, static_argnums=(4, 5))
def part(q, k, v, allowed, start, stop):
    return jaxattn.dot_product_attention(
        q, k[:, start:stop], v[:, start:stop], mask=allowed[:, start:stop], implementation="naive", return_residual=True
    )


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([(3, 4), (1, 9), (5, 6)]))
def test_merge_over_any_split_of_the_keys_is_the_whole(seed, cuts):
    q, k, v = random_attention(seed)
    allowed = np.random.default_rng(seed).random((5, 10)) < 0.3
    allowed[0], allowed[1, : cuts[0]], allowed[2, cuts[0] :] = False, False, False
    pieces = [part(q, k, v, allowed, a, b) for a, b in ((0, cuts[0]), cuts, (cuts[1], 10))]
    forward = jaxattn.merge(*jaxattn.merge(*pieces[0], *pieces[1]), *pieces[2])
    backward = jaxattn.merge(*pieces[2], *jaxattn.merge(*pieces[1], *pieces[0]))
    expected = part(q, k, v, allowed, 0, 10)
    assert_close(forward, expected)
    assert_close(backward, expected)
    assert (forward[0][:, 0] == 0).all()
    assert (forward[1][:, 0] == -np.inf).all()


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_gradients_through_merge_are_those_of_the_whole(implementation):
    q, k, v = random_attention(0)
    allowed = np.ones((5, 10), bool)
    allowed[0], allowed[1, :4], allowed[2, 4:] = False, False, False

    def attend(q, k, v, allowed):
        return jaxattn.dot_product_attention(q, k, v, mask=allowed, implementation=implementation, return_residual=True)

    def merged(q, k, v):
        a, b = (attend(q, k[:, s], v[:, s], allowed[:, s]) for s in (slice(0, 4), slice(4, 10)))
        return jaxattn.merge(*a, *b)

    def gradient(function):
        def loss(q, k, v):
            out, lse = function(q, k, v)
            return (out**2).sum() + jnp.where(lse == -jnp.inf, 0, lse**2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    got = gradient(merged)
    assert_close(got, gradient(lambda q, k, v: attend(q, k, v, allowed)), "gradient")
    assert (got[0][:, 0] == 0).all()


def test_merge_keeps_the_dtypes():
    out, lse = jnp.ones((1, 3, 2, 4), jnp.bfloat16), jnp.zeros((1, 3, 2), jnp.float32)
    merged_out, merged_lse = jaxattn.merge(out, lse, 2 * out, lse)
    assert merged_out.dtype == jnp.bfloat16
    assert merged_lse.dtype == jnp.float32
    assert_close(merged_out, 1.5 * out, "cast")
    assert_close(merged_lse, lse + np.float32(np.log(2)))


def test_merge_names_the_shapes_that_do_not_fit():
    out, lse = jnp.ones((1, 3, 2, 4)), jnp.zeros((1, 3, 2))
    with pytest.raises(ValueError, match=r"merge needs .* got \[1, 3, 2, 4\], \[1, 3\]"):
        jaxattn.merge(out, lse[..., 0], out, lse)
