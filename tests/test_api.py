"""dot_product_attention as a drop-in for jax.nn's, its errors, explain, and attention_weights."""

import dataclasses
import functools
import inspect
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from tolerance import assert_close

import jaxattn
from jaxattn import Blockwise, Causal, Implementation, Naive, attention_weights, dot_product_attention, explain

B, T, S, N, K, H = 2, 7, 9, 4, 2, 8
IMPLEMENTATIONS = ["naive", Blockwise(block_q=4, block_k=4), "xla"]


def operands(dtype="float32", batched=True):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    return arrays if batched else [x[0] for x in arrays]


def noise(shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def choice(shape, seed=2):
    """A boolean mask that leaves every query at least the first key: jax.nn means something else by empty rows."""
    return (jax.random.uniform(jax.random.key(seed), shape) < 0.5).at[..., 0].set(True)


CALLS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal with T unlike S": {"is_causal": True},
    "4-D mask": {"mask": choice((B, N, T, S))},
    "4-D broadcast mask": {"mask": choice((B, 1, 1, S))},
    "3-D mask": {"mask": choice((N, T, S))},
    "2-D mask": {"mask": choice((T, S))},
    "4-D bias": {"bias": noise((B, N, T, S))},
    "4-D broadcast bias": {"bias": noise((1, N, 1, S))},
    "3-D bias": {"bias": noise((1, T, S))},
    "2-D bias": {"bias": noise((T, 1))},
    "key lengths": {"key_value_seq_lengths": jnp.array([3, 9], jnp.int32)},
    "query and key lengths": {
        "query_seq_lengths": jnp.array([7, 2], jnp.int32),
        "key_value_seq_lengths": jnp.array([9, 4], jnp.int32),
    },
    "window alone": {"local_window_size": (2, 3)},
    "window of one int": {"local_window_size": 1, "is_causal": True},
    "everything": {
        "bias": noise((N, T, S)),
        "mask": choice((B, 1, T, S)),
        "is_causal": True,
        "key_value_seq_lengths": jnp.array([5, 9], jnp.int32),
        "scale": 0.5,
    },
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_agrees_with_jax_nn(call, implementation):
    arguments = CALLS[call]
    ours, lse = dot_product_attention(*operands(), **arguments, implementation=implementation, return_residual=True)
    theirs, their_lse = jax.jit(functools.partial(jax.nn.dot_product_attention, return_residual=True, **arguments))(
        *operands()
    )
    assert_close(ours, theirs)
    # Where a length leaves a query nothing to attend, jax.nn's residual is a large negative number, ours -inf.
    absent = np.asarray(their_lse) < -1e30
    assert implementation == "xla" or np.all(np.asarray(lse)[absent] == -np.inf)
    assert_close(np.where(absent, 0, lse), np.where(absent, 0, their_lse))


def test_signature_is_a_superset_of_jax_nn():
    ours = list(inspect.signature(dot_product_attention).parameters.values())
    theirs = list(inspect.signature(jax.nn.dot_product_attention).parameters.values())
    names = [p.name for p in ours]
    for parameter in theirs:
        mine = ours[names.index(parameter.name)]
        assert (mine.kind, mine.default) == (parameter.kind, parameter.default), parameter.name
    positional = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names[: len(positional)] == positional


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_batch_axis_may_be_absent(implementation):
    out, lse = dot_product_attention(
        *operands(batched=False), is_causal=True, implementation=implementation, return_residual=True
    )
    whole, whole_lse = dot_product_attention(
        *operands(), is_causal=True, implementation=implementation, return_residual=True
    )
    assert (out.shape, lse.shape) == ((T, N, H), (T, N))
    assert_close((out, lse), (whole[0], whole_lse[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_output_keeps_the_dtype_and_the_residual_is_float32(dtype, implementation):
    out, lse = dot_product_attention(*operands(dtype), implementation=implementation, return_residual=True)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)


@pytest.mark.parametrize("implementation", ["loops", "naive", "blockwise"])
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        q, k, v = (x[:, :3, :2].astype("float64") for x in operands())
        out, lse = dot_product_attention(q, k, v, implementation=implementation, return_residual=True)
        logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert (out.dtype, lse.dtype) == ("float64", "float64")
        assert_close(out, np.einsum("bnts,bsnh->btnh", weights, v))


@pytest.mark.parametrize("implementation", ["loops", "naive", Blockwise(block_q=2, block_k=2)], ids=str)
def test_a_query_that_may_attend_nothing_gives_zero_and_zero_gradients(implementation):
    q, k, v = (x[:, :4, :2] for x in operands())
    mask = jnp.ones((4, 4), bool).at[1].set(False)

    def loss(q, k, v, bias):
        out, lse = dot_product_attention(q, k, v, bias, mask, implementation=implementation, return_residual=True)
        return (out**2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum(), (out, lse)

    (_, (out, lse)), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, noise((4, 4)))
    assert np.all(np.asarray(out[:, 1]) == 0)
    assert np.all(np.asarray(lse[:, 1]) == -np.inf)
    assert np.all(np.asarray(gradients[0][:, 1]) == 0)
    assert np.all(np.asarray(gradients[3][1]) == 0)
    assert all(np.isfinite(x).all() and np.any(x != 0) for x in gradients)


@pytest.mark.parametrize("implementation", ["loops", "naive", Blockwise(block_q=2, block_k=2)], ids=str)
def test_keys_that_nothing_may_attend_may_hold_nan(implementation):
    q, k, v = (x[:, :4, :2] for x in operands())
    used = jnp.arange(4) < 3

    def run(k, v):
        def f(q, k, v):
            return dot_product_attention(q, k, v, mask=used[None, :], implementation=implementation)

        out, pullback = jax.vjp(f, q, k, v)
        return out, *pullback(out)

    spoilt = [jnp.where(used[None, :, None, None], x, jnp.nan) for x in (k, v)]
    clean = [jnp.where(used[None, :, None, None], x, 0) for x in (k, v)]
    assert_close(run(*spoilt), run(*clean), "same")


def test_bias_of_minus_infinity_masks_and_a_large_negative_one_does_not():
    q, k, v = operands()
    for implementation in ("naive", "blockwise"):
        hidden = dot_product_attention(q, k, v, jnp.full((T, S), -jnp.inf), implementation=implementation)
        assert np.all(np.asarray(hidden) == 0)
        same = dot_product_attention(q, k, v, jnp.full((T, S), -1e4), implementation=implementation)
        assert np.abs(same - dot_product_attention(q, k, v, implementation=implementation)).max() < 1e-2


def test_soft_cap_bounds_the_logits_before_the_bias():
    q, k, v = operands()
    for implementation in ("naive", "blockwise"):
        out = dot_product_attention(q * 100, k, v, logits_soft_cap=2.0, implementation=implementation)
        logits = np.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H) * 100, k) / np.sqrt(H)
        weights = jax.nn.softmax(2 * np.tanh(logits / 2), axis=-1)
        assert_close(out, np.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H).astype("float32"))


@pytest.mark.parametrize("implementation", ["naive", "blockwise", "xla"])
def test_scale_may_be_traced_and_differentiated(implementation):
    def f(scale):
        return (dot_product_attention(*operands(), scale=scale, implementation=implementation) ** 2).sum()

    gradient = jax.jit(jax.grad(f))(0.3)
    assert abs(gradient - (f(0.301) - f(0.299)) / 0.002) < 1e-2 * abs(gradient)


BAD = {
    "N=6 query heads must be a multiple of K=4 key/value heads": {"query": jnp.ones((2, 3, 6, 8))},
    "key [3, 5, 4, 8] must have B=2": {"key": jnp.ones((3, 5, 4, 8))},
    "key [2, 5, 4, 16] must have H=8": {"key": jnp.ones((2, 5, 4, 16))},
    "value [2, 6, 4, 8] must have S=5": {"value": jnp.ones((2, 6, 4, 8))},
    "value [2, 5, 2, 8] must have K=4": {"value": jnp.ones((2, 5, 2, 8))},
    "query, key and value must be [B, T, N, H]": {"query": jnp.ones((3, 4, 8))},
    "one floating dtype, got float32, bfloat16": {"key": jnp.ones((2, 5, 4, 8), "bfloat16")},
    "got int32": {name: jnp.ones((2, 5, 4, 8), "int32") for name in ("query", "key", "value")},
    "bias [3, 5, 3] must have 2 to 4 dimensions that broadcast to [B=2, N=4, T=3, S=5]": {"bias": jnp.ones((3, 5, 3))},
    "a boolean array goes to mask": {"bias": jnp.ones((3, 5), bool)},
    "an additive mask goes to bias": {"mask": jnp.ones((3, 5))},
    "mask [5] must have 2 to 4 dimensions": {"mask": jnp.ones(5, bool)},
    "query_seq_lengths must be an int array of shape [B=2], got int32[3]": {"query_seq_lengths": jnp.ones(3, int)},
    "key_value_seq_lengths must be an int array": {"key_value_seq_lengths": jnp.ones(2)},
    "local_window_size=(1, 2, 3) must be": {"local_window_size": (1, 2, 3)},
    "local_window_size=-1 must be": {"local_window_size": -1},
    "local_window_size=1.5 must be": {"local_window_size": 1.5},
    "every axis must have at least one entry, got B=2, T=0": {"query": jnp.ones((2, 0, 4, 8))},
    "logits_soft_cap=0.0 must be a positive number": {"logits_soft_cap": 0.0},
    "implementation='flash' must be None, one of": {"implementation": "flash"},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named_with_what_would_be_right(message):
    good = {"query": jnp.ones((2, 3, 4, 8)), "key": jnp.ones((2, 5, 4, 8)), "value": jnp.ones((2, 5, 4, 8))}
    with pytest.raises(ValueError, match=re.escape(message)):
        dot_product_attention(**(good | BAD[message]))


def test_a_named_implementation_never_falls_back():
    q, k, v = (jnp.ones((1, 512, 1, 8)) for _ in range(3))
    with pytest.raises(NotImplementedError, match=re.escape("'loops' cannot compute this: B*N*T*S = 262144 scores")):
        dot_product_attention(q, k, v, implementation="loops")
    with pytest.raises(NotImplementedError, match="'cudnn' cannot compute this: cuDNN needs an NVIDIA GPU"):
        dot_product_attention(q, k, v, implementation="cudnn")
    with pytest.raises(NotImplementedError, match=r"'xla' cannot compute this: .* no soft cap"):
        dot_product_attention(q, k, v, logits_soft_cap=1.0, implementation="xla")


def test_an_implementation_object_runs_with_its_own_tuning():
    class Recording(Naive):
        def attend(self, problem):
            seen.append(problem.sizes)
            return super().attend(problem)

    seen = []
    out = dot_product_attention(*operands(), implementation=Recording())
    assert seen == [(B, T, S, N, K, N // K)]
    assert_close(out, dot_product_attention(*operands(), implementation="naive"), "same")
    assert issubclass(Recording, Implementation)


def test_explain_says_what_runs_and_why_others_do_not():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands()]
    lines = {line.split()[0]: line for line in explain(*shapes, logits_soft_cap=5.0).splitlines()}
    assert set(lines) == {"loops", "naive", "blockwise", "triton", "xla", "cudnn"}
    running = [name for name, line in lines.items() if " runs: " in line]
    assert running == (["triton"] if jax.default_backend() == "gpu" else ["blockwise"])
    assert "cannot run: jax.nn.dot_product_attention has no soft cap" in lines["xla"]
    named = explain(*shapes, implementation="naive").splitlines()
    assert [line for line in named if " runs: " in line] == ["naive      runs: asked for by name"]


def test_explain_shows_an_own_implementation():
    @dataclasses.dataclass(frozen=True)
    class Mine(Naive):
        name: ClassVar[str] = "mine"

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands()]
    running = [line for line in explain(*shapes, implementation=Mine()).splitlines() if " runs: " in line]
    assert running == ["mine       runs: asked for by name"]


def test_explain_raises_as_the_function_does():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands()]
    with pytest.raises(ValueError, match="N=4 query heads"):
        explain(shapes[0], *(jax.ShapeDtypeStruct((B, S, 3, H), "float32"),) * 2)


def test_explain_and_the_function_take_the_same_arguments():
    assert list(inspect.signature(explain).parameters) == list(inspect.signature(dot_product_attention).parameters)


def test_attention_weights_are_a_distribution_with_exact_zeros():
    q, k, v = operands()
    mask = choice((B, N, T, S)).at[0, 0, 0].set(False)
    weights = attention_weights(q, k, mask=mask)
    assert weights.shape == (B, N, T, S)
    assert np.all(np.asarray(weights)[~np.asarray(mask)] == 0)
    sums = np.ones((B, N, T), "float32")
    sums[0, 0, 0] = 0
    assert_close(weights.sum(-1), sums)
    out = np.einsum("bkgts,bskh->btkgh", np.asarray(weights).reshape(B, K, N // K, T, S), v)
    assert_close(dot_product_attention(q, k, v, mask=mask), out.reshape(B, T, N, H))


def test_softmax_temperature_goes_through_scale():
    q, k, _ = operands()
    cold, hot = (attention_weights(q, k, scale=1 / temperature / np.sqrt(H)) for temperature in (0.01, 100.0))
    assert cold.max(-1).min() > 0.5
    assert np.abs(hot - 1 / S).max() < 0.02


@pytest.mark.parametrize("axes", [(0, 0, 0), (2, None, None), (None, 1, 3)], ids=str)
@pytest.mark.parametrize("implementation", ["naive", Blockwise(block_q=4, block_k=4)], ids=str)
def test_vmap_over_any_axis_equals_a_loop(axes, implementation):
    stacked = [
        x if axis is None else jnp.stack([x, 2 * x, x - 1], axis) for x, axis in zip(operands(), axes, strict=True)
    ]

    def value_and_gradient(q, k, v):
        out, pullback = jax.vjp(
            lambda *x: dot_product_attention(*x, is_causal=True, implementation=implementation), q, k, v
        )
        return out, *pullback(out)

    batched = jax.vmap(value_and_gradient, axes)(*stacked)
    for i in range(3):
        one = [x if axis is None else jnp.take(x, i, axis) for x, axis in zip(stacked, axes, strict=True)]
        assert_close([x[i] for x in batched], list(value_and_gradient(*one)), "gradient")


@pytest.mark.parametrize("implementation", ["naive", Blockwise(block_q=4, block_k=4)], ids=str)
def test_remat_changes_no_gradient(implementation):
    def f(q, k, v):
        return (dot_product_attention(q, k, v, is_causal=True, implementation=implementation) ** 2).sum()

    plain, again = (jax.jit(jax.grad(g, (0, 1, 2)))(*operands()) for g in (f, jax.checkpoint(f)))
    assert_close(plain, again)


def test_naive_has_forward_mode_and_hessian():
    q, k, v = (x[:1, :3, :2, :4] for x in operands())

    def f(q):
        return (dot_product_attention(q, k, v, mask=Causal(), implementation="naive") ** 2).sum()

    tangent = noise(q.shape, 5)
    _, forward = jax.jvp(f, (q,), (tangent,))
    assert_close(forward, (jax.grad(f)(q) * tangent).sum(), "gradient")
    product = jnp.einsum("btnhxyzw,xyzw->btnh", jax.hessian(f)(q), tangent)
    step = 1e-2
    difference = (jax.grad(f)(q + step * tangent) - jax.grad(f)(q - step * tangent)) / (2 * step)
    assert np.abs(product - difference).max() < 1e-2 * np.abs(product).max()


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_export_with_symbolic_batch(implementation):
    b, t, s = export.symbolic_shape("b, t, s")
    t, s = (t, s) if implementation == "naive" else (T, S)
    shapes = [jax.ShapeDtypeStruct(x, "float32") for x in ((b, t, N, H), (b, s, K, H), (b, s, K, H))]

    def f(q, k, v):
        return dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    exported = export.export(jax.jit(f))(*shapes)
    assert_close(exported.call(*operands()), f(*operands()))


def test_equal_masks_share_one_compilation():
    count = 0

    @jax.jit
    def f(q, k, v, mask):
        nonlocal count
        count += 1
        return dot_product_attention(q, k, v, mask=mask)

    for mask in (Causal(2), Causal(2) & jaxattn.Full(), Causal(2)):
        f(*operands(), mask)
    assert count == 2
    f(*operands(), Causal(jnp.array([1, 2])))
    f(*operands(), Causal(jnp.array([0, 5])))
    assert count == 3
