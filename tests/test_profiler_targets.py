"""Compiling for a GPU that is not there: real fusions, kernels and their resources, on a machine without one."""

import functools
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import jaxlib
import pytest
from jax import lax

from jaxattn import profiler
from jaxattn.profiler import compile as compiling
from jaxattn.profiler import private_jax, program, resources, targets

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental import pallas as pl
    from jax.experimental.pallas.ops.gpu import attention as pallas_ops

try:
    compiling.find_wheels()
    MISSING = ""
except FileNotFoundError as error:
    MISSING = str(error)
needs_wheels = pytest.mark.skipif(bool(MISSING), reason=MISSING)
figures_of_0_10_2 = pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="figures were taken with jaxlib 0.10.2")

T = 4096
QKV = [jax.ShapeDtypeStruct((1, T, 8, 64), jnp.bfloat16)] * 3


def naive(q, k, v):
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * 0.125
    logits = jnp.where(jnp.tril(jnp.ones((T, T), bool)), logits, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits).astype(v.dtype), v)


def scan_over_keys(q, k, v, block=512):
    """All queries at once, 512 keys a step."""
    B, _, N, H = q.shape
    tiles = [x.reshape(B, T // block, block, N, H).swapaxes(0, 1) for x in (k, v)]
    t = jnp.arange(T)[:, None]

    def body(state, tile):
        m, l, o = state
        k, v, j = tile
        s = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * 0.125
        s = jnp.where(t >= j * block + jnp.arange(block)[None], s, -1e30)
        m_next = jnp.maximum(m, s.max(-1))
        p, alpha = jnp.exp(s - m_next[..., None]), jnp.exp(m - m_next)
        pv = jnp.einsum("bnts,bsnh->bnth", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (m_next, l * alpha + p.sum(-1), o * alpha[..., None] + pv), None

    start = (jnp.full((B, N, T), -1e30), jnp.zeros((B, N, T)), jnp.zeros((B, N, T, H)))
    (_, l, o), _ = lax.scan(body, start, (*tiles, jnp.arange(T // block)))
    return (o / l[..., None]).swapaxes(1, 2).astype(q.dtype)


def kernel(q, k, v, block_k=64, num_warps=4, num_stages=2):
    blocks = pallas_ops.BlockSizes(128, block_k, *[128] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pallas_ops.mha(
            q, k, v, None, causal=True, block_sizes=blocks, num_warps=num_warps, num_stages=num_stages
        )


@pytest.fixture(scope="module")
def report_of():
    """A program's report for an H200, worked out once."""
    return functools.cache(lambda fn: profiler.profile(fn, *QKV, target="h200"))


MB = 1e6


@needs_wheels
@figures_of_0_10_2
@pytest.mark.parametrize(
    ("fn", "requested", "launches", "temporaries"),
    [(naive, 1627 * MB, 3, 805 * MB), (scan_over_keys, 2537 * MB, 104, 114 * MB), (kernel, None, 1, 0)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_known_programs_have_their_known_figures(report_of, fn, requested, launches, temporaries):
    report = report_of(fn)
    if requested is None:  # q, o, and the key and value tiles up to the diagonal, 64 keys each, for 128 queries
        tiles = sum(2 * (i + 1) for i in range(T // 128))
        requested = 2 * (2 * T * 8 * 64 + 2 * tiles * 64 * 8 * 64)
        assert report.requested.total == requested
    assert report.requested.total == pytest.approx(requested, rel=0.1)
    assert report.launches == pytest.approx(launches, rel=0.1)
    arguments_and_output = 4 * T * 8 * 64 * 2
    assert report.peak_bytes - arguments_and_output == pytest.approx(temporaries, rel=0.1, abs=0.1 * MB)


KERNELS = {  # (block_k, warps): registers, spilled bytes, shared bytes, wgmma, serialized
    (128, 4): (255, 104, 81920, 24, True),
    (128, 8): (168, 0, 81920, 12, False),
    (64, 4): (210, 0, 49152, 16, False),
}


@needs_wheels
@figures_of_0_10_2
def test_kernel_resources_are_those_the_assembler_gives():
    def three(q, k, v):
        return [kernel(q, k, v, block_k, num_warps) for block_k, num_warps in KERNELS]

    found = profiler.kernel_resources(three, *QKV, target="h200")
    assert len(found) == len(KERNELS)
    for (_, warps), (registers, spilled, shared, wgmma, serialized) in KERNELS.items():
        (one,) = [x for x in found if (x.threads, x.shared_bytes) == (32 * warps, shared)]
        assert (one.wgmma, one.serialized) == (wgmma, serialized)
        assert one.registers == pytest.approx(registers, rel=0.1)
        assert one.spill_store_bytes == pytest.approx(spilled, rel=0.1)
        assert one.blocks_per_core == min(65536 // (-(-one.registers // 8) * 8 * 32 * warps), 233472 // (shared + 1024))


@needs_wheels
def test_naive_attention_requests_what_its_score_array_costs(report_of):
    report = report_of(naive)
    scores = 8 * T * T * 4
    assert 2 * scores < report.requested.total < 8 * scores
    assert report.dram.cold.total.low > scores
    assert not report.unknown
    assert report.bound_us > 100


@needs_wheels
def test_interpreted_kernel_is_compiled_for_the_target():
    def interpreted(q, k, v):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return pallas_ops.mha(q, k, v, None, causal=True, interpret=True)

    report = profiler.profile(interpreted, *QKV, target="h100")
    assert [(row.opcode, row.calls, row.confidence) for row in report.rows] == [("pallas_call", 1, "exact")]
    assert any("registers" in note and "mha_forward" in note for note in report.notes)


@needs_wheels
@pytest.mark.parametrize("slug", ["a100", "l4", "t4", "b200"])  # h100 above
def test_other_targets_compile(slug):
    report = profiler.profile(
        lambda x: jax.nn.softmax(x @ x), jax.ShapeDtypeStruct((256, 256), jnp.float32), target=slug
    )
    assert report.target == targets.get(slug).name
    assert report.requested.read >= 256 * 256 * 4


@needs_wheels
def test_interpreted_kernel_of_another_backend_is_an_opaque_call():
    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def fn(y):
        spec = pl.BlockSpec((16, 64), lambda i: (i, 0))
        return pl.pallas_call(double, grid=(4,), in_specs=[spec], out_specs=spec, out_shape=x, interpret=True)(y) + 1

    report = profiler.profile(fn, x, target="h200")
    row = next(r for r in report.rows if r.opcode == "pallas_call")
    assert (row.read, row.written, row.calls) == (64 * 64 * 4, 64 * 64 * 4, 1)
    assert row.source.startswith(__file__)


@needs_wheels
def test_loops_of_the_compiled_program_are_joined_to_the_counting_run():
    def triangle(q):
        def rows(i):
            return lax.fori_loop(0, i + 1, lambda j, c: jnp.sin(c @ q), q)

        return lax.map(rows, jnp.arange(6))

    report = profiler.profile(triangle, jax.ShapeDtypeStruct((64, 64), jnp.float32), target="h200")
    assert not report.unknown
    assert max(row.calls for row in report.rows if row.bytes > 1000 * row.calls) == 21


@needs_wheels
def test_a_compiler_option_reaches_the_compiler():
    fn = functools.partial(kernel, block_k=128, num_warps=4)
    option = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
    with pytest.raises(RuntimeError, match="compiling for NVIDIA H200"):
        profiler.kernel_resources(fn, *QKV, target="h200", options=option)


def test_missing_wheels_give_one_line_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        profiler.profile(naive, *QKV, target="h200", wheels=tmp_path)
    assert str(caught.value).count("\n") == 0
    assert f"python -m jaxattn.profiler wheels --to {tmp_path}" in str(caught.value)


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(ValueError, match=r"target='h300' is not known: h200, h100, a100"):
        profiler.profile(naive, *QKV, target="h300")


def test_the_wheels_are_those_of_the_installed_jaxlib():
    wanted = compiling.wheel_requirements()
    assert f"jax-cuda13-plugin=={jaxlib.__version__}" in wanted
    assert not any(name.startswith(("jax==", "jaxlib")) for name in wanted)


@needs_wheels
def test_ordinary_runs_do_not_see_the_wheels():
    code = "import jax, sys; print(jax.default_backend(), 'jax_cuda13_plugin' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.split()[1] == "False"


def test_a_program_lowered_for_a_gpu_keeps_its_source_lines():
    traced = program.trace(naive, tuple(QKV), targets.get("h200"))
    code = private_jax.stablehlo_bytecode(traced.lower_for_cuda(targets.get("h200")))
    assert code.startswith(b"ML\xefR")
    assert os.path.basename(__file__).encode() in code


def test_scan_arity_is_read_on_this_jax():
    def fn(w, xs):
        return lax.scan(lambda c, x: ((c[0] + x @ w, c[1] * 2), x), (jnp.zeros(4), jnp.zeros(2)), xs)

    jaxpr = jax.make_jaxpr(fn)(jnp.zeros((4, 4)), jnp.zeros((3, 4)))
    (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert private_jax.scan_arity(scan.params, len(scan.invars)) == (1, 2)


def test_the_source_line_of_an_equation_is_found_on_this_jax():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x))(1.0)
    assert private_jax.user_line(jaxpr.eqns[0].source_info).startswith(f"{__file__}:")


def test_of_two_kernels_in_one_file_only_the_one_that_is_named_lost_its_overlap():
    part = (
        "ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
        "ptxas info    : Function properties for {name}\n"
        "    0 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads\n"
        "ptxas info    : Used {registers} registers, used 1 barriers\n"
    )
    said = (
        "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in the function 'attention' in line 20\n"
        + part.format(name="attention", spilled=104, registers=255)
        + part.format(name="attention_2", spilled=0, registers=168)
    )
    launch, h200 = ((64, 1, 1), 128, 81920), targets.get("h200")
    for name, expected in (("attention", (True, 104, 255)), ("attention_2", (False, 0, 168))):
        found = resources._resources(name, "", "wgmma.mma_async", said, launch, h200)
        assert (found.serialized, found.spill_store_bytes, found.registers) == expected
    silent = said.partition("\n")[2]
    assert not resources._resources("attention", "", "wgmma.mma_async", silent, launch, h200).serialized


def test_blocks_per_core_obeys_each_limit():
    h200 = targets.get("h200")
    limits = {
        (1024, 32, 0): (2, "threads"),
        (128, 255, 0): (2, "registers"),
        (128, 32, 100_000): (2, "shared memory"),
        (32, 16, 0): (32, "blocks"),
    }
    for (threads, registers, shared), expected in limits.items():
        assert resources._blocks_per_core(threads, registers, shared, h200) == expected


def test_the_cpu_that_is_here_knows_its_cache():
    facts = targets.here("cpu", "cpu")
    assert facts.platform == "cpu"
    assert facts.cores >= 1
    assert facts.l2_bytes == 0 or facts.l2_bytes > 1 << 18


def test_a_gpu_is_known_by_its_kind():
    assert targets.here("gpu", "NVIDIA H100 80GB HBM3").slug == "h100"
    assert targets.here("gpu", "NVIDIA A100-SXM4-80GB").slug == "a100"
    assert targets.here("gpu", "NVIDIA Something New").bytes_per_s == 0
