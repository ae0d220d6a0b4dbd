"""The runner: nothing wrong is timed, a crash costs one row, what cannot fit is skipped with its numbers.

Runs real child processes at tiny shapes; the predictions of memory are compared with real peaks.
"""

import dataclasses
import itertools
import json
import shlex
import sys
import types

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from bench import adapters, cases, child, environment, measure, plot, report, results, run
from bench.cases import Problem

TINY = cases.custom("1,64,64,4,2,16", "causal")
FUNCTIONS = "tests.bench_functions:"
CRASHING_LATER = f"torch:{FUNCTIONS}crashing_later"


def runner(tmp_path, earlier=None, **settings):
    settings = run.Settings(**{"device": "cpu", "total_s": 120, "repeats": 3, **settings})
    return run.Runner(settings, tmp_path / "run", "a test", earlier)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One run of good and bad implementations side by side; its results."""
    tmp_path = tmp_path_factory.mktemp("mixed")
    known = ("jaxattn-triton", "torch-sdpa-efficient")
    brought = ("right", "wrong", "crashing", "too_large", "wasteful")
    names = (*known, *(FUNCTIONS + name for name in brought), f"torch:{FUNCTIONS}torch_right", CRASHING_LATER)
    with runner(tmp_path, repeats=6, implementations=names) as one:
        one.run([TINY])
    return results.load(tmp_path / "run")


def row_of(data, name):
    (row,) = [row for row in data["rows"] if row["implementation"] == name]
    return row


@pytest.mark.parametrize("name", [FUNCTIONS + "right", f"torch:{FUNCTIONS}torch_right"])
def test_a_right_implementation_is_judged_and_timed(mixed, name):
    row = row_of(mixed, name)
    assert row["status"] == "ok", row["reason"]
    assert len(row["times_s"]) >= 3
    assert 0 < row["error"]["rmse"] <= row["error"]["bound"]
    assert row["error"]["rows"] == 32


def test_a_wrong_implementation_is_shown_as_wrong_and_not_timed(mixed):
    row = row_of(mixed, FUNCTIONS + "wrong")
    assert row["status"] == "wrong"
    assert row["times_s"] == []
    assert row["error"]["rmse"] > 1000 * row["error"]["bound"]
    assert "times the allowed error" in row["reason"]


def test_a_crash_costs_its_own_row_only(mixed):
    row = row_of(mixed, FUNCTIONS + "crashing")
    assert row["status"] == "crashed"
    assert "SIGABRT" in row["reason"]


def test_a_crash_while_it_is_timed_is_shown_as_a_crash_and_not_as_measured(mixed):
    row = row_of(mixed, CRASHING_LATER)
    assert row["status"] == "crashed"
    assert 1 <= len(row["times_s"]) < 5
    assert f"after {len(row['times_s'])} repeats" in row["reason"]
    assert "SIGABRT" in row["reason"]
    assert results.summary(row).time_ms is None
    lost = f"| {CRASHING_LATER} | 64 | crashed | {row['reason']} |"
    assert [line for line in report.markdown(report.blocks(mixed, [])).splitlines() if "crashing_later" in line] == [
        lost
    ]


def test_running_out_of_memory_costs_its_own_row_only(mixed):
    assert row_of(mixed, FUNCTIONS + "too_large")["status"] == "out of memory"


def test_what_the_compiler_says_is_too_large_is_never_run(mixed):
    row = row_of(mixed, FUNCTIONS + "wasteful")
    assert row["status"] == "skipped"
    assert row["reason"].startswith("memory: ")
    assert row["compiled_peak_bytes"] > 1e15


@pytest.mark.parametrize("name", ["jaxattn-triton", "torch-sdpa-efficient"])
def test_what_needs_a_gpu_is_refused_on_a_cpu_with_the_reason(mixed, name):
    row = row_of(mixed, name)
    assert row["status"] == "refused"
    assert "CUDA only" in row["reason"]


def test_the_file_holds_what_the_figures_were_taken_on(mixed):
    assert mixed["environment"]["device"] == "cpu"
    assert {"jax", "torch", "numpy"} <= mixed["environment"]["versions"].keys()
    assert mixed["settings"]["seed"] == 0
    assert mixed["command"] == "a test"


def test_a_resumed_run_measures_only_what_is_not_done(mixed, tmp_path):
    again = (FUNCTIONS + "right", FUNCTIONS + "crashing", "jaxattn-triton")
    with runner(tmp_path, earlier=mixed, implementations=again) as one:
        started = one.started
        one.run([TINY])
        assert one.started == started + 1
        data = one.results
    assert row_of(data, FUNCTIONS + "right") == row_of(mixed, FUNCTIONS + "right")
    assert row_of(data, FUNCTIONS + "crashing")["status"] == "crashed"
    assert data["rows"][-1]["implementation"] == FUNCTIONS + "crashing"  # the row of this run, and no other
    assert len(data["rows"]) == len(mixed["rows"])
    assert data["resumed"] == [mixed["date"]]


def test_a_run_of_another_machine_seed_and_code_is_not_gone_on_with(mixed, tmp_path):
    names = {"environment": "device_name", "settings": "seed", "code": results.CHECKOUT}
    other = mixed | {part: mixed[part] | {name: "another"} for part, name in names.items()}
    with pytest.raises(RuntimeError, match="--resume: the earlier run is not comparable with this one") as caught:
        runner(tmp_path, earlier=other)
    for name in ("device_name", "seed", f"code of {results.CHECKOUT}"):
        assert f"{name} was another, is " in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_gone_on_with_by_its_own_options(mixed, tmp_path):
    argv = ["--case", "decode", "--seq", "64", "--seed", "3", "--out", "elsewhere"]
    results.save(mixed | {"command": shlex.join(["python", "-m", "bench", *argv])}, tmp_path)
    resume = ["--resume", str(tmp_path)]
    assert measure.resumed(tmp_path, resume)[1] == argv
    assert measure.resumed(tmp_path, [*argv, *resume])[1] == argv  # repeated, as one may
    options = measure.resumed(tmp_path, ["--minutes", "2", *resume, "--seed", "4"])[1]
    assert options == [*argv, "--minutes", "2", "--seed", "4"]
    assert measure.parser().parse_args(options).seed == 4
    results.save(mixed, tmp_path)
    with pytest.raises(ValueError, match="its command 'a test' is not one to go on with"):
        measure.resumed(tmp_path, resume)
    results.save(mixed | {"command": "python -m bench cpu --pairs 3"}, tmp_path)
    with pytest.raises(ValueError, match=f"resume it with python -m bench cpu --resume {tmp_path}$"):
        measure.resumed(tmp_path, resume)


def test_results_that_are_there_are_not_written_over(tmp_path, capsys):
    (tmp_path / "results.json").write_text("kept")
    assert measure.main(["--out", str(tmp_path)]) == 2
    assert f"give --resume {tmp_path} to go on with them, or another folder" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "kept"


def ended(status, repeats, reason="why"):
    return {"status": status, "times_s": [1.0] * repeats, "reason": reason}


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        (("stopped", 9), ("crashed", 0), "old"),
        (("stopped", 9), ("timed out", 3), "old"),
        (("stopped", 3), ("crashed", 5), "old"),
        (("crashed", 5), ("skipped", 0), "old"),
        (("crashed", 5), ("stopped", 3), "new"),
        (("stopped", 3), ("stopped", 4), "new"),
        (("skipped", 0), ("crashed", 0), "new"),
        (("stopped", 9), ("ok", 3), "new"),
        (("stopped", 9), ("wrong", 0), "new"),
    ],
)
def test_an_earlier_run_s_row_is_kept_where_it_has_more_repeats(old, new, kept):
    old, new = ended(*old, "then"), ended(*new, "now")
    row = run.better(old, new)
    if kept == "new":
        assert row is new
        return
    assert row == old | {"reason": f"then; gone on with, it is {new['status']}: now"}
    assert run.better(row, new) == row  # said once


def test_fewer_repeats_do_not_take_the_place_of_more_while_they_are_taken(tmp_path):
    problem = Problem("c", "x", 1, 64, 64, 2, 2, 16, "causal", "float32", "cpu")
    one = run.Runner.__new__(run.Runner)
    one.folder, old = tmp_path, dataclasses.asdict(problem) | ended("stopped", 9)
    one.results = {"rows": [old]}
    one.under_way = [run.Measurement(problem, dataclasses.asdict(problem) | ended("ok", 3))]
    one.save()
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [old]
    one.under_way[0].row["times_s"] *= 4
    one.save()
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["status"], len(row["times_s"])) == ("stopped", 12)


def test_repeats_are_on_the_disk_after_each_round_and_are_no_finished_row(tmp_path, monkeypatch):
    name, seen, ask = FUNCTIONS + "right", [], run.Child.ask

    def look_first(self, do, *arguments, **request):
        if do == "sample":
            seen.append(results.load(tmp_path / "run"))
        return ask(self, do, *arguments, **request)

    monkeypatch.setattr(run.Child, "ask", look_first)
    with runner(tmp_path, implementations=(name,)) as one:
        one.run([TINY])
    first, second, third = seen
    final = row_of(results.load(tmp_path / "run"), name)
    assert first["rows"] == []
    for earlier in (second, third):
        row = row_of(earlier, name)
        assert row["status"] == "stopped"
        assert row["times_s"] == final["times_s"][: len(row["times_s"])]
        assert results.measured(row)
    assert 0 < len(row_of(second, name)["times_s"]) < len(row_of(third, name)["times_s"]) < len(final["times_s"])
    assert final["status"] == "ok"
    with runner(tmp_path / "again", earlier=third, total_s=0, implementations=(name,)) as one:
        one.run([dataclasses.replace(TINY, always=False)])
    (row,) = one.results["rows"]  # without time for more, what there was is not lost
    assert row["reason"].partition("; gone on with, it is ")[2].startswith("skipped: time: ")
    assert [row | {"reason": third["rows"][0]["reason"]}] == third["rows"]


def test_a_row_that_was_being_timed_when_the_run_was_stopped_is_measured_again(tmp_path, monkeypatch):
    name, asked, ask = FUNCTIONS + "right", [], run.Child.ask

    def stop_at_the_third(self, do, *arguments, **request):
        asked.append(do)
        if asked.count("sample") == 3:
            raise KeyboardInterrupt
        return ask(self, do, *arguments, **request)

    monkeypatch.setattr(run.Child, "ask", stop_at_the_third)
    with runner(tmp_path, implementations=(name,)) as one, pytest.raises(KeyboardInterrupt):
        one.run([TINY])
    row = row_of(results.load(tmp_path / "run"), name)
    assert (row["status"], row["reason"]) == ("stopped", "the run was stopped before this row was done")
    assert row["times_s"]
    assert "stopped" not in run.DONE


def test_a_repeat_keeps_the_slower_of_the_controls_beside_it(tmp_path, monkeypatch):
    seconds = iter([3.0, 2.0, 1.0, run.ChildFailure("crashed", "why")])

    def next_control(self):
        if isinstance(found := next(seconds), Exception):
            raise found
        return found

    monkeypatch.setattr(run.Control, "seconds", next_control)
    names = ("jaxattn-blockwise", "jaxattn-naive", FUNCTIONS + "right")
    with runner(tmp_path, repeats=1, implementations=names) as one:
        one.run([TINY])
        data = one.results
    assert [set(row_of(data, name)["control_s"]) for name in names] == [{3.0}, {2.0}, {None}]
    assert "crashed: why" in data["environment"]["notes"][-1]


def test_disturbed_repeats_are_taken_again(tmp_path, monkeypatch):
    seconds = [1.0, 1.0, *[1.0, 5.0] * 3, 1.0, 1.0]  # before and after the turn of each of five rounds
    asked = iter(seconds)
    monkeypatch.setattr(run.Control, "seconds", lambda self: next(asked))
    name = FUNCTIONS + "right"
    with runner(tmp_path, repeats=4, implementations=(name,)) as one:
        one.run([TINY])
        row = row_of(one.results, name)
    assert list(asked) == []
    turn = len(row["times_s"]) // 5
    assert row["control_s"] == [1.0] * turn + [5.0] * 3 * turn + [1.0] * turn


def test_what_disturbance_may_cost_is_limited(tmp_path, monkeypatch):
    spare = []
    monkeypatch.setattr(run.Control, "seconds", lambda self: 5.0)
    monkeypatch.setattr(run.Runner, "least_control_s", lambda self: 1.0)
    monkeypatch.setattr(run.Runner, "calm", lambda self, left_s: spare.append(left_s) or (self.control_s(), left_s - 3))
    monkeypatch.setattr(run, "PATIENCE_S", 8.0)
    name = FUNCTIONS + "right"
    with runner(tmp_path, repeats=2, implementations=(name,), length_s=100.0, total_s=400.0) as one:
        one.run([TINY])
        assert set(row_of(one.results, name)["control_s"]) == {5.0}
    assert [round(left_s) for left_s in spare] == [8, 5, 2]  # two rounds, and one more; then nothing is left


def test_an_undisturbed_moment_is_waited_for_but_not_forever(tmp_path, monkeypatch):
    asked, slept = iter([5.0, 5.0, 1.5, 5.0, 5.0]), []
    monkeypatch.setattr(run.Control, "seconds", lambda self: next(asked))
    monkeypatch.setattr(run.time, "sleep", slept.append)
    with runner(tmp_path) as one:
        assert one.calm(60)[0] == 5.0  # with nothing to compare with
        one.results["rows"] = [{"control_s": [1.0, 9.0]}]
        seconds, left_s = one.calm(60)
        assert (seconds, len(slept)) == (1.5, 1)
        assert 0 < left_s < 60
        assert one.calm(-1) == (5.0, 0.0)
        assert len(slept) == 1
        one.results["rows"] = []
        monkeypatch.undo()  # ending the processes sleeps, too


def test_every_repeat_has_a_control_and_its_process_is_ended(tmp_path):
    with runner(tmp_path, implementations=("jaxattn-blockwise", "torch-eager")) as one:
        control = one.control
        one.run([TINY])
        rows = results.load(tmp_path / "run")["rows"]
        one.control_s()
    assert control.process.returncode == 0
    for row in rows:
        assert len(row["control_s"]) == len(row["times_s"]) >= 3
        assert all(0 < seconds < run.CONTROL_S for seconds in row["control_s"])


def test_a_control_that_does_not_start_is_noted_and_the_run_is_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.Control, "tell", lambda self, do: self.process.kill())
    with runner(tmp_path, implementations=("jaxattn-blockwise", "torch-eager")) as one:
        one.run([TINY])
    data = results.load(tmp_path / "run")
    assert [row["status"] for row in data["rows"]] == ["ok", "ok"]
    assert all(row["control_s"] == [None] * len(row["times_s"]) for row in data["rows"])
    assert all(results.summary(row).time_ms for row in results.counting(data))
    (note,) = [note for note in data["environment"]["notes"] if "No control from here on" in note]
    assert f"Note: {note}" in capsys.readouterr().out


def test_the_control_is_the_faster_of_two_calls_after_one_that_warms_up(monkeypatch):
    called, clock_s = [], iter([0.0, 5.0, 10.0, 12.0])
    monkeypatch.setattr(child, "control_program", lambda: lambda: called.append(1))
    monkeypatch.setattr(child.gc, "disable", lambda: None)
    monkeypatch.setattr(child, "time", types.SimpleNamespace(perf_counter=lambda: next(clock_s)))
    assert child.Server().control() == {"control_s": 2.0}
    assert len(called) == 3


def test_a_child_replies_when_it_is_idle(monkeypatch):
    used_s = iter([0.0, 0.1, 0.1, 0.2, 0.2, 0.2])  # two naps beside threads that spin, then one without
    monkeypatch.setattr(child.time, "process_time", lambda: next(used_s))
    child.settle()
    assert list(used_s) == []
    busy_s = itertools.count()
    monkeypatch.setattr(child.time, "process_time", lambda: next(busy_s))
    monkeypatch.setattr(child, "SETTLE_S", 0.02)
    child.settle()  # not for ever
    assert next(busy_s) > 2


def test_gradients_are_judged_and_timed(tmp_path):
    with runner(tmp_path, direction="both", implementations=("jaxattn-blockwise", "torch-eager")) as one:
        one.run([TINY])
        rows = one.results["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"], [row["reason"] for row in rows]
    assert all(row["times_s"] for row in rows)


def test_bytes_are_counted_after_the_times_and_drawn(tmp_path, monkeypatch):
    asked, ask = [], run.Child.ask
    monkeypatch.setattr(
        run.Child, "ask", lambda self, do, *a, **request: asked.append(do) or ask(self, do, *a, **request)
    )
    with runner(tmp_path, traffic=True, implementations=("jaxattn-naive", "torch-eager")) as one:
        one.run([TINY])
        data = one.results
    found = row_of(data, "jaxattn-naive")["traffic"]
    assert asked.count("traffic") == 1
    assert asked[-1] == "traffic"  # where it ends the process, the times are there
    assert found["unknown"] == []
    assert found["requested_bytes"] >= found["compulsory_bytes"] == (2 * 64 * 4 + 2 * 64 * 2) * 16 * 4
    assert found["compulsory_bytes"] <= found["dram_low_bytes"] <= found["dram_high_bytes"]
    assert row_of(data, "torch-eager")["traffic"] is None
    assert all(row["status"] == "ok" and row["times_s"] for row in data["rows"])
    assert "custom-bytes.png" in [path.name for path in plot.draw(data, tmp_path)]
    known = found | {"peak_flops": 1e12, "bytes_per_s": 1e11}  # as of a GPU, whose rates are in the table of targets
    row_of(data, "jaxattn-naive")["traffic"] = known
    assert "custom-roofline.png" in [path.name for path in plot.draw(data, tmp_path)]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (FUNCTIONS + "short", "float32[1, 5, 4, 16]"),
        (FUNCTIONS + "halved", "bfloat16[1, 64, 4, 16]"),
        (FUNCTIONS + "twice", "float32[1, 64, 4, 16] and float32[]"),
        (FUNCTIONS + "nothing", "NoneType"),
        (f"torch:{FUNCTIONS}torch_double", "float64[1, 64, 4, 16]"),
    ],
)
def test_a_result_of_the_wrong_form_is_wrong_and_both_forms_are_named(name, given, tmp_path):
    server = child.Server()
    server.load(Problem("c", name, 1, 64, 64, 4, 2, 16, "causal", "float32", "cpu").__dict__)
    server.compile()
    with pytest.raises(child.WrongForm) as caught:
        server.first(str(tmp_path / "rows.npz"))
    assert child.describe(caught.value) == f"it gives {given}; float32[1, 64, 4, 16] is needed"
    assert child.classify(caught.value) == "wrong"


def test_without_time_only_the_tiled_implementation_runs(tmp_path):
    with runner(tmp_path, total_s=0, implementations=("jaxattn-naive", "jaxattn-blockwise")) as one:
        one.run([TINY])
        data = one.results
    assert row_of(data, "jaxattn-blockwise")["status"] == "ok"
    naive = row_of(data, "jaxattn-naive")
    assert naive["status"] == "skipped"
    assert naive["reason"] == "time: about 5 s predicted, 0 s left"


def test_what_cannot_fit_is_skipped_before_anything_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "available_bytes", lambda: 24 * 10**9)
    names = ("jaxattn-naive", "jax-nn-xla", "torch-eager", "torch-sdpa-math", "hf-eager-layer")
    with runner(tmp_path, implementations=names, lengths=(16384,)) as one:
        started = one.started
        one.run([cases.CASES["llama-3.2-1b"]])
        assert one.started == started
        rows = one.results["rows"]
    assert [row["status"] for row in rows] == ["skipped"] * 5
    assert rows[0]["reason"] == "memory: 69.1 GB predicted, 20.4 GB may be used"
    assert all(row["predicted_bytes"] > row["available_bytes"] for row in rows)


def test_the_main_case_lists_every_peer_and_starts_none_that_is_missing_or_refuses(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)  # as where it is not installed
    started = (*cases.LAYERS, "jaxattn-naive", "jaxattn-blockwise", "jax-nn-xla")
    started += ("torch-eager", "torch-sdpa-math", "torch-sdpa-flash")
    opened = []
    monkeypatch.setattr(run.Runner, "fits", lambda self, one: opened.append(one.problem.implementation))
    with runner(tmp_path, lengths=(64,)) as one:
        one.run([cases.CASES[measure.MAIN_CASE]])
        data = one.results
    assert sorted(opened) == sorted(started)
    found = {row["implementation"]: (row["status"], row["reason"]) for row in data["rows"]}
    assert found.keys() == {*cases.EVERY, *cases.LAYERS}
    assert found["tokamax-xla"] == ("missing", "tokamax is not installed")
    assert found["tokamax-mosaic"] == ("refused", "it runs on CUDA only; this run is on cpu")
    status, reason = found["torch-flex"]
    assert status == "skipped"
    assert "compiling it on a CPU" in reason
    assert "--impl torch-flex" in reason


def test_what_a_case_leaves_out_on_a_cpu_is_measured_where_asked_for(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(run.Runner, "fits", lambda self, one: opened.append(one.problem.implementation))
    with runner(tmp_path, lengths=(64,), implementations=("torch-flex",)) as one:
        one.run([cases.CASES[measure.MAIN_CASE]])
    assert opened == ["torch-flex"]


STANDARD = ("jaxattn-naive", "jax-nn-xla", "torch-eager", "torch-sdpa-math")


@pytest.mark.parametrize(
    ("name", "length"),
    [("jaxattn-naive", 1024), ("torch-eager", 1024)]
    + [pytest.param(name, length, marks=pytest.mark.slow) for name in STANDARD for length in (1024, 4096)],
)
def test_predicted_bytes_are_within_20_percent_of_the_measured_peak(name, length, tmp_path):
    problem = Problem("c", name, 1, length, length, 32, 8, 64, "causal", "float32", "cpu", threads=2)
    one = run.Child("cpu", 2, tmp_path / "log")
    try:
        for do, request in (
            ("load", {"problem": problem.__dict__}),
            ("compile", {}),
            ("first", {"rows_path": str(tmp_path / "rows.npz")}),
        ):
            reply = one.ask(do, 120, **request)
            assert reply["ok"], reply
    finally:
        one.close()
    assert adapters.find(name).predicted_bytes(problem) == pytest.approx(reply["peak_bytes"], rel=0.2)


def test_cold_inputs_rotate_through_more_than_a_cache(tmp_path):
    server = child.Server()
    problem = Problem("c", "jaxattn-naive", 1, 512, 512, 32, 8, 64, "causal", "float32", "cpu", threads=2, cold=True)
    server.load(problem.__dict__)
    server.compile()
    session, copies = server.session, []
    session.peak_bytes = lambda: copies.append(len(session.rotated)) or 0
    server.first(str(tmp_path / "rows.npz"))
    assert copies == [1]  # the peak of memory is that of one call, without the other copies
    assert len(session.rotated) * problem.arrays_bytes() > child.CACHE_BYTES
    pointers = {inputs[0].unsafe_buffer_pointer() for inputs in session.rotated}
    assert len(pointers) == len(session.rotated)
    called = []
    session.call, session.wait = called.append, lambda outputs: outputs
    assert len(server.sample(1)["times_s"]) == len(called) == 1
    assert len(server.sample(2)["times_s"]) == len(called) - 2 == 2  # one call more, which is not counted
    server.sample(2)  # a further turn goes on where the last one ended
    session.problem = dataclasses.replace(problem, device="cuda")  # there, calls are also queued
    assert len(server.sample(2)["device_times_s"]) == 2
    assert len(called) > 2 * len(session.rotated)
    order = [next(i for i, inputs in enumerate(session.rotated) if inputs is one) for one in called]
    assert order == [(1 + i) % len(session.rotated) for i in range(len(called))]


@pytest.mark.gpu
def test_device_time_of_queued_calls_agrees_with_the_profiler(tmp_path):
    import jax

    server = child.Server()
    problem = Problem("c", "jaxattn-triton", 1, 4096, 4096, 32, 8, 64, "causal", "bfloat16", "cuda")
    server.load(problem.__dict__)
    server.compile()
    server.first(str(tmp_path / "rows.npz"))
    queued_s = sorted(server.sample(5)["device_times_s"])[2]
    session, calls = server.session, 20
    with jax.profiler.trace(tmp_path):
        for _ in range(calls):
            outputs = session.call(session.rotated[0])
        session.wait(outputs)
    (path,) = tmp_path.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    busy_ns = sum(event.duration_ns for line in lines if line.name.startswith("Stream") for event in line.events)
    assert queued_s == pytest.approx(busy_ns / calls / 1e9, rel=0.1)


def test_time_is_predicted_from_the_shorter_length_and_the_flops(tmp_path):
    one = run.Runner.__new__(run.Runner)
    one.under_way = []
    short, long = (Problem("c", "x", 1, n, n, 2, 2, 16, "causal", "float32", "cpu") for n in (1000, 4000))
    one.results = {"rows": [short.__dict__ | {"times_s": [1.0, 3.0, 2.0], "flops": short.flops()}]}
    assert one.predicted_s(long) == 32.0
    assert one.predicted_s(short) is None


@pytest.mark.parametrize(("traffic", "guess_s"), [(False, 1.0), (True, 2.0)])
def test_compiling_is_predicted_and_counting_bytes_compiles_once_more(traffic, guess_s):
    one = run.Runner.__new__(run.Runner)
    one.settings, one.under_way, one.results = run.Settings(traffic=traffic), [], {"rows": []}
    names = ("jaxattn-naive", "torch-eager")
    ours, theirs = (Problem("c", name, 1, 64, 64, 2, 2, 16, "causal", "float32", "cpu") for name in names)
    assert one.cost_s(ours, 2) == run.START_S + guess_s + 2.0
    assert one.cost_s(theirs, 2) == run.START_S + 2.0
    row = {"implementation": "jaxattn-naive", "case": "another", "first_s": 0.9, "times_s": [0.5], "compile_s": 3.0}
    one.results["rows"] = [row, row | {"traffic_s": 4.0}, row | {"implementation": "torch-eager", "compile_s": None}]
    one.results["rows"] = [dataclasses.asdict(ours) | row for row in one.results["rows"]]
    assert one.ready_s(ours) == pytest.approx(3.0 + 4.0 + 0.4)
    assert one.ready_s(theirs) == pytest.approx(0.4)


def test_a_step_that_outlasts_the_time_left_is_skipped_for_time(monkeypatch):
    one = run.Runner.__new__(run.Runner)
    monkeypatch.setattr(one, "left_s", lambda: 30.0, raising=False)
    asked = []

    class Late:
        def ask(self, do, timeout_s):
            asked.append((do, timeout_s))
            raise run.ChildFailure("timed out", f"no answer within {timeout_s:.0f} s")

    problem = Problem("c", "x", 1, 64, 64, 2, 2, 16, "causal", "float32", "cpu")
    short, enough = (run.Measurement(problem, {"status": "waiting", "reason": ""}, Late()) for _ in range(2))
    assert one.within(short, 180.0, 25.0, "compile") is None
    assert (short.row["status"], short.row["reason"]) == (
        "skipped",
        "time: its compilation did not end by the deadline",
    )
    assert one.within(enough, 20.0, 0.0, "first") is None
    assert enough.row["status"] == "timed out"
    assert asked == [("compile", 15.0), ("first", 20.0)]


@pytest.mark.parametrize("left_s", [30.0, -1.0])
def test_what_goes_wrong_while_bytes_are_counted_costs_no_time_of_the_row(monkeypatch, left_s):
    one = run.Runner.__new__(run.Runner)
    monkeypatch.setattr(one, "left_s", lambda: 25 + left_s, raising=False)

    class Crashing:
        def ask(self, do, timeout_s):
            assert (do, timeout_s) == ("traffic", 40.0)
            raise run.ChildFailure("crashed", "the process ended with signal SIGSEGV")

    problem = Problem("c", "x", 1, 64, 64, 2, 2, 16, "causal", "float32", "cpu")
    timed = run.Measurement(problem, ended("ok", 3, ""), Crashing())
    one.count_bytes(timed, 25.0)
    reason = timed.row["traffic"]["reason"]
    crashed = "crashed: the process ended with signal SIGSEGV"
    assert reason == ("time: nothing was left for counting its bytes" if left_s < 0 else crashed)
    assert {name: timed.row[name] for name in ("status", "times_s", "reason")} == ended("ok", 3, "")


def test_a_child_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(run.sys, "executable", "/bin/sleep")
    monkeypatch.setattr(run.subprocess, "Popen", lambda argv, **options: POPEN(["/bin/sleep", "60"], **options))
    one = run.Child("cpu", 1, tmp_path / "log")
    with pytest.raises(run.ChildFailure, match="no answer within 0 s") as caught:
        one.ask("environment", 0.2, device="cpu")
    assert caught.value.status == "timed out"
    assert one.process.returncode is not None


POPEN = run.subprocess.Popen


def test_results_are_replaced_whole(tmp_path, monkeypatch):
    parts = {name: dict.fromkeys(results.REQUIRED[name]) for name in ("settings", "environment")}
    whole = {"schema": 1, "date": "first", "command": "", "commit": None, "rows": []} | parts
    results.save(whole, tmp_path)
    with pytest.raises(TypeError):
        results.save(whole | {"rows": [object()]}, tmp_path)
    assert results.load(tmp_path)["date"] == "first"
    monkeypatch.setattr(results.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(results.WriteError, match="json cannot be written: disk full"):
        results.save(whole | {"date": "second"}, tmp_path)
    assert results.load(tmp_path)["date"] == "first"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModuleNotFoundError("No module named 'tokamax'"), "missing"),
        (AttributeError("module 'm' has no attribute 'absent'"), "failed"),
        (RuntimeError("cuDNN is not detected."), "missing"),
        (MemoryError(), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), "out of memory"),
        (NotImplementedError("no bias"), "refused"),
        (RuntimeError("No viable backend for scaled_dot_product_attention was found."), "refused"),
        (ValueError("shapes"), "failed"),
    ],
)
def test_an_exception_becomes_a_status(error, status):
    assert child.classify(error) == status


def test_a_gpu_that_jax_does_not_use_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(environment, "nvidia_gpu", lambda: "NVIDIA H100")
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    (note,) = environment.describe()["notes"]
    assert "NVIDIA H100" in note
    assert "pip install -e '.[all,cuda]'" in note
    assert environment.describe("cpu")["notes"] == []


def test_the_digest_of_the_code_covers_names_tables_and_a_user_s_whole_package_and_imports_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "bench/environment.py"))
    monkeypatch.syspath_prepend(tmp_path / "user")
    files = {"ours": "jaxattn/impl/table.json", "also ours": "oracle/a.py"}
    files |= {"": "user/brought/__init__.py", "theirs": "user/brought/inner/kernels.py"}
    for path in files.values():
        results.write_text(tmp_path / path, "raise RuntimeError('it was imported')")
    seen = [environment.code(["brought.inner.fn", "no_such_package.fn"])]
    for path in files.values():
        (tmp_path / path).write_text("changed")
        seen.append(environment.code(["brought.inner.fn"]))
    moved = tmp_path / files["theirs"]
    moved.rename(moved.with_name("renamed.py"))
    seen.append(environment.code(["brought.inner.fn"]))
    assert all(found.keys() == {results.CHECKOUT, "brought.inner.fn"} for found in seen)
    changes = [{name for name in new if new[name] != old[name]} for old, new in itertools.pairwise(seen)]
    assert changes == [{results.CHECKOUT}] * 2 + [{"brought.inner.fn"}] * 3
    assert not any(name.startswith("brought") for name in sys.modules)


def test_a_busy_machine_is_said_to_be_busy(monkeypatch):
    monkeypatch.setattr(environment, "nvidia_gpu", lambda: None)
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (9.8, 0.1, 0.1))
    (note,) = environment.describe()["notes"]
    assert "load average 9.8" in note


def test_the_main_job_without_rich_matplotlib_and_torch_ends_normally(tmp_path, capfd):
    """What is missing is said; rows are marked unchecked; the report is there."""
    blocked = tmp_path / "blocked"
    for name in ("rich", "matplotlib", "torch", "transformers"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ModuleNotFoundError({name!r})\n")
    code = (
        "import sys, importlib.metadata as m; real = m.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'transformers', 'matplotlib'): raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
    )
    (blocked / "sitecustomize.py").write_text(code)
    out = tmp_path / "out"
    argv = ["--shape", "1,64,64,2,1,16", "--impl", "jaxattn-blockwise", "--impl", "torch-eager", "--out", str(out)]
    finished = run.subprocess.run(
        [sys.executable, "-m", "bench", *argv, "--repeats", "2"],
        cwd=run.ROOT,
        env=run.child_environment("cpu", 2) | {"PYTHONPATH": str(blocked)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert "torch is not installed: no float64 reference, so results are unchecked" in finished.stdout
    assert "No figures" in finished.stdout
    data = json.loads((out / "results.json").read_text())
    assert row_of(data, "torch-eager")["status"] == "missing"
    assert row_of(data, "jaxattn-blockwise")["times_s"]
    assert "unchecked" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--impl", "flash"], "unknown implementation 'flash'"),
        (["--shape", "1,2"], "six integers"),
        (["--mask", "causal"], "--mask goes with --shape"),
        (["--case", "mqa", "--shape", "1,8,8,2,1,8"], "give one of them"),
        (["--seq", "0"], "at least 1"),
        (["--resume", "/nowhere"], "no results here"),
    ],
)
def test_wrong_options_are_explained_before_anything_runs(argv, problem, capsys):
    with pytest.raises(SystemExit):
        measure.main(argv)
    assert problem in capsys.readouterr().err


def test_list_shows_cases_and_implementations(capsys):
    assert measure.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*cases.CASES, *adapters.ADAPTERS))
