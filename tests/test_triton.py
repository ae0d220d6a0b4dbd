"""The Triton kernels, through Pallas' interpreter against the definition, and lowered for CUDA without a GPU."""

import dataclasses
import functools
import json
import sys
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerance import assert_close

from bench import tune
from jaxattn import (
    Causal,
    Dense,
    Dilated,
    Full,
    Global,
    Lengths,
    RandomBlocks,
    SegmentIds,
    Triton,
    Window,
    dot_product_attention,
    explain,
    tiles,
)
from jaxattn.impl import triton
from jaxattn.impl.triton import Tiling
from jaxattn.profiler import compile as compiling
from jaxattn.profiler import profile, program, targets

_TILING = Tiling(16, 16, 4, 1)
TINY = Triton(block_q=16, block_k=16, dq=_TILING, dkv=_TILING, interpret=True)


def operands(B, T, S, N, K, H, H_v=None, dtype="float32"):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H_v or H)
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def random(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


def attention(implementation, q, k, v, bias=None, mask=None, **options):
    """Output and log-sum-exp."""

    @jax.jit
    def function(q, k, v, bias, mask):
        return dot_product_attention(
            q, k, v, bias, mask, implementation=implementation, return_residual=True, **options
        )

    return function(q, k, v, bias, mask)


def gradients(implementation, q, k, v, bias=None, mask=None, **options):
    """Gradients of a sum, weighted at random, of the output and of the log-sum-exp where it is finite."""

    def loss(q, k, v, bias):
        out, lse = dot_product_attention(
            q, k, v, bias, mask, implementation=implementation, return_residual=True, **options
        )
        return (out * random(*out.shape)).sum() + jnp.where(jnp.isfinite(lse), lse * random(*lse.shape), 0).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2) if bias is None else (0, 1, 2, 3)))(q, k, v, bias)


CASES = {
    "full_where_blocks_divide": ((1, 32, 32, 2, 2, 16), {}),
    "causal_where_blocks_do_not_divide": ((2, 37, 53, 4, 2, 16, 24), {"is_causal": True}),
    "one_query_group_of_three_heads": ((1, 1, 60, 6, 2, 40), {}),
    "heads_packed_into_one_tile": ((1, 5, 60, 8, 2, 16), {"mask": Causal(55)}),
    "odd_head_dim_bottom_right_causal": ((2, 19, 45, 3, 1, 59), {"mask": Causal(26)}),
    "rows_before_every_key": ((1, 40, 24, 1, 1, 16), {"mask": Causal(-16)}),
    "group_larger_than_a_tile": ((1, 9, 20, 34, 1, 16), {"is_causal": True}),
    "window": ((1, 64, 64, 1, 1, 16), {"local_window_size": (7, 3)}),
    "dilated": ((1, 40, 40, 1, 1, 16), {"mask": Dilated(3)}),
    "window_with_global_tokens": ((1, 64, 64, 1, 1, 16), {"mask": Window(4, 4) | Global((0, 40))}),
    "random_blocks": ((1, 64, 64, 1, 1, 16), {"mask": RandomBlocks(8, 2, 8)}),
    "lengths": (
        (2, 33, 40, 4, 2, 16),
        {"key_value_seq_lengths": np.array([7, 40]), "query_seq_lengths": np.array([33, 5])},
    ),
    "segments": ((2, 40, 40, 2, 1, 16), {"mask": SegmentIds(np.sort(random(2, 40) * 4).astype(np.int32))}),
    "dense_mask_per_head": ((2, 20, 40, 4, 2, 16), {"mask": Dense(random(2, 4, 20, 40) < 0.2)}),
    "bias_and_soft_cap": ((1, 20, 40, 4, 2, 16), {"bias": random(1, 4, 20, 40), "logits_soft_cap": 2.0}),
    "bias_per_key_with_minus_infinity": (
        (2, 20, 40, 2, 2, 16),
        {"bias": np.where(random(1, 1, 1, 40) < 0.5, -np.inf, 1.0).astype(np.float32), "scale": -0.5},
    ),
    "bias_per_batch_element": ((2, 20, 24, 2, 1, 16), {"bias": 5 * random(2, 1, 1, 1), "is_causal": True}),
    "offset_per_batch_element": ((2, 20, 40, 2, 1, 16), {"mask": Causal(np.array([3, 20])) & Window(9, None)}),
}

QUICK = (
    "causal_where_blocks_do_not_divide",
    "heads_packed_into_one_tile",
    "group_larger_than_a_tile",
    "lengths",
    "bias_and_soft_cap",
    "bias_per_key_with_minus_infinity",
)


@pytest.mark.parametrize("case", CASES)
def test_output_and_log_sum_exp_match_naive(case):
    sizes, options = CASES[case]
    q, k, v = operands(*sizes)
    assert_close(attention(TINY, q, k, v, **options), attention("naive", q, k, v, **options))


@pytest.mark.parametrize("case", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_gradients_match_naive(case):
    sizes, options = CASES[case]
    q, k, v = operands(*sizes)
    assert_close(gradients(TINY, q, k, v, **options), gradients("naive", q, k, v, **options), "gradient")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_kernels_match_naive_in_16_bits(dtype):
    q, k, v = operands(1, 33, 33, 2, 1, 32, dtype=dtype)
    for function, kind in ((attention, "reordered"), (gradients, "gradient")):
        actual, expected = [function(implementation, q, k, v, is_causal=True) for implementation in (TINY, "naive")]
        assert actual[0].dtype == dtype
        assert_close(actual, expected, kind)


@pytest.mark.parametrize("splits", [2, 4])
def test_keys_split_and_merged_match_naive(splits):
    q, k, v = operands(2, 1, 90, 4, 2, 16)
    mask = Causal(np.array([10, 89])) & Lengths(None, np.array([90, 70]))
    split = Triton(block_k=16, splits=splits, interpret=True)
    assert_close(attention(split, q, k, v, mask=mask), attention("naive", q, k, v, mask=mask))


UNREAD = {
    "lengths": Lengths(None, np.array([21, 40])),
    "causal": Causal(-19),
    "dense": Dense(np.arange(40)[None, :] < 21),
}


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (attention, "lengths"),
        (attention, "causal"),
        (gradients, "causal"),
        pytest.param(attention, "dense", marks=pytest.mark.slow),
        pytest.param(gradients, "lengths", marks=pytest.mark.slow),
        pytest.param(gradients, "dense", marks=pytest.mark.slow),
    ],
)
def test_keys_that_no_query_reads_may_hold_nan(function, mask):
    q, k, v = operands(2, 40, 40, 2, 1, 16)
    mask, bias = UNREAD[mask], np.zeros((1, 1, 40, 40), np.float32)
    expected = function(TINY, q, k, v, bias, mask)
    unused = ~np.broadcast_to(mask.to_array(40, 40), (2, 1, 40, 40)).any((1, 2))
    k, v = [np.where(unused[:, :, None, None], np.nan, x) for x in (k, v)]
    assert_close(function(TINY, q, k, v, bias, mask), expected, "same")


def test_an_array_too_large_for_offsets_of_32_bits_is_read_in_two_bytes_an_element(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 65536, 1, 16), "bfloat16")
    array = jax.ShapeDtypeStruct((1, 1, 65536, 65536), "bool")
    attend = functools.partial(dot_product_attention, implementation=Triton(platform="cuda", splits=1))
    assert "f16[1,1,65536,65536]" in str(jax.make_jaxpr(lambda q, array: attend(q, q, q, mask=array))(x, array))
    bias = jax.ShapeDtypeStruct((1, 1, 65536, 65536), "float8_e5m2")
    assert "bf16[1,1,65536,65536]" in str(jax.make_jaxpr(lambda q, bias: attend(q, q, q, bias))(x, bias))
    monkeypatch.setattr(triton, "_SHORT_OFFSETS", 0)
    q, k, v = operands(1, 20, 40, 1, 1, 16)
    mask, implementation = ~Dense(random(1, 1, 20, 40) < 0.5) & Causal(7), dataclasses.replace(TINY, splits=1)
    assert "f16[1,1,20,40]" in str(jax.make_jaxpr(lambda mask: attention(implementation, q, k, v, mask=mask))(mask))
    assert_close(attention(implementation, q, k, v, mask=mask), attention("naive", q, k, v, mask=mask))


def test_rows_past_the_end_add_nothing_under_a_large_bias():
    q, k, v = operands(1, 17, 16, 1, 1, 16)
    actual = gradients(TINY, q, k, v, np.full((1, 1), 1e3, np.float32))
    assert all(np.isfinite(x).all() for x in actual)


def test_batch_and_heads_sharded_over_devices_need_no_collective():
    q, k, v = operands(2, 20, 20, 4, 2, 16)
    ids = np.sort(random(2, 20) * 3).astype(np.int32)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    heads, data = NamedSharding(mesh, P("data", None, "model")), NamedSharding(mesh, P("data"))

    @jax.jit
    def run(q, k, v, ids):
        mask = Causal() & SegmentIds(ids)
        out, pullback = jax.vjp(lambda *x: dot_product_attention(*x, mask=mask, implementation=TINY), q, k, v)
        return out, pullback(out)

    expected = run(q, k, v, ids)
    sharded = [jax.device_put(x, heads) for x in (q, k, v)]
    program = run.lower(*sharded, jax.device_put(ids, data)).compile()
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [name for name in names if name in program.as_text()]
    assert_close(jax.device_get(program(*sharded, jax.device_put(ids, data))), expected)


def test_runs_inside_a_users_shard_map_with_gradients():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = operands(2, 20, 20, 4, 2, 16)
    bias = random(1, 4, 20, 20)  # the same on all of "data": its gradients are added up
    ids = np.sort(random(2, 20) * 3).astype(np.int32)

    def attend(q, k, v, bias, ids):
        return dot_product_attention(q, k, v, bias, mask=Causal() & SegmentIds(ids), implementation=TINY)

    def run(function):
        out, pullback = jax.vjp(lambda *x: function(*x, ids), q, k, v, bias)
        return out, pullback(out)

    spec = P("data", None, "model")
    specs = (spec, spec, spec, P(None, "model"), P("data"))
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec)
    assert_close(jax.jit(lambda: run(sharded))(), jax.jit(lambda: run(attend))(), "gradient")


def test_vmap_maps_the_kernel():
    q, k, v = operands(2, 20, 20, 2, 2, 16)
    mapped = jax.jit(jax.vmap(functools.partial(dot_product_attention, is_causal=True, implementation=TINY)))
    assert_close(mapped(q, k, v), attention(TINY, q, k, v, is_causal=True)[0])


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(20, 0), Dilated(32)], ids=str)
def test_keys_and_values_are_read_for_the_tiles_of_the_plan_and_no_others(mask):
    T, H, block = 128, 16, 16
    x = jax.ShapeDtypeStruct((1, T, 1, H), "float32")
    report = profile(lambda q, k, v: dot_product_attention(q, k, v, mask=mask, implementation=TINY), x, x, x)
    (row,) = [row for row in report.rows if "attention_forward" in row.name]
    visited = tiles.plan(mask, T, T, block, block).visited
    expected = 4 * H * (T + 2 * block * visited)  # queries once, a tile of keys and one of values for each visit
    assert row.confidence == "exact"
    assert 0 <= row.read - expected <= 4 * 64 * (T // block)  # and the plan: what each row of tiles visits


def test_few_queries_on_many_keys_are_split_over_the_cores_and_many_are_not():
    def outputs(T, S):
        q, k = (jax.ShapeDtypeStruct((1, n, heads, 64), "bfloat16") for n, heads in ((T, 32), (S, 8)))
        attend = functools.partial(dot_product_attention, implementation=Triton(platform="cuda"))
        return str(jax.make_jaxpr(attend)(q, k, k))

    assert "f32[32,1,1,32,64]" in outputs(1, 8192)  # 32 parts of 8 groups
    assert "f32[2,1,1,32,64]" in outputs(1, 512)
    assert "bf16[1,1,512,32,64]" in outputs(512, 8192)


def test_lowers_for_cuda_without_a_gpu():
    q, k, v = operands(1, 40, 40, 4, 2, 59, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the backend's deprecation must not reach the user
        text = lowered_for_cuda(Triton(platform="cuda"), q, k, v, np.zeros((40, 40), np.float32), is_causal=True)
    for kernel in ("attention_forward", "attention_dq", "attention_dkv", "attention_d_bias"):
        assert kernel in text


def test_every_kind_of_mask_lowers_for_cuda():
    x = jax.ShapeDtypeStruct((2, 64, 2, 16), "float16")
    ids, lengths = np.zeros((2, 64), np.int32), np.array([7, 40], np.int32)
    arrays = [SegmentIds(ids), Lengths(lengths, lengths), Dense(np.ones((2, 2, 64, 64), bool)), Causal(lengths)]
    static = [Window(9, 3), Dilated(3), ~Window(4, 4) | Global((0, 40)), RandomBlocks(8, 2, 8)]

    def run(q, masks):
        attend = functools.partial(dot_product_attention, q, q, q, implementation=Triton(platform="cuda"))
        return [attend(mask=mask) for mask in (*masks, *static)]

    target = targets.get("h200")
    text = program.trace(run, (x, arrays), target).lower_for_cuda(target).as_text()
    assert text.count("attention_forward") >= len(arrays) + len(static)


def test_no_other_warning_is_silenced(monkeypatch):
    original, backend = mlir.lower_fun, "The Pallas Triton backend is deprecated and will be removed"

    def lower_fun(*arguments, **options):  # warns as the backend does since jax 0.11, on every jax
        lower = original(*arguments, **options)

        def rule(*operands):
            warnings.warn(backend, DeprecationWarning, stacklevel=2)
            warnings.warn("another", DeprecationWarning, stacklevel=2)
            return lower(*operands)

        return rule

    monkeypatch.setattr(mlir, "lower_fun", lower_fun)
    q, k, v = operands(1, 16, 16, 1, 1, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        lowered_for_cuda(Triton(platform="cuda"), q, k, v)
        assert warnings.filters == filters
        warnings.warn(backend, DeprecationWarning, stacklevel=2)  # of a kernel that is not ours
    said = [str(warning.message) for warning in caught]
    assert said == ["another"] * 3 + [backend]  # forward, dq, dkv


def lowered_for_cuda(implementation, q, k, v, bias=None, mask=None, **options):
    def loss(q, k, v, bias):
        return dot_product_attention(q, k, v, bias, mask, implementation=implementation, **options).sum()

    function = jax.jit(jax.grad(loss, (0, 1, 2) if bias is None else (0, 1, 2, 3)))
    target = targets.get("h200")  # which GPU it is, jax >= 0.12 wants to know
    return program.trace(function, (q, k, v, bias), target).lower_for_cuda(target).as_text()


def test_an_absent_backend_is_a_reason_not_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    q, k, v = operands(1, 8, 8, 1, 1, 16)
    with pytest.raises(NotImplementedError, match="has no Triton backend for Pallas"):
        dot_product_attention(q, k, v, implementation=TINY)
    assert dot_product_attention(q, k, v).shape == q.shape


def wheels_missing() -> str:
    try:
        compiling.find_wheels()
    except FileNotFoundError as error:
        return str(error)
    return ""


needs_wheels = pytest.mark.skipif(bool(wheels_missing()), reason=wheels_missing())


def shipped_tilings():
    """16 bits on 9.0 and 8.0 in the ordinary run, the rest with the slow tests."""
    for device in tune.TARGETS:
        for dtype in ("bfloat16", "float16", "float32"):
            slow = device == "8.9" or dtype == "float32"
            yield pytest.param(device, dtype, marks=[pytest.mark.slow] if slow else [])


@needs_wheels
@pytest.mark.parametrize(("device", "dtype"), list(shipped_tilings()))
def test_shipped_tilings_use_tensor_cores_and_spill_nothing(device, dtype):
    facts = tune.compile_facts(device, tune.shipped(device, dtype))
    assert len(facts) == len(tune.KERNELS) * len(tune.HEAD_DIMS)
    assert not [fact for fact in facts if not tune.survives(fact)]


@needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), tune.TABLES)
@pytest.mark.parametrize("key", tune.SPACE, ids=str)
def test_tilings_that_survive_compiling_are_those_committed(device, key, dtype):
    facts = tune.compile_facts(device, [tune.Job(*key, tune.space(*key, dtype), dtype)])
    committed = [x for x in tune.read(tune.FACTS) if tune.key_of(x) == (device, *key, dtype)]
    assert [x["tiling"] for x in facts] == [x["tiling"] for x in committed]
    assert [tune.survives(x) for x in facts] == [tune.survives(x) for x in committed]


def test_the_table_holds_what_the_rule_picks_from_the_committed_facts():
    table = [row for row in tune.read(tune.TABLE) if row["device"] in tune.TARGETS]
    assert table == tune.pick(tune.read(tune.FACTS))
    assert len(table) == len(tune.TABLES) * len(tune.SPACE)


@pytest.mark.parametrize(
    ("capability", "rows"),
    [(8.0, "8.0"), (8.6, "8.9"), (8.7, "8.0"), (8.9, "8.9"), (9.0, "9.0"), (10.3, "9.0"), (12.0, "8.9")],
)
def test_a_gpu_takes_the_rows_of_one_with_as_little_shared_memory(capability, rows):
    assert triton.tuned_capability(capability) == rows


def test_shipped_tilings_fit_the_shared_memory_of_a_block():
    facts = {(*tune.key_of(x), *x["tiling"]): x["shared_bytes"] for x in tune.read(tune.FACTS)}
    table = [row for row in tune.read(tune.TABLE) if row["device"] in tune.TARGETS]
    for row in table:
        limit = targets.get(tune.TARGETS[row["device"]]).shared_bytes_per_block
        assert 0 < facts[(*tune.key_of(row), *row["tiling"])] <= limit


@needs_wheels
def test_forward_with_a_static_mask_needs_no_temporaries():
    def run(q, k, v):
        attend = functools.partial(dot_product_attention, q, k, v, implementation=Triton(platform="cuda"))
        return [attend(mask=mask) for mask in (Full(), Causal(), Window(100, 0) & Causal())]

    target = targets.get("h100")
    shapes = [jax.ShapeDtypeStruct((1, 4096, heads, 64), "bfloat16") for heads in (32, 8, 8)]
    compiled = compiling.compile_for(program.trace(run, shapes, target).lower_for_cuda(target), target)
    assert compiled.temp_bytes == 0


def test_a_measured_row_of_the_table_goes_before_the_rule(tmp_path, monkeypatch):
    rows = [
        {"device": "9.0", "head_dim": 128, "dtype": "bfloat16", "tiling": [64, 64, 4, 2]},
        {"device": "9.0", "head_dim": 64, "dtype": "bfloat16", "tiling": [64, 32, 4, 2]},
        {"device": "9.0", "head_dim": 64, "dtype": "float32", "tiling": [32, 32, 4, 1]},
        {
            "device": "h100",
            "head_dim": 64,
            "dtype": "bfloat16",
            "masked": True,
            "long": True,
            "tiling": [128, 32, 4, 2],
        },
        {"device": "9.0", "head_dim": 64, "dtype": "float16", "tiling": [64, 16, 4, 2]},
    ]
    rows = [row | {"kernel": "forward"} for row in rows]
    monkeypatch.setattr(triton, "_TABLE", tmp_path / "table.json")
    triton._TABLE.write_text(json.dumps(rows))
    here = ("h100", "9.0")
    assert triton.default_tiling("forward", 40, "bfloat16", True, 4096, here) == Tiling(128, 32, 4, 2)
    assert triton.default_tiling("forward", 40, "bfloat16", False, 4096, here) == Tiling(64, 32, 4, 2)
    assert triton.default_tiling("forward", 40, "bfloat16", True, 512, here) == Tiling(64, 32, 4, 2)
    assert triton.default_tiling("forward", 96, "bfloat16", True, 4096, here) == Tiling(64, 64, 4, 2)
    assert triton.default_tiling("forward", 64, "float32", True, 4096, here) == Tiling(32, 32, 4, 1)
    assert triton.default_tiling("forward", 64, "float16", False, 4096, here) == Tiling(64, 16, 4, 2)
    # of the other dtype of 16 bits where this one has no row
    assert triton.default_tiling("forward", 64, "float16", True, 4096, here) == Tiling(128, 32, 4, 2)
    assert triton.default_tiling("forward", 96, "float16", False, 4096, here) == Tiling(64, 64, 4, 2)


def test_the_rule_drops_what_spills_serializes_or_leaves_the_tensor_cores():
    fine = {"device": "9.0", "kernel": "forward", "head_dim": 64, "dtype": "bfloat16", "tiling": [128, 64, 4, 3]}
    fine |= {"wgmma": 16, "mma": 0, "spilled_bytes": 0, "serialized": False, "blocks_per_core": 2}
    bad = ({"wgmma": 0, "mma": 8}, {"spilled_bytes": 4}, {"serialized": True}, {"blocks_per_core": 0})
    larger = fine | {"tiling": [128, 128, 8, 2]}
    assert tune.survives(fine)
    assert not any(tune.survives(fine | x) for x in bad)
    assert tune.pick([fine, *(larger | x for x in bad)])[0]["tiling"] == fine["tiling"]
    assert tune.pick([fine, larger])[0]["tiling"] == larger["tiling"]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_tuning_times_a_right_kernel_and_not_a_wrong_one(kernel, monkeypatch):
    measure = functools.partial(tune.measure_tilings, kernel, [_TILING], Causal(), (2, 32, 16), interpret=True)
    assert 0 < measure(time.monotonic() + 600)[_TILING] < float("inf")
    assert not measure(time.monotonic() - 1)
    monkeypatch.setattr(triton._Tile, "factor", 1.0)
    jax.clear_caches()
    assert measure(time.monotonic() + 600)[_TILING] == float("inf")


def measured(monkeypatch, milliseconds):
    """Rows that tuning on an H100 would give where each kernel's tilings took these times."""
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(
        tune, "measure_tilings", lambda kernel, tilings, *_: {x: milliseconds(kernel, x) for x in tilings}
    )
    return tune.measure(tune.read(tune.FACTS), 60)


def test_a_tiling_with_a_wrong_result_gets_no_row_of_the_table(monkeypatch, capsys, tmp_path):
    assert measured(monkeypatch, lambda *_: float("inf")) == []
    assert "forward, head dim 64, causal, 4096 queries: wrong results" in capsys.readouterr().err
    right = Tiling(128, 64, 4, 2)  # one of the forward kernel's at head dim 64 alone
    rows = measured(monkeypatch, lambda kernel, x: 7.0 if (kernel, x) == ("forward", right) else float("inf"))
    assert [(row["kernel"], row["head_dim"], row["tiling"], row["ms"], row["of"]) for row in rows] == [
        ("forward", 64, list(dataclasses.astuple(right)), 7.0, 1)
    ] * 4  # causal and full, long and short
    monkeypatch.setattr(tune, "TABLE", tmp_path / "table.json")
    tune.write_table(rows)
    assert tune.read(tune.TABLE) == rows
    with pytest.raises(ValueError, match="JSON"):
        tune.write_table([rows[0] | {"ms": float("inf")}])


@pytest.mark.slow
def test_both_orders_of_tiles_are_right_and_are_timed():
    rows = tune.orders([("forward", _TILING), ("dq", _TILING), ("dkv", _TILING)], (2, 32, 16), interpret=True)
    assert [row["kernel"] for row in rows] == ["forward", "dq", "dkv"]
    for row in rows:
        assert 0 < row["partial_first_ms"] < float("inf")
        assert 0 < row["full_first_ms"] < float("inf")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what happens on a CPU")
def test_tuning_without_a_gpu_says_so(capsys):
    assert tune.main([]) == 2
    assert "No GPU" in capsys.readouterr().err


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_native_kernels_match_naive(case, dtype):
    (B, T, S, N, K, H, *H_v), options = CASES[case]
    q, k, v = operands(B, T, S, N, K, H, *H_v, dtype=dtype)
    for function, kind in ((attention, "reordered"), (gradients, "gradient")):
        actual, expected = [function(implementation, q, k, v, **options) for implementation in (Triton(), "naive")]
        assert_close(actual, expected, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 111, 128, 256])
def test_native_kernels_match_naive_at_length(head_dim):
    q, k, v = operands(2, 1000, 1100, 8, 2, head_dim, dtype="bfloat16")
    for function, kind in ((attention, "reordered"), (gradients, "gradient")):
        actual, expected = [
            function(implementation, q, k, v, mask=Causal(100)) for implementation in (Triton(), "naive")
        ]
        assert_close(actual, expected, kind)


@pytest.mark.gpu
def test_native_kernels_give_the_same_bits_each_time():
    q, k, v = operands(2, 1000, 1000, 8, 2, 64, dtype="bfloat16")
    first, second = [gradients(Triton(), q, k, v, is_causal=True) for _ in range(2)]
    assert_close(first, second, "same")
