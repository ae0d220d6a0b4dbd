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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerance import assert_close

import jaxattn
from jaxattn import (
    Blockwise,
    Causal,
    Implementation,
    Naive,
    SegmentIds,
    attention_weights,
    dot_product_attention,
    explain,
)

B, T, S, N, K, H = 2, 7, 9, 4, 2, 8
IMPLEMENTATIONS = ["naive", Blockwise(block_q=4, block_k=4), "xla"]


def operands(dtype="float32", batched=True):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    arrays = [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]
    return arrays if batched else [x[0] for x in arrays]


def noise(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def choice(shape, seed=2):
    """A boolean mask that leaves every query at least the first key: jax.nn means something else by empty rows."""
    allowed = np.random.default_rng(seed).random(shape) < 0.5
    allowed[..., 0] = True
    return allowed


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


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
    "key lengths": {"key_value_seq_lengths": np.array([3, 9], np.int32)},
    "query and key lengths": {
        "query_seq_lengths": np.array([7, 2], np.int32),
        "key_value_seq_lengths": np.array([9, 4], np.int32),
    },
    "window alone": {"local_window_size": (2, 3)},
    "window of one int": {"local_window_size": 1, "is_causal": True},
    "window of later keys": {"local_window_size": (-1, 3)},
    "window of an array": {"local_window_size": np.array([2, 3])},
    "1-D mask": {"mask": choice(S)},
    "1-D bias": {"bias": noise((S,))},
    "integer bias": {"bias": np.arange(T * S).reshape(T, S) % 3},
    "scale of one entry": {"scale": np.full(1, 0.3, np.float32)},
    "everything": {
        "bias": noise((N, T, S)),
        "mask": choice((B, 1, T, S)),
        "is_causal": True,
        "key_value_seq_lengths": np.array([5, 9], np.int32),
        "scale": 0.5,
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_agrees_with_jax_nn(call):
    @jax.jit
    def run(*operands):
        options = {"return_residual": True, **CALLS[call]}
        ours = {str(x): dot_product_attention(*operands, implementation=x, **options) for x in IMPLEMENTATIONS}
        return ours, jax.nn.dot_product_attention(*operands, **options)

    ours, (theirs, their_lse) = run(*operands())
    # Where a length leaves a query nothing to attend, jax.nn's residual is a large negative number, ours -inf.
    absent = np.asarray(their_lse) < -1e30
    assert_close({name: out for name, (out, _) in ours.items()}, dict.fromkeys(ours, theirs))
    for name, (_, lse) in ours.items():
        assert name == "xla" or np.all(np.asarray(lse)[absent] == -np.inf)
        assert_close({name: np.where(absent, 0, lse)}, {name: np.where(absent, 0, their_lse)})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_a_window_may_be_traced(implementation):
    @jax.jit
    def run(window, *operands):
        ours = dot_product_attention(*operands, local_window_size=window, implementation=implementation)
        return ours, jax.nn.dot_product_attention(*operands, local_window_size=window)

    for window in ((2, 3), (-1, 3)):
        assert_close(*run(window, *operands()))


@pytest.mark.parametrize("shape", [(0, T, S), (B, 0, S), (B, T, 0)], ids=str)
def test_axes_without_entries_give_what_jax_nn_gives(shape):
    batch, queries, keys = shape
    q, k = ones(batch, queries, N, H), ones(batch, keys, K, H)
    expected = jax.nn.dot_product_attention(q, k, k)
    out, lse = dot_product_attention(q, k, k, return_residual=True, implementation="blockwise")
    assert_close(out, expected)
    assert lse.shape == (batch, queries, N)
    assert (np.asarray(lse) == -np.inf).all()
    assert attention_weights(q, k).shape == (batch, N, queries, keys)
    gradients = jax.grad(lambda *x: dot_product_attention(*x).sum(), (0, 1, 2))(q, k, k)
    assert all((np.asarray(x) == 0).all() for x in gradients)


def test_only_some_operands_may_lack_the_batch_axis():
    q, k, v = operands(batched=False)
    expected = jax.nn.dot_product_attention(q, k[None], v[None])
    assert_close(dot_product_attention(q, k[None], v[None]), expected)


@pytest.mark.parametrize("implementation", ["loops", *IMPLEMENTATIONS], ids=str)
def test_float32_is_multiplied_in_full_forward_and_backward(implementation):
    def loss(*operands):
        return dot_product_attention(*operands, implementation=implementation).sum()

    text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*operands()).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 5 or implementation == "loops"
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products), products


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
    def attend(*operands):
        return dot_product_attention(*operands, is_causal=True, implementation=implementation, return_residual=True)

    (out, lse), whole = jax.jit(lambda one, all: (attend(*one), attend(*all)))(operands(batched=False), operands())
    assert (out.shape, lse.shape) == ((T, N, H), (T, N))
    assert_close((out, lse), (whole[0][0], whole[1][0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_output_keeps_the_dtype_and_the_residual_is_float32(dtype, implementation):
    attend = functools.partial(dot_product_attention, implementation=implementation, return_residual=True)
    out, lse = jax.eval_shape(attend, *operands(dtype))
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)


@pytest.mark.parametrize("implementation", ["loops", "naive", "blockwise"])
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        q, k, v = (x[:, :3, :2].astype("float64") for x in operands())
        attend = functools.partial(dot_product_attention, implementation=implementation, return_residual=True)
        out, lse = jax.jit(attend)(q, k, v)
        logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert (out.dtype, lse.dtype) == ("float64", "float64")
        assert_close(out, np.einsum("bnts,bsnh->btnh", weights, v))


@pytest.mark.parametrize("implementation", ["loops", "naive", Blockwise(block_q=2, block_k=2)], ids=str)
def test_a_query_that_may_attend_nothing_gives_zero_and_zero_gradients(implementation):
    q, k, v = (x[:, :4, :2] for x in operands())
    mask = np.arange(4)[:, None] != np.ones(4)

    def loss(q, k, v, bias):
        out, lse = dot_product_attention(q, k, v, bias, mask, implementation=implementation, return_residual=True)
        return (out**2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum(), (out, lse)

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, (out, lse)), gradients = jax.device_get(run(q, k, v, noise((4, 4))))
    assert np.all(out[:, 1] == 0)
    assert np.all(lse[:, 1] == -np.inf)
    assert np.all(gradients[0][:, 1] == 0)
    assert np.all(gradients[3][1] == 0)
    assert all(np.isfinite(x).all() and np.any(x != 0) for x in gradients)


@pytest.mark.parametrize("implementation", ["loops", "naive", Blockwise(block_q=2, block_k=2)], ids=str)
def test_keys_that_nothing_may_attend_may_hold_nan(implementation):
    q, k, v = (x[:, :4, :2] for x in operands())
    used = np.arange(4) < 3

    @jax.jit
    def run(k, v):
        def f(q, k, v):
            return dot_product_attention(q, k, v, mask=used[None, :], implementation=implementation)

        out, pullback = jax.vjp(f, q, k, v)
        return out, *pullback(out)

    spoilt, clean = ([np.where(used[:, None, None], x, hidden) for x in (k, v)] for hidden in (np.float32("nan"), 0))
    assert_close(run(*spoilt), run(*clean), "same")


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_bias_of_minus_infinity_masks_and_a_large_negative_one_does_not(implementation):
    attend = jax.jit(functools.partial(dot_product_attention, *operands(), implementation=implementation))
    hidden, same, plain = (np.asarray(attend(np.full((T, S), x, np.float32))) for x in (-np.inf, -1e4, 0))
    assert np.all(hidden == 0)
    assert np.abs(same - plain).max() < 1e-2


def test_soft_cap_bounds_the_logits_before_the_bias():
    q, k, v = operands()
    bias = noise((T, S))
    logits = np.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H) * 100, k) / np.sqrt(H)
    weights = np.exp(2 * np.tanh(logits / 2) + bias)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H).astype("float32")
    for implementation in ("naive", "blockwise"):
        attend = functools.partial(dot_product_attention, logits_soft_cap=2.0, implementation=implementation)
        assert_close(jax.jit(attend)(q * 100, k, v, bias), expected)


@pytest.mark.parametrize("implementation", ["naive", "blockwise", "xla"])
def test_scale_may_be_traced_and_differentiated(implementation):
    @jax.jit
    @jax.value_and_grad
    def f(scale):
        return (dot_product_attention(*operands(), scale=scale, implementation=implementation) ** 2).sum()

    gradient = f(0.3)[1]
    assert abs(gradient - (f(0.301)[0] - f(0.299)[0]) / 0.002) < 1e-2 * abs(gradient)


BAD = {
    "N=6 query heads must be a multiple of K=4 key/value heads": {"query": ones(2, 3, 6, 8)},
    "key [3, 5, 4, 8] must have B=2": {"key": ones(3, 5, 4, 8)},
    "key [2, 5, 4, 16] must have H=8": {"key": ones(2, 5, 4, 16)},
    "value [2, 6, 4, 8] must have S=5": {"value": ones(2, 6, 4, 8)},
    "value [2, 5, 2, 8] must have K=4": {"value": ones(2, 5, 2, 8)},
    "query, key and value must be [B, T, N, H]": {"query": ones(4, 8)},
    "one floating dtype, got float32, bfloat16": {"key": ones(2, 5, 4, 8, dtype="bfloat16")},
    "got int32": {name: ones(2, 5, 4, 8, dtype="int32") for name in ("query", "key", "value")},
    "bias [3, 5, 3] must have at most 4 dimensions, that broadcast to [B=2, N=4, T=3, S=5]": {"bias": ones(3, 5, 3)},
    "a boolean array goes to mask": {"bias": ones(3, 5, dtype=bool)},
    "an additive mask goes to bias": {"mask": ones(3, 5)},
    "mask [4] must have at most 4 dimensions": {"mask": ones(4, dtype=bool)},
    "query_seq_lengths must be an int array of shape [B=2], got int32[3]": {"query_seq_lengths": np.arange(3)},
    "key_value_seq_lengths must be an int array": {"key_value_seq_lengths": ones(2)},
    "local_window_size=(1, 2, 3) must be": {"local_window_size": (1, 2, 3)},
    "local_window_size=1.5 must be": {"local_window_size": 1.5},
    "at least one head of at least one entry, got N=0": {"query": ones(2, 3, 0, 8)},
    "scale must be a number, got an array [2]": {"scale": np.ones(2)},
    "logits_soft_cap=0.0 must be a positive number": {"logits_soft_cap": 0.0},
    "implementation='flash' must be None, one of": {"implementation": "flash"},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named_with_what_would_be_right(message):
    good = {"query": ones(2, 3, 4, 8), "key": ones(2, 5, 4, 8), "value": ones(2, 5, 4, 8)}
    with pytest.raises(ValueError, match=re.escape(message)):
        dot_product_attention(**(good | BAD[message]))


def test_a_named_implementation_never_falls_back():
    q, k, v = (ones(1, 512, 1, 8) for _ in range(3))
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
    mask = choice((B, N, T, S))
    mask[0, 0, 0] = False
    run = jax.jit(lambda *x: (attention_weights(*x[:2], mask=mask), dot_product_attention(*x, mask=mask)))
    weights, out = jax.device_get(run(q, k, v))
    assert weights.shape == (B, N, T, S)
    assert np.all(weights[~mask] == 0)
    sums = np.ones((B, N, T), "float32")
    sums[0, 0, 0] = 0
    assert_close(weights.sum(-1), sums)
    expected = np.einsum("bkgts,bskh->btkgh", weights.reshape(B, K, N // K, T, S), v)
    assert_close(out, expected.reshape(B, T, N, H))


def test_softmax_temperature_goes_through_scale():
    q, k, _ = operands()
    weights = jax.jit(lambda scale: attention_weights(q, k, scale=scale))
    cold, hot = (np.asarray(weights(1 / temperature / np.sqrt(H))) for temperature in (0.01, 100.0))
    assert cold.max(-1).min() > 0.5
    assert np.abs(hot - 1 / S).max() < 0.02


@pytest.mark.parametrize("axes", [(0, 0, 0), (2, None, None), (None, 1, 3)], ids=str)
@pytest.mark.parametrize("implementation", ["naive", Blockwise(block_q=4, block_k=4)], ids=str)
def test_vmap_over_any_axis_equals_a_loop(axes, implementation):
    stacked = [
        x if axis is None else np.stack([x, 2 * x, x - 1], axis) for x, axis in zip(operands(), axes, strict=True)
    ]

    @jax.jit
    def value_and_gradient(q, k, v):
        out, pullback = jax.vjp(
            lambda *x: dot_product_attention(*x, is_causal=True, implementation=implementation), q, k, v
        )
        return out, *pullback(out)

    batched = jax.device_get(jax.jit(jax.vmap(value_and_gradient, axes))(*stacked))
    for i in range(3):
        one = [x if axis is None else np.take(x, i, axis) for x, axis in zip(stacked, axes, strict=True)]
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

    gradient = jax.jit(jax.grad(f))

    @jax.jit
    def forward_and_hessian(q, tangent):
        product = jnp.einsum("btnhxyzw,xyzw->btnh", jax.hessian(f)(q), tangent)
        return jax.jvp(f, (q,), (tangent,))[1], product

    tangent, step = noise(q.shape, 5), 1e-2
    forward, product = forward_and_hessian(q, tangent)
    assert_close(forward, (gradient(q) * tangent).sum(), "gradient")
    difference = (gradient(q + step * tangent) - gradient(q - step * tangent)) / (2 * step)
    assert np.abs(product - difference).max() < 1e-2 * np.abs(product).max()


@pytest.mark.parametrize("implementation", ["loops", "naive", "xla"])
def test_batch_and_heads_sharded_over_eight_devices_need_no_collective(implementation):
    batch, length, heads = 4, 6, 4
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = NamedSharding(mesh, P("data", None, "model")), NamedSharding(mesh, P("data"))
    arrays = [noise((batch, length, heads, H), seed) for seed in range(3)]
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (batch, length)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, ids, *arrays):
        def f(*x):
            return dot_product_attention(*x, mask=SegmentIds(ids), is_causal=True, implementation=implementation)

        out, pullback = jax.vjp(f, *arrays)
        return out, pullback(out)

    with jax.set_mesh(mesh):
        sharded = jax.device_put(ids, columns), *(jax.device_put(x, rows) for x in arrays)
        program = run.lower(implementation, *sharded).compile()
        module, result = program.as_text(), program(*sharded)
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [name for name in names if f"{name}(" in module or f"{name}-start(" in module]
    assert result[0].sharding.is_equivalent_to(rows, 4)
    assert_close(jax.device_get(result), jax.device_get(run("naive", ids, *arrays)), "gradient")


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_export_with_symbolic_batch_and_naive_with_symbolic_lengths_too(implementation):
    b, t, s = export.symbolic_shape("b, t, s")
    t, s = (t, s) if implementation == "naive" else (T, S)
    shapes = [jax.ShapeDtypeStruct(x, "float32") for x in ((b, t, N, H), (b, s, K, H), (b, s, K, H))]
    lengths = jax.ShapeDtypeStruct((b,), "int32")

    @jax.jit
    def run(lengths, *operands):
        def f(*x):
            return dot_product_attention(
                *x, is_causal=True, key_value_seq_lengths=lengths, implementation=implementation
            )

        out, pullback = jax.vjp(f, *operands)
        return out, pullback(out)

    exported = export.export(run)(lengths, *shapes)
    arguments = np.array([3, S], np.int32), *operands()
    assert_close(exported.call(*arguments), run(*arguments), "gradient")


def test_equal_masks_share_one_compilation():
    count = 0

    @jax.jit
    def f(q, k, v, mask):
        nonlocal count
        count += 1
        return dot_product_attention(q, k, v, mask=mask, implementation="naive")

    for mask in (Causal(2), Causal(2) & jaxattn.Full(), Causal(2)):
        f(*operands(), mask)
    assert count == 2
    f(*operands(), Causal(np.array([1, 2])))
    f(*operands(), Causal(np.array([0, 5])))
    assert count == 3
