"""Figures and reports come from results files only; summaries and comparisons are what they say."""

import copy
import itertools
import json
import math
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

from bench import commands, compare, measure, plot, readme, report, results, run

LABELS = {"jaxattn-naive": False, "jaxattn-blockwise": True, "torch-sdpa-flash": True}


def row(name, length, times_s=(), **others):
    made = {
        "case": "llama-3.2-1b",
        "mask": "causal",
        "batch": 1,
        "queries": length,
        "keys": length,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 64,
        "dtype": "float32",
        "direction": "forward",
        "cold": False,
        "layer": False,
        "implementation": name,
        "label": name.replace("-", " "),
        "framework": "torch" if name.startswith("torch") else "jax",
        "tiled": LABELS[name],
        "status": "ok" if times_s else "skipped",
        "reason": "",
        "flops": 2.0 * 64 * 32 * length**2,
        "predicted_bytes": 12 * 32 * length**2,
        "available_bytes": 20 * 10**9,
        "peak_bytes": 12 * 32 * length**2 if times_s else None,
        "error": {"rmse": 3e-7, "bound": 6e-7} if times_s else None,
        "times_s": list(times_s),
        "device_times_s": [],
    }
    return made | others


def data(rows):
    return {
        "schema": results.SCHEMA,
        "date": "2000-01-01T00:00:00+00:00",
        "command": "made up for a test",
        "commit": None,
        "settings": {"threads": 2},
        "environment": {
            "device": "cpu",
            "device_name": "Test CPU",
            "cores": 2,
            "memory_bytes": 20 * 10**9,
            "load_average": 0.1,
            "versions": {"jax": "0"},
            "python": "3",
            "notes": ["a note"],
        },
        "method": ["how"],
        "rows": rows,
    }


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.fixture
def example():
    rows = [row("jaxattn-naive", 1024, (0.15, 0.15, 0.15)), row("jaxattn-naive", 4096, (4.0, 4.1, 4.2))]
    reason = "memory: 103.4 GB predicted, 17.0 GB may be used"
    rows.append(row("jaxattn-naive", 16384, reason=reason))
    for length, time_s in ((1024, 0.1), (4096, 1.0), (16384, 16.0)):
        rows.append(row("jaxattn-blockwise", length, (time_s, 1.1 * time_s, 0.9 * time_s)))
        rows.append(row("torch-sdpa-flash", length, (2 * time_s,)))
    return data(rows)


def test_crossover_is_the_first_length_at_which_flash_is_more_than_twice_as_fast(example):
    assert plot.crossover(example["rows"]) == 4096
    assert plot.crossover([one for one in example["rows"] if one["keys"] == 1024]) == plot.NEVER


@pytest.mark.parametrize("unknown", [False, True])
def test_no_crossover_is_named_where_only_one_kind_was_timed(example, unknown):
    rows = [one for one in example["rows"] if one["tiled"]]
    if unknown:  # a user's function, ten times slower
        rows += [one | {"implementation": "mine:f", "tiled": None, "times_s": [200.0]} for one in rows[-1:]]
    assert plot.crossover(rows) is None
    assert "2x" not in report.findings(rows)


def test_a_results_file_is_json_even_where_an_error_is_nan(example, tmp_path):
    example["rows"][0]["error"] = {"rmse": math.nan, "bound": math.inf}
    results.save(example, tmp_path)
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert results.load(tmp_path)["rows"][0]["error"] == {"rmse": None, "bound": None}


@pytest.mark.parametrize(
    ("place", "name"),
    [("environment", name) for name in ("device_name", "platform", "cores", "python")]
    + [("environment/versions", "jax"), ("settings", "seed"), ("settings", "threads"), ("code", results.CHECKOUT)]
    + [("code", "mine")],
)
def test_runs_on_other_machines_versions_code_seeds_or_threads_are_told_apart(example, place, name):
    example["settings"] |= {"seed": 0}
    example["code"] = {results.CHECKOUT: "1", "mine": "2"}
    assert results.differences(example, copy.deepcopy(example)) == []
    other = copy.deepcopy(example)
    inner = other
    for folder in place.split("/"):
        inner = inner[folder]
    before, inner[name] = inner.get(name), "another"
    called = f"code of {name}" if place == "code" else name
    assert results.differences(example, other) == [(called, before, "another")]


def test_another_function_of_the_user_is_no_difference_but_unknown_code_is(example):
    one, two = (copy.deepcopy(example) | {"code": {results.CHECKOUT: "1", name: "2"}} for name in ("mine", "yours"))
    assert results.differences(one, two) == []
    assert [name for name, *_ in results.differences(example, one)] == [f"code of {results.CHECKOUT}"]


def test_figures_are_drawn_and_hold_what_was_not_measured_as_hollow_markers(example, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.setdefault(path.name, figure) and path)
    names = [path.name for path in plot.draw(example, tmp_path)]
    assert names == [f"llama-3.2-1b-{kind}.png" for kind in ("time", "tflops", "memory", "error")]
    ax = drawn["llama-3.2-1b-memory.png"].axes[0]
    hollow = [line for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
    assert [list(line.get_xdata()) for line in hollow] == [[16384]]
    assert hollow[0].get_color() == plot.STYLES["jaxattn-naive"].colour
    (time_ax,) = drawn["llama-3.2-1b-time.png"].axes
    vertical = [line for line in time_ax.get_lines() if list(line.get_xdata()) == [4096, 4096]]
    assert len(vertical) == 1
    solid = {line.get_label(): list(line.get_ydata()) for line in time_ax.get_lines()}
    assert solid["jaxattn blockwise"] == [100.0, 1000.0, 16000.0]


@pytest.mark.parametrize(("status", "some"), [("skipped", True), ("skipped", False), ("out of memory", True)])
def test_a_layer_that_does_not_fit_in_memory_is_in_both_figures(example, tmp_path, monkeypatch, status, some):
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.setdefault(path.name, figure) and path)
    layer = {"implementation": "hf-eager-layer", "label": "HF eager layer", "layer": True}
    reason = "memory: 72.8 GB predicted, 20.6 GB may be used" if status == "skipped" else "killed by the system"
    rows = [row("jaxattn-naive", 1024, (0.2,), **layer)] if some else []
    example["rows"] += [*rows, row("jaxattn-naive", 16384, **layer, status=status, reason=reason)]
    plot.draw(example, tmp_path)
    for kind in ("time", "memory"):
        attention, layers = drawn[f"llama-3.2-1b-{kind}.png"].axes
        hollow = [line for line in layers.get_lines() if line.get_markerfacecolor() == "none"]
        assert [(line.get_marker(), list(line.get_xdata())) for line in hollow] == [("d", [16384])], kind
        assert attention.get_ylim() == layers.get_ylim()
        assert [line.get_label() for line in layers.get_lines()].count("HF eager layer") == 1  # in the legend, once


def test_rates_of_both_panels_are_inside_their_one_scale(example, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.setdefault(path.name, figure) and path)
    example["rows"].append(row("jaxattn-blockwise", 1024, (0.01,), layer=True, implementation="jaxattn-layer"))
    plot.draw(example, tmp_path)
    for ax in drawn["llama-3.2-1b-tflops.png"].axes:
        lowest, highest = ax.get_ylim()
        rates = [y for line in ax.get_lines() for y in line.get_ydata()]
        assert rates
        assert all(lowest <= rate <= highest for rate in rates)


def test_the_figure_of_all_masks_shows_what_does_not_fit_and_where_flash_wins(example, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.setdefault(path.name, figure) and path)
    example["rows"] += [one | {"mask": "full", "times_s": one["times_s"][:1]} for one in example["rows"]]
    plot.draw(example, tmp_path)
    for ax, mask in zip(drawn["llama-3.2-1b-masks.png"].axes, ("causal", "full"), strict=True):
        assert ax.get_title() == f"{mask}, float32\nflash more than 2x faster: first at 4096"
        hollow = [line for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
        assert [(line.get_marker(), list(line.get_xdata())) for line in hollow] == [("o", [16384])]


@pytest.mark.parametrize(
    ("low", "high"), [(526, 6787), (2992, 29955), (4000, 7000), (3000, 4500), (61, 64), (0.5, 900), (2, 55)]
)
def test_labels_of_a_logarithmic_axis_stand_apart(low, high):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    ax = figure.add_subplot()
    ax.plot([low, high], [1, 2])
    plot.log_scale(ax.xaxis)
    figure.canvas.draw()
    left, right = ax.get_xlim()
    labels = [
        tick for tick in ax.get_xticklabels(which="both") if tick.get_text() and left <= tick.get_position()[0] <= right
    ]
    assert labels
    places = sorted(tick.get_window_extent().extents[[0, 2]].tolist() for tick in labels)
    assert all(after[0] - before[1] > 3 for before, after in itertools.pairwise(places)), [t.get_text() for t in labels]


def test_two_functions_of_a_user_look_different_and_the_same_in_every_figure(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.setdefault(path.name, figure) and path)
    mine = {name: {"implementation": f"mine:{name}", "label": name, "tiled": None} for name in "fg"}
    rows = [row("jaxattn-naive", 64, (1.0,), **mine["f"]), row("jaxattn-naive", 64, (2.0,), **mine["g"])]
    rows.append(row("jaxattn-naive", 64, (2.0,), **mine["g"], mask="full"))
    plot.draw(data(rows), tmp_path)

    def look(name, label):
        (line,) = [line for line in drawn[name].axes[0].get_lines() if line.get_label() == label]
        return line.get_marker(), line.get_linestyle()

    f, g = (look("llama-3.2-1b-causal-time.png", label) for label in "fg")
    assert f != g
    assert look("llama-3.2-1b-full-time.png", "g") == g


TRAFFIC = {
    "target": "NVIDIA H100",
    "requested_bytes": 4 * 10**9,
    "dram_low_bytes": 10**9,
    "dram_high_bytes": 2 * 10**9,
    "compulsory_bytes": 10**8,
    "peak_flops": 989e12,
    "bytes_per_s": 3.35e12,
    "unknown": [],
}


def test_modelled_bytes_are_drawn_hollow_and_measured_rates_under_the_roofs(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.setdefault(path.name, figure) and path)
    rows = [
        row("jaxattn-naive", 1024, (1.0,), traffic=TRAFFIC),
        row("jaxattn-blockwise", 1024, (1.0,), traffic=TRAFFIC | {"unknown": ["a loop"]}),
        row("torch-sdpa-flash", 1024, (1.0,), traffic=None),
    ]
    plot.draw(data(rows), tmp_path)
    requested, dram = drawn["llama-3.2-1b-bytes.png"].axes
    assert [(line.get_label(), list(line.get_ydata())) for line in requested.get_lines()] == [("jaxattn naive", [4.0])]
    assert all(line.get_markerfacecolor() == "none" for line in (*requested.get_lines(), *dram.get_lines()))
    (ax,) = drawn["llama-3.2-1b-roofline.png"].axes
    naive, roof = ax.get_lines()
    assert list(naive.get_xdata()) == [rows[0]["flops"] / 1e9]
    assert max(roof.get_ydata()) == 989
    text = report.markdown(report.blocks(data(rows), []))
    assert "modelled by the profiler, not measured" in text
    assert "| jaxattn naive | 1024 | 100 | 4000 | 1000 to 2000 |  |" in text
    assert "| jaxattn blockwise | 1024 | 100 | 4000 | 1000 to 2000 | a loop |" in text


def test_figures_say_never_where_flash_is_never_twice_as_fast(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure) or path)
    plot.draw(data([row("jaxattn-naive", 64, (1.0,)), row("jaxattn-blockwise", 64, (1.0,))]), tmp_path)
    assert figures[0].axes[0].get_title() == "attention\nflash more than 2x faster: never"


def test_no_two_implementations_look_alike_on_grey_paper():
    looks = [(style.marker, style.line) for style in (*plot.STYLES.values(), *plot.OTHERS)]
    assert len(set(looks)) == len(looks)
    counted = [look.marker for name, look in plot.STYLES.items() if not name.startswith(("torch", "hf"))]
    assert len(set(counted)) == len(counted)  # in the figure of bytes every line is dotted


def test_plotting_imports_no_framework(example, tmp_path):
    results.save(example, tmp_path)
    code = (
        "import sys; from pathlib import Path; from bench import plot, report, results\n"
        f"folder = Path({str(tmp_path)!r}); data = results.load(folder)\n"
        "report.write(data, folder, plot.draw(data, folder))\n"
        "print([name for name in ('jax', 'torch', 'jaxattn') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=run.ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
    text = (tmp_path / "report.md").read_text()
    assert "more than 2x faster than standard first at length 4096" in text
    assert "Speedup at n=4096: 4.10x (jaxattn blockwise over jaxattn naive)" in text
    assert "| jaxattn naive | 16384 | skipped | memory: 103.4 GB predicted, 17.0 GB may be used |" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert 'src="llama' not in page


def test_summary_is_median_spread_and_rate():
    short = results.summary({"times_s": [0.2, 0.1, 0.4, 0.3, 0.2], "flops": 1e12})
    assert short.time_ms == 200
    assert (short.low_ms, short.high_ms, short.repeats) == (100, 400, 5)
    assert short.tflops == pytest.approx(5.0)
    assert short.noise == pytest.approx((math.log(0.2 / 0.1), math.log(0.4 / 0.2)))  # five repeats know no better
    calm = results.summary({"times_s": [0.2] * 8 + [0.21, 0.3, 0.1], "flops": 1e12})
    assert calm.noise == pytest.approx((results.SMALLEST_NOISE, results.SMALLEST_NOISE))
    drift = results.summary({"times_s": [0.2] * 200 + [0.3] * 200 + [0.25], "flops": 1e12})
    assert drift.noise == pytest.approx((math.log(0.25 / 0.2), math.log(0.3 / 0.25)))  # quartiles do not shrink
    assert results.summary({"times_s": [1.0], "device_times_s": [0.5], "flops": 1e12}).tflops == pytest.approx(2.0)
    assert results.summary({"times_s": []}).time_ms is None


def controlled(name, *repeats):
    """A row of (seconds, control's seconds)."""
    return row(name, 1024, [time_s for time_s, _ in repeats], control_s=[control_s for _, control_s in repeats])


FAST, SLOW = (0.1, 0.007), (0.2, 0.012)


def test_disturbed_repeats_are_in_the_file_and_in_no_figure(example, tmp_path):
    assert [one | {"disturbed": 0, "left_out": 0} for one in example["rows"]] == results.counting(example)  # no control
    mixed = data(
        [
            controlled("jaxattn-naive", (0.3, 0.009), (0.3, 0.009), (0.4, 0.009)),  # usual, beside a least of 0.007
            controlled("jaxattn-blockwise", SLOW, FAST, SLOW, FAST, FAST, SLOW, SLOW),
            controlled("torch-sdpa-flash", FAST, SLOW, SLOW, FAST, SLOW),
        ]
    )
    results.save(mixed, tmp_path)
    mixed = results.load(tmp_path)
    assert [len(one["times_s"]) for one in mixed["rows"]] == [3, 7, 5]
    naive, ours, torch = map(results.summary, results.counting(mixed))
    assert (naive.repeats, naive.time_ms) == (3, pytest.approx(300))
    assert (ours.repeats, ours.time_ms, ours.high_ms) == (3, pytest.approx(100), pytest.approx(100))
    assert (torch.repeats, torch.time_ms) == (5, pytest.approx(200))  # two undisturbed ones are too few
    text = report.markdown(report.blocks(mixed, []))
    assert "| jaxattn blockwise | 1024 | 100 | 100 to 100 | 3 |" in text
    assert "for the control beside them was slow: jaxattn blockwise at 1024, 4 of 7 repeats. In the figures" in text
    assert "fewer than 3 repeats were not: torch sdpa flash at 1024, 3 of 5 repeats." in text
    assert "| jaxattn blockwise | 100 ms, 384 MiB |" in readme.table(mixed, "llama-3.2-1b", "x")
    assert "disturbed" not in report.markdown(report.blocks(example, []))


def test_the_least_control_is_that_of_all_rows():
    mixed = data([controlled("jaxattn-naive", FAST), controlled("jaxattn-blockwise", *[SLOW] * 3)])
    assert results.least_control_s(mixed) == 0.007
    assert [one["disturbed"] for one in results.counting(mixed)] == [0, 3]
    assert results.least_control_s(data([row("jaxattn-naive", 1024, (1.0,), control_s=[None])])) is None


def test_compare_leaves_out_disturbed_repeats_and_tells_a_machine_that_differed(tmp_path, capsys):
    a = data([controlled("jaxattn-naive", *[FAST] * 3), controlled("jaxattn-blockwise", *[FAST] * 3)])
    b = data([controlled("jaxattn-naive", *[FAST] * 3), controlled("jaxattn-blockwise", *[FAST] * 3, *[SLOW] * 5)])
    slow = data([controlled("jaxattn-naive", *[FAST] * 3), controlled("jaxattn-blockwise", *[FAST] * 3)])
    for one in slow["rows"]:
        one["control_s"] = [0.012] * 3
    old = data([row("jaxattn-naive", 1024, (0.1,) * 3)])
    half = data([controlled("jaxattn-naive", *[FAST] * 2, *[SLOW] * 12), controlled("jaxattn-blockwise", *[FAST] * 3)])
    for name, file in (("a", a), ("b", b), ("slow", slow), ("old", old), ("half", half)):
        results.save(file, tmp_path / name)
    said = {}
    for one, two in (
        ("a", "b"),
        ("b", "a"),
        ("a", "slow"),
        ("slow", "a"),
        ("slow", "old"),
        ("a", "half"),
        ("half", "a"),
    ):
        assert compare.main([str(tmp_path / one), str(tmp_path / two)]) == 0
        said[one, two] = capsys.readouterr().out
    for pair, rows in ((("a", "b"), 2), (("b", "a"), 2), (("slow", "old"), 1)):
        assert said[pair].count("within noise") == rows
        assert "machine" not in said[pair]
    for pair in (("a", "half"), ("half", "a")):  # too few undisturbed repeats in one row
        assert [printed.split()[-1] for printed in said[pair].splitlines()[-2:]] == ["disturbed", "noise"]
    line = "The machine differed: its control took at least 7.0 ms in A and 12.0 ms in B, a ratio of 1.71."
    assert said["a", "slow"].splitlines()[2] == line
    assert "12.0 ms in A and 7.0 ms in B, a ratio of 0.58." in said["slow", "a"]
    for pair in (("a", "slow"), ("slow", "a")):
        assert said[pair].count("the machine differed") == 2
        assert "within noise" not in said[pair]


def test_rows_whose_medians_may_be_one_are_within_noise():
    scattered = data([row("jaxattn-naive", 1024, (0.38, 0.39, 0.506, 0.595, 0.619, 0.655))])
    near = data([row("jaxattn-naive", 1024, (0.367, 0.374, 0.38, 0.435, 0.377, 0.379, 0.39, 0.382))])
    far = data([row("jaxattn-naive", 1024, (0.1, 0.11, 0.1, 0.12, 0.1, 0.11))])
    verdicts = [results.compare(a, b)[0].verdict for a, b in itertools.permutations((scattered, near, far), 2)]
    assert verdicts == ["within noise", "faster", "within noise", "faster", "slower", "slower"]


def test_compare_tells_noise_from_difference(example, tmp_path, capsys):
    other = data([one | {"times_s": [3 * t for t in one["times_s"]]} for one in example["rows"]])
    ratios = results.compare(example, other)
    assert all(math.isclose(ratio.ratio, 3) for ratio in ratios)
    assert {ratio.verdict for ratio in ratios} == {"slower", "too few repeats to say"}
    assert {ratio.verdict for ratio in results.compare(example, example)} == {"within noise", "too few repeats to say"}
    assert {ratio.verdict for ratio in results.compare(other, example)} >= {"faster"}
    results.save(example, tmp_path / "a")
    results.save(data([]), tmp_path / "b")
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert "within noise" in capsys.readouterr().out
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1


def test_compare_says_what_else_differs_and_what_only_one_file_holds(example, tmp_path, capsys):
    other = copy.deepcopy(example)
    other["environment"]["device_name"] = "Other CPU"
    other["rows"][0]["case"] = "mqa"
    results.save(example, tmp_path / "a")
    results.save(other, tmp_path / "b")
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "The runs differ in more than their times:\n  device_name: Test CPU in A, Other CPU in B\n" in printed
    assert "Only in A: 1 measurements of llama-3.2-1b.\nOnly in B: 1 measurements of mqa.\n" in printed
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "differ" not in printed
    assert "Only" not in printed


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no results here"),
        (b"{", "not JSON"),
        (b"\xff\x00", "not JSON"),
        (b"{}", "schema"),
        (b'{"schema": 1, "rows": []}', "without command, commit, date, environment, settings"),
        ({"rows": [{"status": "ok"}]}, "without batch, case.* in a row"),
        ({"rows": [3]}, "in a row"),
        ({"settings": {}}, "without threads in its settings"),
        ({"environment": {"device": "cpu"}}, "without cores, device_name, load_average in its environment"),
        ({"rows": None}, "without rows"),
    ],
)
def test_a_file_that_is_no_results_file_is_named(content, problem, tmp_path):
    if isinstance(content, dict):
        content = json.dumps(data([]) | content).encode()
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        results.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_holds_only_what_is_required_is_drawn_compared_and_reported(example, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "save", lambda figure, path: path)
    least = {name: example[name] for name in {"schema"} | results.REQUIRED["file"]}
    for name in ("settings", "environment"):
        least[name] = {key: example[name][key] for key in results.REQUIRED[name]}
    least["rows"] = [{name: one[name] for name in results.REQUIRED["row"]} for one in example["rows"]]
    results.save(least, tmp_path)
    assert plot.main([str(tmp_path)]) == 0
    assert report.main([str(tmp_path)]) == 0
    assert compare.main([str(tmp_path)] * 2) == 0


def test_what_cannot_be_written_is_named_in_one_line(example, tmp_path, capsys, monkeypatch):
    from bench import __main__

    monkeypatch.setattr(plot, "draw", lambda data, folder: [])
    results.save(example, tmp_path)
    (tmp_path / "report.md.new").mkdir()  # in the way of the file of that name
    assert __main__.main(["report", str(tmp_path)]) == 2
    expected = f"{tmp_path}/report.md cannot be written: Is a directory; what was written before is whole\n"
    assert capsys.readouterr().err == expected


def test_numbers_keep_three_digits():
    assert [report.number(x) for x in (1234.6, 12.34, 0.00123, None)] == ["1235", "12.3", "0.00123", ""]


def test_only_commands_whose_module_is_there_are_listed(monkeypatch):
    assert {"compare", "plot", "report", "calculate"} <= commands.available().keys()
    monkeypatch.setitem(commands.COMMANDS, "ghost", commands.Command("bench.no_such_module", "not there"))
    assert "ghost" not in commands.available()


def test_an_unknown_command_is_answered_with_the_commands(capsys):
    from bench import __main__

    assert __main__.main(["ghost"]) == 2
    assert "calculate" in capsys.readouterr().err


def test_the_readme_and_the_published_results_agree():
    text = (run.ROOT / "README.md").read_text()
    new, count = readme.updated(text, run.ROOT)
    assert count >= 1, "the README holds no table of results"
    assert new == text, "python -m bench readme makes the tables again"


@pytest.mark.parametrize(
    ("code", "drawn", "said"),
    [(0, True, ""), (2, False, "ended with exit code 2"), (None, False, "took more than 60 s")],
)
def test_the_traffic_picture_is_drawn_by_its_command_or_its_absence_is_explained(
    tmp_path, monkeypatch, capsys, code, drawn, said
):
    asked = []

    def ran(command, cwd, timeout, check):
        asked.append(command[1:])
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        if drawn:
            (tmp_path / "traffic.png").write_bytes(b"a picture")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(measure.subprocess, "run", ran)
    pictures = measure.traffic_picture(tmp_path)
    assert asked == [["-m", "bench", "traffic", "--out", str(tmp_path)]]
    assert pictures == [tmp_path / "traffic.png"] * drawn
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(printed) == bool(said)


def test_a_readme_block_is_made_from_its_results(example, tmp_path):
    results.save(example, tmp_path / "bench/results/cpu/cases")
    begin, end = "<!-- bench: cpu/cases llama-3.2-1b -->\n", "<!-- /bench -->"
    new, count = readme.updated(f"before\n{begin}old{end}\nafter", tmp_path)
    assert count == 1
    assert new.startswith(f"before\n{begin}")
    assert new.endswith(f"{end}\nafter")
    assert "| jaxattn naive | 150 ms, 384 MiB | 4100 ms, 6144 MiB | (memory) |" in new
    assert "| torch sdpa flash | 200 ms once, 384 MiB |" in new
    assert 'the median of several; "once": a single one' in new
    assert "](bench/results/cpu/cases/llama-3.2-1b-time.png)" in new
    assert readme.updated(new, tmp_path) == (new, 1)
    example["environment"]["load_average"] = 9.4
    assert "2 cores, 2000-01-01, beside other work (load average 9)." in readme.table(example, "llama-3.2-1b", "x")
    with pytest.raises(ValueError, match="no measurement of case 'mqa'"):
        readme.updated(f"<!-- bench: cpu/cases mqa -->\n{end}", tmp_path)
    with pytest.raises(ValueError, match="no results here"):
        readme.updated(f"<!-- bench: h200/cases mqa -->\n{end}", tmp_path)
