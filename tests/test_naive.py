"""The dense implementation: every derivative, and the attention weights that it alone can show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from tolerance import assert_close

from jaxattn import Causal, Lengths, attention_weights, dot_product_attention


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def weights_of(q, k, bias=None, **options):
    return jax.device_get(jax.jit(functools.partial(attention_weights, **options))(q, k, bias))


MASK = Causal(np.array([0, -2], np.int32)) & Lengths(key=3)


def test_derivatives_in_both_modes_are_those_of_finite_differences():
    with jax.enable_x64():
        q, bias = jnp.asarray(random(2, 4, 4, 3, dtype=np.float64)), jnp.asarray(random(4, 3, dtype=np.float64))
        k, v = (jnp.asarray(random(2, 3, 2, 3, seed=i, dtype=np.float64)) for i in (1, 2))

        @jax.jit
        def attend(q, k, v, bias):
            out, lse = dot_product_attention(
                q, k, v, bias, MASK, logits_soft_cap=2.0, implementation="naive", return_residual=True
            )
            return out, jnp.where(lse == -jnp.inf, 0, lse)

        check_grads(attend, (q, k, v, bias), order=1, modes=("fwd", "rev"))


def test_hessian_is_symmetric_and_zero_for_rows_that_attend_nothing():
    q, k = random(2, 4, 2, 2), random(2, 3, 1, 2)

    def loss(q):
        return (dot_product_attention(q, k, k, mask=MASK, implementation="naive") ** 3).sum()

    hessian = np.asarray(jax.jit(jax.hessian(loss))(q)).reshape(q.size, q.size)
    assert_close(hessian, hessian.T, "gradient")
    empty = np.zeros(q.shape, bool)
    empty[1, :2] = True  # offset -2: queries 0 and 1 of the second batch element see no key
    assert (hessian[empty.ravel()] == 0).all()
    assert np.abs(hessian).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_sum_to_one_are_exactly_zero_where_masked_and_give_the_output(dtype):
    q, k, v = (random(2, n, h, 8, seed=i).astype(dtype) for i, (n, h) in enumerate(((5, 4), (7, 2), (7, 2))))
    mask = Causal(np.array([2, -2])) & ~Lengths(key=1)
    weights = weights_of(q, k, mask=mask)
    assert weights.shape == (2, 4, 5, 7)
    assert weights.dtype == np.float32
    allowed = np.broadcast_to(mask.to_array(5, 7), weights.shape)
    some = allowed.any(-1)
    assert_close(weights.sum(-1), some.astype(np.float32))
    assert not some.all()
    assert (weights[~allowed] == 0).all()
    assert (weights[allowed] > 0).all()
    values = np.repeat(v.astype(np.float32), 2, axis=2)
    out = np.einsum("bnts,bsnh->btnh", weights.astype(dtype).astype(np.float32), values)
    expected = dot_product_attention(q, k, v, mask=mask, implementation="naive")
    assert_close(expected, out.astype(dtype), "cast" if dtype == "bfloat16" else "reordered")


def test_weights_without_batch_axis_are_those_with_it():
    q, k = random(5, 4, 8), random(7, 2, 8)
    assert_close(weights_of(q, k, is_causal=True), weights_of(q[None], k[None], is_causal=True)[0])


def test_temperature_goes_through_scale():
    q, k = random(1, 6, 1, 16), random(1, 9, 1, 16)
    logits = np.einsum("btnh,bsnh->bnts", np.float64(q), np.float64(k)) / 4
    entropies, scaled = [], jax.jit(lambda scale: attention_weights(q, k, scale=scale))
    for temperature in (0.25, 1.0, 4.0):
        weights = np.asarray(scaled(1 / 4 / temperature))
        expected = np.exp(logits / temperature)
        expected /= expected.sum(-1, keepdims=True)
        assert_close(weights, expected.astype(np.float32))
        entropies.append(float(-(weights * np.log(weights)).sum(-1).mean()))
    assert entropies == sorted(entropies)
    assert_close(scaled(0.0), np.full((1, 1, 6, 9), 1 / 9, np.float32))


def test_weights_take_bias_lengths_window_and_cap_as_attention_does():
    q, k = random(2, 5, 2, 8), random(2, 6, 1, 8)
    bias, options = random(2, 5, 6), dict(key_value_seq_lengths=np.array([6, 3]), local_window_size=2)
    weights = weights_of(q, k, bias, logits_soft_cap=1.0, **options)
    identity = np.broadcast_to(np.eye(6, dtype=np.float32)[None, :, None], (2, 6, 1, 6))
    out = dot_product_attention(q, k, identity, bias, logits_soft_cap=1.0, implementation="naive", **options)
    assert_close(weights, np.asarray(out).transpose(0, 2, 1, 3))


def test_logits_of_half_precision_are_float32():
    q = np.full((1, 1, 1, 64), 40.0, np.float16)  # q k = 102400 overflows float16
    out, lse = dot_product_attention(q, q, q, scale=1.0, implementation="naive", return_residual=True)
    assert float(lse[0, 0, 0]) == 102400
    assert lse.dtype == np.float32
    assert_close(out, q, "same")
