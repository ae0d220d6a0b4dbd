"""Reports: print, group, compare, save, load, plot; and the two commands that are drawn from them."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxattn
from bench import commands, counters, traffic
from jaxattn.impl.triton import Triton
from jaxattn.profiler import Report, profile
from jaxattn.profiler import compile as compiling
from jaxattn.profiler.report import Traffic, format_bytes


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def softmax_of_product(x, y):
    return jax.nn.softmax(x @ y)


@pytest.fixture(scope="module")
def report():
    return profile(softmax_of_product, shape(256, 64), shape(64, 512))


def test_totals_are_the_sums_of_the_rows(report):
    assert report.requested.read == sum(row.read for row in report.rows)
    assert report.requested.written == sum(row.written for row in report.rows)
    assert sum(row.share for row in report.rows) == pytest.approx(1)
    assert [row.bytes for row in report.rows] == sorted((row.bytes for row in report.rows), reverse=True)


def test_compulsory_is_inputs_and_outputs_once(report):
    assert report.compulsory.read == (256 * 64 + 64 * 512) * 4
    assert report.compulsory.written == 256 * 512 * 4
    assert report.dram.cold.read.low == report.compulsory.read


def test_an_argument_that_is_not_used_is_not_compulsory():
    assert profile(lambda x, unused: x + 1, shape(100), shape(1000)).compulsory.read == 400
    integers = shape(100, dtype=jnp.int32), shape(100, dtype=jnp.int32)
    assert profile(lambda x, y: x + y * 0, *integers).compulsory.read == 400  # XLA finds that y does not matter


def test_flops_count_the_product(report):
    assert 2 * 256 * 64 * 512 <= report.flops < 2 * 256 * 64 * 512 * 1.2


@pytest.mark.parametrize("by", ["kernel", "source", "scope"])
def test_groups_hold_all_bytes(report, by):
    groups = report.group(by)
    assert sum(g.read + g.written for g in groups) == report.requested.total
    assert sum(g.kernels for g in groups) == len(report.rows)


def test_sources_are_this_files_lines(report):
    line = softmax_of_product.__code__.co_firstlineno + 1
    assert any(row.source == f"{__file__}:{line}" for row in report.rows)


def test_a_group_by_something_else_is_refused(report):
    with pytest.raises(ValueError, match="by='line' must be"):
        report.group("line")


def test_saved_report_loads_as_it_was(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="no profiler report"):
        Report.load(tmp_path / "other.json")


def test_comparison_shows_both_and_their_ratio(report):
    twice = profile(
        lambda x, y: softmax_of_product(x, y) + softmax_of_product(x * 2, y), shape(256, 64), shape(64, 512)
    )
    text = report.compare(twice)
    line = next(part for part in text.splitlines() if part.startswith("requested"))
    assert f"{twice.requested.total / report.requested.total:.3g}x" in line
    assert format_bytes(report.requested.total) in line


def test_the_table_names_every_kind_of_number(report):
    text = str(report)
    for word in ("compulsory", "requested", "DRAM cold (model)", "DRAM warm (model)", "peak memory", "roofline"):
        assert word in text
    assert report.rows[0].name in text


@pytest.fixture
def drawn(monkeypatch):
    """The figure that was drawn last, kept open for the test."""
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure=None: None)
    yield plt.gcf
    close("all")


def test_the_plot_shows_the_largest_kernels_bytes_and_the_programs_place_under_the_roof(report, drawn, tmp_path):
    rates = dataclasses.replace(report, peak_flops=1e15, bytes_per_s=4e12, target="some GPU")
    rates.plot(tmp_path / "gpu.png", kernels=2)
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    bars, roof = drawn().axes
    shown = report.rows[1::-1]  # the largest on top
    assert [label.get_text() for label in bars.get_yticklabels()] == [f"{row.name} (1x)" for row in shown]
    read, written = bars.containers
    assert [bar.get_width() for bar in read] == [row.read / 1e6 for row in shown]
    assert [bar.get_width() for bar in written] == [row.written / 1e6 for row in shown]
    assert [bar.get_x() for bar in written] == [row.read / 1e6 for row in shown]
    assert (read.get_label(), written.get_label()) == ("read", "written")
    assert "MB" in bars.get_xlabel()
    assert f"{format_bytes(report.requested.total)} requested" in bars.get_title()
    limit, point, ridge = roof.get_lines()
    (x,), (y,) = point.get_data()
    assert x == pytest.approx(report.flops / report.dram.cold.total.low)
    assert y == pytest.approx(min(1e15, x * 4e12) / 1e12)
    assert "model" in point.get_label()
    assert ridge.get_xdata() == [250, 250]
    assert max(limit.get_ydata()) == pytest.approx(1000)
    assert f"{rates.bound_us:.4g} us" in roof.get_title()


def test_the_plot_for_a_device_without_known_rates_draws_no_roof(report, drawn, tmp_path):
    report.plot(tmp_path / "cpu.png")
    bars, roof = drawn().axes
    assert len(bars.containers[0]) == len(report.rows)
    assert "no peak rates known" in roof.texts[0].get_text()
    assert not roof.get_lines()


def test_bound_is_the_slower_of_memory_and_arithmetic(report):
    moved = report.dram.cold.total.low
    fast_memory = dataclasses.replace(report, peak_flops=1e9, bytes_per_s=1e15)
    assert fast_memory.bound_us == pytest.approx(report.flops / 1e9 * 1e6)
    slow_memory = dataclasses.replace(report, peak_flops=1e15, bytes_per_s=1e6)
    assert slow_memory.bound_us == pytest.approx(moved)
    assert dataclasses.replace(report, peak_flops=0).bound_us is None


def test_an_operation_that_is_not_known_is_modelled_by_its_operands_and_outputs():
    report = profile(jnp.sort, shape(4096))
    (row,) = [r for r in report.rows if "sort" in r.scope]
    assert row.confidence == "modelled"
    assert (row.read, row.written) == (4096 * 4, 4096 * 4)


def test_slices_count_what_they_touch():
    read = profile(lambda x, i: lax.dynamic_slice(x, (i, 0), (4, 64)) * 2, shape(4096, 64), shape(dtype=jnp.int32))
    assert read.requested.read <= 4 * 64 * 4 + 16
    taken = profile(lambda x, i: x[i], shape(100_000, 64), shape(8, dtype=jnp.int32))
    assert taken.requested.read < 8 * 64 * 4 * 4


def test_slice_behind_arithmetic_counts_what_it_touches():
    def fn(x, i):
        return lax.dynamic_slice(jnp.sin(x) * 3, (i, 0), (4, 64))

    assert profile(fn, shape(4096, 64), shape(dtype=jnp.int32)).requested.read < 4096


def test_an_update_counts_the_whole_array_where_a_new_one_is_made():
    whole, part, index = 256 * 64 * 4, 4 * 64 * 4, 4
    x, update, i = shape(256, 64), shape(4, 64), shape(dtype=jnp.int32)

    def updated_sine(x, u, i):
        return lax.dynamic_update_slice(jnp.sin(x), u * 2, (i, 0))

    def twice_the_updated(x, u, i):
        return lax.dynamic_update_slice(x, u, (i, 0)) * 2

    for fn in (updated_sine, twice_the_updated):
        assert profile(fn, x, update, i).requested == Traffic(whole + part + index, whole)
    in_place = jax.jit(lambda x, u, i: lax.dynamic_update_slice(x, u * 2, (i, 0)), donate_argnums=0)
    assert profile(in_place, x, update, i).requested == Traffic(part + index, part)


def test_a_small_transformers_training_step_is_profiled_in_5_seconds_over_its_compile_time():
    def layer(x, w):
        q, k, v = (x @ w[name] for name in "qkv")
        x = x + jax.nn.softmax(q @ k.mT) @ v
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"]

    def step(weights, x):
        def loss(weights):
            return lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0].var()

        return jax.tree.map(lambda p, g: p - 0.1 * g, weights, jax.grad(loss)(weights))

    weights = {name: shape(6, 128, 128) for name in "qkv"} | {"up": shape(6, 128, 512), "down": shape(6, 512, 128)}
    x = shape(4, 256, 128)
    start = time.process_time()
    jax.jit(step).lower(weights, x).compile()
    compiled = time.process_time() - start
    start = time.process_time()
    report = profile(step, weights, x)
    assert time.process_time() - start < compiled + 5
    assert {row.calls for row in report.rows} >= {1, 6}


@pytest.mark.parametrize("name", ["naive", "blockwise", "triton"])
def test_attention_and_its_gradient_at_16384_are_profiled_in_2_seconds_over_their_compile_time(name):
    x = shape(1, 16384, 8, 64, dtype=jnp.bfloat16)
    implementation = Triton(platform="cuda") if name == "triton" else name

    def gradient(q, k, v):
        def loss(q, k, v):
            output = jaxattn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
            return output.astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    compiled = 0.0
    if name != "triton":  # its kernels compile on no CPU
        start = time.process_time()
        jax.jit(gradient).lower(x, x, x).compile()
        compiled = time.process_time() - start
        jax.clear_caches()
    start = time.process_time()
    report = profile(gradient, x, x, x)
    assert time.process_time() - start < compiled + 2
    assert report.requested.total > 1e9
    assert not report.unknown


# --- bench traffic

FLOOR = "inputs + output, once"


def traffic_data(**changes):
    def row(name, length, requested, low, high):
        half = {"low": low // 2, "high": high // 2}
        return {
            "implementation": f"jaxattn-{name}",
            "label": traffic.LABELS[name],
            "keys": length,
            "requested": {"read": requested // 2, "written": requested // 2},
            "dram": {"read": half, "written": half},
            "compulsory": 1000 * length,
            "peak": 0,
            "launches": 3,
            "flops": 1,
            "unknown": [],
            "notes": [],
        }

    rows = []
    for n in (1024, 4096):
        rows += [row("naive", n, 8 * n * n, 6 * n * n, 7 * n * n), row("blockwise", n, 9 * n * n, 4000 * n, 5000 * n)]
        rows.append(row("triton", n, n * n, 1000 * n, 1000 * n))
    shape_of = {"batch": 1, "heads": 8, "head_dim": 64, "dtype": "bfloat16", "mask": "causal"}
    data = {"target": "h200", "target_name": "NVIDIA H200", "cache_bytes": 1 << 20, "is_cpu": False, "is_here": False}
    return {**data, "shape": shape_of, "rows": rows, **changes}


def test_traffic_table_shows_ratios_also_below_one_and_why():
    text = traffic.table(traffic_data())
    assert "0.889x" in text  # blockwise asks for 9/8 of what naive asks for
    assert traffic.WHY_XLA_WRITES in text
    assert "no GPU was used" in text
    assert "(model)" in text


def test_traffic_on_a_cpu_says_how_little_it_says():
    assert traffic.CPU_SAYS_LITTLE in traffic.table(traffic_data(is_cpu=True, is_here=True))
    assert traffic.CPU_SAYS_LITTLE not in traffic.table(traffic_data())


def test_traffic_names_what_could_not_be_compiled():
    data = traffic_data()
    data["rows"].append(
        {"implementation": "jaxattn-triton", "label": "kernel", "keys": 8192, "reason": "ImportError: x"}
    )
    assert "ImportError: x" in traffic.table(data)


def test_traffic_picture_is_drawn_from_its_json_alone(drawn, tmp_path):
    data = traffic_data()
    (tmp_path / "traffic.json").write_text(json.dumps(data))
    assert traffic.main(["--draw", str(tmp_path / "traffic.json")]) == 0
    assert (tmp_path / "traffic.png").read_bytes().startswith(b"\x89PNG")
    asked, crossing = drawn().axes
    for axis, what in ((asked, "requested"), (crossing, "dram")):
        *lines, floor = axis.get_lines()
        for line, name in zip(lines, ("naive", "blockwise", "triton"), strict=True):
            own = [row for row in data["rows"] if row["implementation"] == f"jaxattn-{name}"]
            assert list(line.get_xdata()) == [1024, 4096]
            assert list(line.get_ydata()) == [traffic.total(row, what) for row in own]
        assert list(floor.get_ydata()) == [1000 * 1024, 1000 * 4096]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1024", "4096"]
    assert [text.get_text() for text in drawn().legends[0].get_texts()] == [*traffic.LABELS.values(), FLOOR]
    bands = [path.vertices[:, 1].max() for band in crossing.collections for path in band.get_paths()]
    assert sorted(bands) == sorted([7 * 4096 * 4096, 5000 * 4096, 1000 * 4096])  # up to half the cache's
    assert "counted" in asked.get_title()
    assert "modelled" in crossing.get_title()
    assert "25x" in [text.get_text() for text in crossing.texts]  # 6 * 4096 / 1000
    title = drawn().get_suptitle()
    assert "NVIDIA H200 (no GPU was used)" in title
    assert "measured" not in title


def test_traffic_picture_of_a_cpu_says_how_little_it_says_and_how_to_get_a_gpus(drawn, tmp_path):
    traffic.figure(traffic_data(is_cpu=True, is_here=True, target_name="Some CPU"), tmp_path / "traffic.png")
    title = drawn().get_suptitle()
    assert "this machine's Some CPU" in title
    assert traffic.CPU_SAYS_LITTLE in title
    assert "python -m jaxattn.profiler wheels" in title


def test_traffic_of_this_cpu_orders_the_implementations():
    data = traffic.traffic_results(None, lengths=(512,))
    rows = {row["implementation"]: row for row in data["rows"] if "reason" not in row}
    assert "jaxattn-naive" in rows
    assert "jaxattn-triton" in rows
    naive, kernel = rows["jaxattn-naive"], rows["jaxattn-triton"]
    assert traffic.total(naive, "requested") > 10 * traffic.total(kernel, "requested")
    row_bytes = 512 * 8 * 64 * 2
    own = 4 * row_bytes + 512 * 8 * 4  # q, k, v, output and log-sum-exp
    assert traffic.total(kernel, "dram") == pytest.approx(own, rel=0.03)


@pytest.fixture(scope="module")
def published():
    """The rows of the published picture, by implementation and length: compiled for an H200."""
    data = json.loads((traffic.ROOT / "bench/results/h200-compiled/traffic.json").read_text())
    assert (data["target"], data["shape"]["mask"], data["shape"]["dtype"]) == ("h200", "causal", "bfloat16")
    return {(row["implementation"], row["keys"]): row for row in data["rows"]}


@pytest.mark.parametrize("n", traffic.LENGTHS)
def test_published_kernel_requests_its_queries_tiles_and_output(published, n):
    row = published["jaxattn-triton", n]
    (note,) = [note for note in row["notes"] if "registers" in note]
    assert "attention_forward_128x64" in note
    heads, head_bytes, bounds = traffic.HEADS, 2 * traffic.HEAD_DIM, 4 * 4  # a program's range of tiles: four integers
    blocks = n // 128
    tiles = sum(2 * (i + 1) for i in range(blocks))  # 64 keys each, up to the diagonal, for 128 queries
    read = heads * (n * head_bytes + 2 * tiles * 64 * head_bytes + blocks * bounds)
    assert row["requested"] == {"read": read, "written": heads * n * head_bytes}
    assert row["unknown"] == []


@pytest.mark.parametrize("n", traffic.LENGTHS)
def test_published_kernel_moves_its_inputs_and_output_across_dram_once(published, n):
    row = published["jaxattn-triton", n]
    assert row["compulsory"] == 4 * n * traffic.HEADS * traffic.HEAD_DIM * 2
    for end in ("low", "high"):
        assert traffic.total(row, "dram", end) == pytest.approx(row["compulsory"], rel=0.03)


def test_published_kernel_moves_at_least_ten_times_fewer_bytes_across_dram_than_naive_at_16384(published):
    naive, kernel = (published[f"jaxattn-{name}", 16384] for name in ("naive", "triton"))
    assert traffic.total(naive, "dram", "low") >= 10 * traffic.total(kernel, "dram", "high")


@pytest.mark.parametrize(
    ("backend", "wheels", "target"), [("gpu", True, None), ("cpu", True, "h200"), ("cpu", False, None)]
)
def test_traffic_is_counted_for_the_gpu_at_hand_else_for_an_h200_else_for_the_cpu(monkeypatch, backend, wheels, target):
    def find_wheels(folder=None):
        if not wheels:
            raise FileNotFoundError("no compile wheels")

    monkeypatch.setattr(compiling, "find_wheels", find_wheels)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert traffic.default_target() == target


def test_traffic_for_a_target_without_wheels_says_how_to_get_them(tmp_path, capsys):
    assert traffic.main(["--target", "h200", "--wheels", str(tmp_path)]) == 2
    assert "python -m jaxattn.profiler wheels" in capsys.readouterr().err


# --- bench counters. The numbers in this table are made up: they come of no GPU, and are plotted nowhere.

MADE_UP_CSV = """==PROF== Connected to process 1 (python)
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","lts__t_sectors_op_read.sum",\
"lts__t_sectors_op_write.sum"
"","","","","","","","","","","","byte","byte","nsecond","sector","sector"
"0","1","python","127.0.0.1","loop_add_fusion_1","1","7","(128, 1, 1)","(8, 1, 1)","0","9.0",\
"1,000","200","5,000","40","10"
"1","1","python","127.0.0.1","loop_add_fusion_1","1","7","(128, 1, 1)","(8, 1, 1)","0","9.0",\
"1,100","300","6,000","40","10"
"2","1","python","127.0.0.1","attention_forward","1","7","(128, 1, 1)","(8, 1, 1)","0","9.0","50","60","7,000","80","20"
"3","1","python","127.0.0.1","stray_kernel","1","7","(128, 1, 1)","(8, 1, 1)","0","9.0","1","1","1","1","1"
"""


def test_counters_are_read_by_name_and_order():
    launches = counters.parse(MADE_UP_CSV)
    assert [launch.kernel for launch in launches] == [*["loop_add_fusion_1"] * 2, "attention_forward", "stray_kernel"]
    first = launches[0]
    assert (first.dram_read, first.dram_written, first.l2_write_sectors, first.time_ns) == (1000, 200, 10, 5000)


def test_counters_in_larger_units_are_scaled():
    text = MADE_UP_CSV.replace('"byte","byte","nsecond"', '"Kbyte","byte","usecond"')
    assert (counters.parse(text)[0].dram_read, counters.parse(text)[0].time_ns) == (1e6, 5e6)


def test_counters_without_a_table_give_the_tools_own_error():
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        counters.parse("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    with pytest.raises(ValueError, match="no kernel was profiled"):
        counters.parse("")
    with pytest.raises(ValueError, match=r"no dram__bytes_read\.sum"):
        counters.parse(MADE_UP_CSV.replace("dram__bytes_read.sum", "other"))


def report_rows():
    row = {"opcode": "fusion", "share": 0.0, "confidence": "exact"}
    return [
        {**row, "name": "loop_add_fusion.1", "calls": 2, "read": 2040, "written": 640},
        {**row, "name": "attention_forward", "calls": 3, "read": 500, "written": 640},
        {**row, "name": "loop-lost", "calls": 1, "read": 1, "written": 1},
    ]


def test_counters_are_joined_to_rows_and_the_rest_is_named():
    launches = counters.parse(MADE_UP_CSV)
    joined, remarks = counters.join(report_rows(), launches, launches)
    assert [(row.kernel, row.launches) for row in joined] == [("loop_add_fusion_1", 2), ("attention_forward", 1)]
    assert joined[0].dram_read_cold == 2100
    assert joined[0].l2_written == 20 * 32
    assert len(remarks) == 3
    assert "attention_forward: 3 calls in the report, 1 launches" in remarks
    assert "loop_lost: in the report, never launched" in remarks
    assert "stray_kernel: launched, in no row of the report" in remarks


def test_counters_are_checked_three_ways():
    launches = counters.parse(MADE_UP_CSV)
    joined = counters.join(report_rows(), launches, launches)[0][:1]
    model = {"read": {"low": 2000, "high": 3000}, "written": {"low": 500, "high": 600}}
    reads, writes, whole = counters.checks(joined, launches, model, cache_bytes=80)
    assert "DRAM reads" in reads.what
    assert reads.holds  # 2100 of 2040
    assert "sectors" in writes.what
    assert writes.holds  # 640 of 640
    assert whole.holds  # 2712 lies in 2500 to 3600
    low = {"read": {"low": 0, "high": 100}, "written": {"low": 0, "high": 100}}
    assert not counters.checks(joined, launches, low, cache_bytes=80)[-1].holds
    strict = [dataclasses.replace(joined[0], dram_read_cold=2200, l2_written=500)]
    assert [check.holds for check in counters.checks(strict, launches, model, 80)] == [False, False, True]


def test_counters_without_gpu_or_tool_say_which_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(counters.environment, "nvidia_gpu", lambda: None)
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert counters.main([]) == commands.MISSING
    text = capsys.readouterr().err
    assert "no NVIDIA GPU" in text
    assert "ncu" in text
    monkeypatch.setattr(counters.environment, "nvidia_gpu", lambda: "NVIDIA H100")
    assert counters.main([]) == commands.MISSING
    assert "no NVIDIA GPU" not in capsys.readouterr().err
