"""Blockwise attention: what its compiled modules hold, what it visits, its gradients, and how it shards."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerance import assert_close

from jaxattn import Blockwise, Causal, Dense, Full, Lengths, SegmentIds, Window, dot_product_attention, merge, tiles
from jaxattn.impl import blockwise
from jaxattn.masks import EMPTY, PARTIAL
from jaxattn.profiler import profile


def random(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(B=2, T=11, S=13, N=4, K=2, H=8, Hv=None, dtype="float32"):
    return tuple(random(x, i, dtype) for i, x in enumerate([(B, T, N, H), (B, S, K, H), (B, S, K, Hv or H)]))


def forward_and_gradients(implementation, mask, *arrays, **options):
    """Output, log-sum-exp (0 for -inf), and the gradients of a function of both."""

    def f(q, k, v, bias=None):
        out, lse = dot_product_attention(
            q, k, v, bias, mask, implementation=implementation, return_residual=True, **options
        )
        return out, jnp.where(lse == -jnp.inf, 0, lse)

    @jax.jit
    def run(*arrays):
        results, pullback = jax.vjp(f, *arrays)
        cotangents = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype) for x in results]
        return results, pullback(tuple(cotangents))

    return run(*arrays)


def compiled(T, gradient=False, bias=False, implementation="blockwise"):
    q, k = (jax.ShapeDtypeStruct((1, T, n, 64), "float32") for n in (32, 8))
    bias = (jax.ShapeDtypeStruct((1, 1, 1, T), "float32"),) if bias else ()

    def f(q, k, v, *bias):
        return dot_product_attention(q, k, v, *bias, is_causal=True, implementation=implementation)

    def g(q, k, v, *bias):
        out, pullback = jax.vjp(f, q, k, v, *bias)
        return pullback(out)

    return jax.jit(g if gradient else f).lower(q, k, k, *bias).compile(), 4 * T * 64 * (2 * 32 + 2 * 8)


def largest_buffer(module: str) -> int:
    """Elements of the largest array that the module's text names."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", module)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward and backward"])
def test_the_scores_never_exist_at_16384_tokens(gradient):
    T = 16384
    program, bytes_io = compiled(T, gradient)
    assert largest_buffer(program.as_text()) <= T * 32 * 64 < T * T
    assert program.memory_analysis().temp_size_in_bytes <= 2 * bytes_io + 32 * 1024 * 1024


def test_temporaries_of_forward_and_backward_grow_linearly():
    programs = [compiled(T, True, True, implementation=Blockwise(256, 256))[0] for T in (2048, 4096, 8192)]
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert sizes[2] - sizes[1] <= 2.02 * (sizes[1] - sizes[0])
    slope = (sizes[1] - sizes[0]) / 2048  # bytes a token; the sizes that the rule picks add no more than their tiles
    chosen = compiled(16384, True, True)[0].memory_analysis().temp_size_in_bytes
    assert chosen <= slope * 16384 + 12 * 4 * blockwise.SCORES


@pytest.mark.parametrize("lead", [(1, 1), (2, 4)], ids=str)
def test_a_boolean_mask_that_blocks_do_not_divide_is_read_but_not_copied(lead):
    T, heads, small = 4100, (4, 2, 2), 8
    arrays = [jax.ShapeDtypeStruct((2, T, n, small), "float32") for n in heads]

    @jax.jit
    def forward_and_backward(mask, *arrays):
        attend = functools.partial(dot_product_attention, mask=mask, implementation="blockwise")
        out, pullback = jax.vjp(attend, *arrays)
        return out, pullback(out)

    program = forward_and_backward.lower(jax.ShapeDtypeStruct((*lead, T, T), bool), *arrays).compile()
    assert program.memory_analysis().temp_size_in_bytes < T * T  # one head's part of the mask, a byte a pair


MASKS = {
    "full": Full(),
    "nothing for some queries": Causal(-4),
    "segments": SegmentIds(np.arange(11) // 4, np.arange(13) // 5),
    "lengths": Lengths(np.array([11, 6]), np.array([0, 9])),
    "dense per head": Dense(np.random.default_rng(0).random((2, 4, 11, 13)) < 0.3),
}


@pytest.mark.parametrize("mask", MASKS)
def test_equals_naive_with_gradients_where_blocks_do_not_divide(mask):
    arrays = (*operands(Hv=5), random((4, 11, 1), 7))
    tiled = forward_and_gradients(Blockwise(block_q=4, block_k=8), MASKS[mask], *arrays, logits_soft_cap=3.0)
    dense = forward_and_gradients("naive", MASKS[mask], *arrays, logits_soft_cap=3.0)
    assert_close(tiled, dense, "gradient")


@pytest.mark.parametrize("shape", [(1, 17), (17, 1), (5, 64)], ids=str)
def test_any_block_size_fits_any_length(shape):
    T, S = shape
    arrays = operands(T=T, S=S, B=1)
    expected = forward_and_gradients("naive", Causal(S - T), *arrays)
    for blocks in ((1, 1), (64, 64), (16, 4)):
        assert_close(forward_and_gradients(Blockwise(*blocks), Causal(S - T), *arrays), expected, "gradient")


@pytest.mark.parametrize("shape", [(2, 4, 11, 13), (1, 1, 1, 13), (2, 1, 11, 1), (11, 13)], ids=str)
def test_bias_gradient_has_the_shape_of_the_bias(shape):
    arrays = (*operands(), random(shape, 9))
    tiled = forward_and_gradients(Blockwise(block_q=4, block_k=4), Causal(3), *arrays)
    assert tiled[1][3].shape == shape
    assert_close(tiled, forward_and_gradients("naive", Causal(3), *arrays), "gradient")


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(5, 0), SegmentIds(np.arange(32) // 9)], ids=str)
def test_visits_the_tiles_of_the_plan_masks_the_partial_ones_and_no_others(mask, monkeypatch):
    found = {"logits": [], "cut": []}

    def recording(name):
        original = getattr(blockwise._Groups, name)

        def method(self, *args):
            b, k, i, j = args[2:6] if name == "logits" else args[:4]
            jax.debug.callback(lambda *tile: found[name].append(tuple(map(int, tile))), b, k, i, j)
            return original(self, *args)

        return method

    for name in found:
        monkeypatch.setattr(blockwise._Groups, name, recording(name))
    jax.clear_caches()
    q, k, v = operands(B=1, T=32, S=32)
    jax.jit(jax.grad(lambda *x: dot_product_attention(*x, mask=mask, implementation=Blockwise(8, 8)).sum()))(q, k, v)
    jax.effects_barrier()
    jax.clear_caches()  # what was compiled holds the recording
    codes = np.broadcast_to(tiles.tile_codes(mask, 32, 32, 8, 8), (1, 2, 4, 4))  # K = 2 groups
    for name, tiles_of_plan in (("logits", codes != EMPTY), ("cut", codes == PARTIAL)):
        expected = [tuple(map(int, tile)) for tile in np.argwhere(tiles_of_plan)]
        assert sorted(found[name]) == sorted(2 * expected), name  # forward and backward


def test_partial_tiles_are_visited_before_full_ones():
    plan = tiles.plan(Causal() & ~Window(3, 0), 32, 32, 8, 8)
    visits = tuple((jnp.asarray(x.count), jnp.asarray(x.index)) for x in (plan.partial, plan.full))

    def visit(masked):
        return lambda j, state: (state[0] + 1, state[1].at[state[0]].set(j + 100 * masked))

    for i in range(4):
        count, seen = blockwise._visit(visits, 0, 0, i, visit, (0, jnp.zeros(8, "int32")))
        partial, full = (x.index[0, 0, i][: x.count[0, 0, i]] for x in (plan.partial, plan.full))
        assert list(seen[:count]) == [*(partial + 100), *full]
    assert len(partial) > 0
    assert len(full) > 0


def test_two_compilations_give_the_same_bits_forward_and_backward():
    arrays = (*operands(T=40, S=40, dtype="bfloat16"), random((40, 40), 3, "bfloat16"))
    first, second = (forward_and_gradients(Blockwise(16, 16), Causal(), *arrays) for _ in range(2))
    assert_close(first, second, "same")


def test_merging_a_split_of_the_keys_is_the_whole_with_gradients():
    q, k, v = operands()
    edges = [0, 1, 9, 13]
    mask = Dense(np.random.default_rng(1).random((11, 13)) < 0.4)

    def whole(q, k, v):
        return dot_product_attention(q, k, v, mask=mask, implementation=Blockwise(4, 4), return_residual=True)

    def parts(q, k, v):
        results = [
            dot_product_attention(
                q, k[:, a:b], v[:, a:b], mask=mask.array[:, a:b], implementation=Blockwise(4, 4), return_residual=True
            )
            for a, b in itertools.pairwise(edges)
        ]
        out, lse = results[0]
        for result in results[1:]:
            out, lse = merge(out, lse, *result)
        return out, lse

    def run(f):
        (out, lse), pullback = jax.vjp(f, q, k, v)
        return out, lse, pullback((out, jnp.where(lse == -jnp.inf, 0, 1.0)))

    assert_close(jax.jit(lambda: run(parts))(), jax.jit(lambda: run(whole))(), "gradient")


@pytest.mark.parametrize(
    ("mask", "T", "S", "G"),
    [(Full(), 4096, 4096, 1), (Causal(), 4096, 4096, 4), (Full(), 1, 65536, 4), (Window(255, 0), 65536, 65536, 4)],
    ids=str,
)
def test_the_rule_keeps_tiles_within_the_lengths_and_a_million_scores(mask, T, S, G):
    block_q, block_k = blockwise.default_blocks(mask, T, S, G)
    assert block_q <= T
    assert block_k <= S
    assert G * block_q * block_k <= blockwise.SCORES


def test_a_narrow_window_gets_small_tiles_and_a_mask_with_arrays_those_of_a_causal_one():
    wide = blockwise.default_blocks(Full(), 16384, 16384, 1)
    narrow = blockwise.default_blocks(Window(255, 0), 16384, 16384, 1)
    assert max(narrow) < min(wide)
    padded = Lengths(None, jnp.zeros(1, "int32"))
    assert blockwise.default_blocks(padded & Window(255, 0), 16384, 16384, 1) == narrow
    for T in (1, 16384):
        causal = blockwise.default_blocks(Causal(16384 - T), T, 16384, 1)
        assert blockwise.default_blocks(Causal(jnp.zeros(1, "int32")), T, 16384, 1) == causal


def test_tuning_must_be_positive():
    with pytest.raises(ValueError, match="Blockwise block_q=0 must be a positive int or None"):
        Blockwise(block_q=0)


# Masks with arrays on explicit axes need shardings that the user spells.
@pytest.mark.parametrize(
    ("mask", "axis_type"),
    [*((mask, AxisType.Auto) for mask in ("causal", "segments", "dense", "bias")), ("causal", AxisType.Explicit)],
    ids=str,
)
def test_batch_and_heads_sharded_over_eight_devices_need_no_collective(mask, axis_type):
    B, T, N, K = 4, 20, 8, 4
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    q, k, v = operands(B=B, T=T, S=T, N=N, K=K)
    ids = jnp.arange(B * T).reshape(B, T) // 13
    extra, split = {
        "causal": ((), ()),
        "segments": ((ids,), (P("data"),)),
        "dense": ((random((B, N, T, T), 4) > 0,), (P("data", "model"),)),
        "bias": ((random((B, N, T, T), 5),), (P("data", "model"),)),
    }[mask]

    def f(implementation, q, k, v, *extra):
        bias, what = None, Causal()
        if mask == "segments":
            what &= SegmentIds(*extra)
        elif mask == "dense":
            what &= Dense(*extra)
        elif mask == "bias":
            (bias,) = extra
        return dot_product_attention(q, k, v, bias, what, implementation=implementation)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *arrays):
        out, pullback = jax.vjp(functools.partial(f, implementation), *arrays)
        return out, [x for x in pullback(out) if x.dtype == out.dtype]

    expected = run("naive", q, k, v, *extra)
    heads = P("data", None, "model")
    with jax.set_mesh(mesh):
        sharded = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((q, k, v, *extra), (heads, heads, heads, *split), strict=True)
        ]
        program = run.lower(Blockwise(8, 8), *sharded).compile()
        module = program.as_text()
        result = program(*sharded)
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [name for name in names if f"{name}(" in module or f"{name}-start(" in module]
    assert result[0].sharding.spec[0] == "data"
    assert_close(jax.device_get(result), jax.device_get(expected), "gradient")


@pytest.mark.parametrize(
    ("K", "axis_type"), [(1, AxisType.Auto), (2, AxisType.Auto), (4, AxisType.Auto), (2, AxisType.Explicit)], ids=str
)
def test_query_heads_may_be_split_where_key_value_heads_are_whole(K, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    arrays = operands(B=2, T=12, S=12, N=8, K=K)

    def squares(attend, *arrays):
        out = attend(*arrays)
        return (out**2).sum(), out

    def gradients_of(attend):
        return jax.jit(jax.value_and_grad(functools.partial(squares, attend), (0, 1, 2), has_aux=True))

    expected = gradients_of(functools.partial(dot_product_attention, is_causal=True, implementation="naive"))(*arrays)
    with jax.set_mesh(mesh):
        specs = P("data", None, "model"), P("data"), P("data")
        sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        forward = jax.jit(lambda *x: dot_product_attention(*x, is_causal=True, implementation=Blockwise(8, 8)))
        module = forward.lower(*sharded).compile().as_text()
        result = gradients_of(forward)(*sharded)
    assert "all-gather(" not in module
    assert "all-reduce(" not in module
    (_, out), gradients = jax.device_get(result)
    (_, expected_out), expected_gradients = jax.device_get(expected)
    assert_close((out, gradients), (expected_out, expected_gradients), "gradient")


@pytest.mark.parametrize("batch", ["data", ("data", "fsdp")], ids=str)
def test_one_bias_for_all_batch_elements_adds_its_gradient_up_over_devices(batch):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    arrays = (*operands(B=4, T=12, S=12, N=8, K=4), random((12, 12), 6))
    expected = forward_and_gradients("naive", Causal(), *arrays)
    heads = NamedSharding(mesh, P(batch, None, "model"))
    sharded = [jax.device_put(x, heads) for x in arrays[:3]]
    bias = jax.device_put(arrays[3], NamedSharding(mesh, P()))
    result = forward_and_gradients(Blockwise(8, 8), Causal(), *sharded, bias)
    assert_close(jax.device_get(result), jax.device_get(expected), "gradient")


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-45, 3.0], ids=str)
def test_any_scale_is_naives(scale):
    arrays = operands()
    tiled = forward_and_gradients(Blockwise(4, 8), Causal(2), *arrays, scale=scale)
    assert_close(tiled, forward_and_gradients("naive", Causal(2), *arrays, scale=scale), "gradient")


def test_a_query_that_attends_nothing_passes_no_nan_on():
    q, k, v = operands(B=1)
    mask = Causal(-2)  # the first two queries attend nothing
    out, pullback = jax.vjp(lambda *x: dot_product_attention(*x, mask=mask, implementation=Blockwise(4, 4)), q, k, v)
    cotangent = jnp.ones_like(out)
    expected = pullback(cotangent)
    assert_close(pullback(cotangent.at[:, :2].set(jnp.nan)), expected, "same")


def test_runs_inside_a_users_shard_map_with_gradients():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    arrays = (*operands(B=2, T=20, S=20), random((20, 20), 3))  # one bias, whole on every device
    specs = (*[P("data", None, "model")] * 3, P())

    def attend(*arrays):
        return dot_product_attention(*arrays, is_causal=True, implementation=Blockwise(8, 8))

    def run(f):
        out, pullback = jax.vjp(f, *arrays)
        return out, pullback(out)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0])
    assert_close(jax.jit(lambda: run(sharded))(), jax.jit(lambda: run(attend))(), "gradient")


def test_a_query_block_without_full_tiles_computes_none():
    def gradient(mask, *arrays):
        def f(*arrays):
            return dot_product_attention(*arrays, mask=mask, implementation=Blockwise(32, 32))

        out, pullback = jax.vjp(f, *arrays)
        return pullback(out)

    arrays = operands(B=1, T=64, S=64, N=2, K=2, H=64)  # two of four tiles are PARTIAL, one is FULL, one EMPTY
    causal, full = (profile(functools.partial(gradient, mask), *arrays).flops for mask in (Causal(), Full()))
    assert 0.7 * full < causal < 0.8 * full
