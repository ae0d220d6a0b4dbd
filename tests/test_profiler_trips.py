"""How often things run: loops and branches of compiled programs, counted as often as they are executed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxattn.profiler import hlo, profile, traffic

F32 = 4


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def calls(report, word):
    """Runs of the kernels that come from the line with `word`; the scalar ones of loop conditions left out."""
    rows = [r for r in report.rows if word in source_line(r.source) and (not r.calls or r.bytes > 64 * r.calls)]
    assert rows, f"no kernel comes from a line with {word}: {[r.source for r in report.rows]}"
    return {r.calls for r in rows}


def source_line(source):
    if ":" not in source or not source.startswith(__file__):
        return ""
    with open(__file__) as file:
        return file.readlines()[int(source.rsplit(":", 1)[1]) - 1]


def blockwise(q, k, v, block, unrolled):
    T, H = q.shape
    tiles = (k.reshape(-1, block, H), v.reshape(-1, block, H))

    def body(state, tile):
        m, l, o = state
        s = q @ tile[0].T
        m_next = jnp.maximum(m, s.max(-1))
        p, alpha = jnp.exp(s - m_next[:, None]), jnp.exp(m - m_next)
        return (m_next, l * alpha + p.sum(-1), o * alpha[:, None] + p @ tile[1]), None

    state = (jnp.full(T, -1e30), jnp.zeros(T), jnp.zeros((T, H)))
    if unrolled:
        for j in range(T // block):
            state, _ = body(state, (tiles[0][j], tiles[1][j]))
    else:
        state, _ = lax.scan(body, state, tiles)
    return state[2] / state[1][:, None]


@pytest.mark.parametrize("n", [1024, 2048])
def test_blockwise_by_scan_is_within_5_percent_of_xlas_count_of_the_unrolled_program(n):
    arguments = [shape(n, 32)] * 3
    unrolled = jax.jit(functools.partial(blockwise, block=512, unrolled=True)).lower(*arguments).compile()
    expected = unrolled.cost_analysis()["bytes accessed"]
    looped = jax.jit(functools.partial(blockwise, block=512, unrolled=False))
    report = profile(looped, *arguments)
    assert report.requested.total == pytest.approx(expected, rel=0.05)
    once = looped.lower(*arguments).compile().cost_analysis()["bytes accessed"]
    assert once < 0.7 * expected  # XLA's count of the loop is what we correct


def loop_of(kind, n):
    def fori(x):
        return lax.fori_loop(0, n, lambda i, c: jnp.sin(c @ x), x)

    def mapped(x, ys):
        return lax.map(lambda y: jnp.sin(x @ y), ys)

    def nested(x):
        return lax.fori_loop(0, n, lambda i, c: lax.fori_loop(0, 3, lambda j, d: jnp.sin(d @ x), c), x)

    return {"fori": fori, "map": mapped, "nested": nested}[kind]


@pytest.mark.parametrize(("kind", "per_step"), [("fori", 1), ("map", 1), ("nested", 3)])
def test_static_loops_count_the_body_times_its_trips(kind, per_step):
    more = {"map": lambda n: [shape(n, 32, 32)]}.get(kind, lambda n: [])
    reports = {n: profile(loop_of(kind, n), shape(32, 32), *more(n)) for n in (4, 8, 16)}
    for n, report in reports.items():
        product = max((r for r in report.rows if "jnp.sin" in source_line(r.source)), key=lambda r: r.bytes)
        assert product.calls == n * per_step
        assert product.bytes == n * per_step * 3 * 32 * 32 * F32
    totals = [r.requested.total for r in reports.values()]
    assert totals[2] - totals[1] == 2 * (totals[1] - totals[0])


def causal(q, k):
    """Key tiles up to the diagonal only: i + 1 of them for query tile i."""
    block = 8

    def rows(i):
        tile = lax.dynamic_slice(q, (i * block, 0), (block, q.shape[1]))

        def body(j, total):
            return total + tile @ lax.dynamic_slice(k, (j * block, 0), (block, q.shape[1])).T  # tile product

        return lax.fori_loop(0, i + 1, body, jnp.zeros((block, block)))

    return lax.map(rows, jnp.arange(q.shape[0] // block))


def test_causal_skipping_runs_the_triangle_and_needs_no_values():
    report = profile(causal, shape(128, 16), shape(128, 16))
    assert calls(report, "# tile product") == {16 * 17 // 2}
    assert not report.unknown
    assert any("run once" in note for note in report.notes)


def test_a_static_program_is_not_run():
    report = profile(loop_of("fori", 4), shape(32, 32))
    assert not any("run once" in note for note in report.notes)


def converge(x):
    return lax.while_loop(lambda c: jnp.abs(c).max() > 1e-3, lambda c: c * 0.5, x)  # halving


def test_while_until_converged_counts_its_steps():
    assert calls(profile(converge, jnp.ones(300)), "# halving") >= {10}  # 2**-10 < 1e-3 < 2**-9


def test_without_values_the_loop_is_unknown_and_said_first():
    report = profile(converge, shape(300))
    assert len(report.unknown) == 1
    assert str(report).startswith("UNKNOWN: loop")
    inside = [r for r in report.rows if r.confidence == "unknown"]
    assert inside
    assert all(r.calls is None and r.bytes == 0 for r in inside)


def test_batched_loop_runs_the_largest_count():
    def repeat(x, n):
        return lax.fori_loop(0, n, lambda i, c: jnp.cos(c) * 2, x)  # step

    report = profile(jax.vmap(repeat), shape(3, 50), jnp.array([1, 7, 3]))
    assert 7 in calls(report, "# step")


def test_branches_count_as_often_as_taken():
    def alternate(x):
        def body(i, c):
            return lax.cond(i % 3 == 0, even, odd, c)

        def even(c):
            return c @ c  # first branch

        def odd(c):
            return jnp.sin(c)  # second branch

        return lax.fori_loop(0, 10, body, x)

    report = profile(alternate, shape(32, 32))
    assert calls(report, "# first branch") == {4}
    assert calls(report, "# second branch") == {6}


def test_a_switch_at_the_top_counts_the_branch_that_runs():
    def choose(x, i):
        return lax.switch(i, [lambda x: jnp.sin(x @ x), jnp.sin, lambda x: jnp.sin(x @ x) @ x], x)

    costs = [profile(choose, shape(64, 64), jnp.int32(i)).requested.total for i in range(3)]
    assert costs[1] < costs[0] < costs[2]


@jax.custom_vjp
def halves(x, n):
    return lax.fori_loop(0, n, lambda i, c: jnp.cos(c * 0.5), x)  # custom


def halves_backward(n, g):
    return lax.fori_loop(0, n, lambda i, c: jnp.sin(c * g), g), None


halves.defvjp(lambda x, n: (halves(x, n), n), halves_backward)


def test_loops_are_found_inside_jit_remat_and_custom_vjp():
    def fn(x, n):
        return jax.checkpoint(jax.jit(lambda x: halves(x, n)))(x).sum()

    assert calls(profile(fn, shape(100), np.int32(6)), "# custom") == {6}
    gradient = profile(jax.grad(fn), shape(100), np.int32(6))
    assert 6 in {r.calls for r in gradient.rows if r.bytes > 64 * r.calls}


def test_loops_are_found_inside_custom_partitioning_and_sequential_vmap():
    from jax.custom_batching import sequential_vmap
    from jax.experimental.custom_partitioning import custom_partitioning

    @sequential_vmap
    def call(x, n):
        inner = custom_partitioning(lambda x, n: lax.fori_loop(0, n, lambda i, c: jnp.cos(c * 2), x))  # partitioned
        inner.def_partition(partition=lambda *a: None, propagate_user_sharding=None, sharding_rule="i, -> i")
        return inner(x, n)

    assert calls(profile(call, shape(100), np.int32(5)), "# partitioned") == {5}


def test_loops_that_xla_makes_inside_a_loop_are_not_taken_for_it():
    def noise(x, n, key):
        return lax.fori_loop(0, n, lambda i, c: c + jax.random.normal(jax.random.fold_in(key, i), c.shape), x)  # noise

    report = profile(noise, shape(64, 64), np.int32(3), jax.random.key(0))
    assert not report.unknown
    assert 3 in calls(report, "# noise")


def test_a_loop_in_the_condition_of_a_loop_counts_as_often_as_the_condition_is_asked():
    def fn(x, n):
        def go_on(state):
            return state[0] + 0 * lax.fori_loop(0, n, lambda i, c: jnp.cos(c) * 2, state[1])[0, 0] < n  # asked

        def step(x, _):
            return lax.while_loop(go_on, lambda state: (state[0] + 1, state[1] * 3), (0.0, x))[1], None

        return lax.scan(step, x, length=5)[0]

    assert calls(profile(fn, np.ones((64, 32), np.float32), np.int32(3)), "# asked") == {5 * (3 + 1) * 3}


def test_a_loop_that_the_counting_run_does_not_get_to_is_unknown_with_its_reason():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    row = jax.sharding.PartitionSpec("x")

    def repeat(x, n):
        return lax.fori_loop(0, n, lambda i, c: jnp.cos(c) * 2, x)

    inner = jax.shard_map(repeat, mesh=mesh, in_specs=(row, jax.sharding.PartitionSpec()), out_specs=row)

    def fn(x, n):
        return lax.scan(lambda c, _: (inner(c, n), None), x, length=4)[0]

    report = profile(fn, np.ones((64, 32), np.float32), np.int32(3))
    (unknown,) = report.unknown
    assert "how often it runs could not be counted" in unknown
    assert any("2 devices" in note for note in report.notes)


def test_a_measured_loop_of_a_computation_that_is_called_twice_is_not_counted_twice():
    def make(opcode, *called, name="x", scalar=False):
        kind = hlo.Shape(1) if scalar else hlo.Shape(13)
        made = hlo.Instruction(0, name, opcode, kind, "", 0, {}, called=list(called))
        return hlo.Computation(0, name, [made], made, is_fusion=False), made

    condition, _ = make("compare", scalar=True)
    body, _ = make("tuple")
    shared, loop = make("while", condition, body)
    entry, call = make("call", shared)
    entry.instructions = [call, make("call", shared)[1]]
    module = hlo.Module("m", entry, [entry, shared, condition, body], {})
    times, unknown = traffic.runs(module, lambda i: traffic.LoopRuns(2, 10), lambda i: None)
    assert (times[body], unknown) == (None, [loop])
    entry.instructions = [call]
    times, unknown = traffic.runs(module, lambda i: traffic.LoopRuns(2, 10), lambda i: None)
    assert (times[body], times[condition], unknown) == (10, 12, [])


def test_two_calls_of_one_function_are_counted_apart():
    @jax.jit
    def repeat(x, n):
        return lax.fori_loop(0, n, lambda i, c: jnp.cos(c * 2), x)  # shared

    report = profile(lambda x, n, m: repeat(x, n) + repeat(x, m).sum(), shape(100), np.int32(2), np.int32(9))
    assert calls(report, "# shared") >= {2, 9}


def test_a_function_jitted_by_nnx_is_counted_as_the_function_itself():
    model, x = nnx.Linear(64, 32, rngs=nnx.Rngs(0)), shape(16, 64)

    def apply(model, x):
        return jnp.tanh(model(x))

    jitted, plain = profile(nnx.jit(apply), model, x), profile(apply, model, x)
    assert jitted.compulsory == plain.compulsory
    assert jitted.compulsory.read == (16 * 64 + 64 * 32 + 32) * F32
    assert jitted.requested == plain.requested
    assert jitted.flops >= 2 * 16 * 64 * 32


def test_static_arguments_and_strings_are_refused():
    with pytest.raises(ValueError, match="partial"):
        profile(jax.jit(lambda x, n: x * n, static_argnums=1), shape(3), 2)
    with pytest.raises(ValueError, match="neither an array"):
        profile(lambda x: x, "text")


def test_donated_memory_is_not_counted_twice():
    def step(cache, update):
        return lax.dynamic_update_slice(cache, update, (3, 0))

    arguments = shape(1024, 64), shape(1, 64)
    kept, donated = profile(step, *arguments), profile(jax.jit(step, donate_argnums=0), *arguments)
    assert kept.peak_bytes - donated.peak_bytes == 1024 * 64 * F32
    assert donated.requested.written == 64 * F32
    assert donated.requested.read <= 64 * F32 + 16
