"""The parts of `python -m bench gpu`: each is recorded as soon as it ends, and none takes another with it."""

import json

import pytest

from bench import commands, counters, gpu, measure, results, run
from bench.gpu import Part


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder that `python -m` finds commands in, in place of the project's."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    for name, code in (
        ("good", "print('fine')"),
        ("bad", "raise SystemExit(1)"),
        ("absent", "print('no such tool')\nraise SystemExit(3)"),
        ("misused", "raise SystemExit(2)"),
        ("endless", "import time\nprint('begun')\ntime.sleep(60)"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path / "out"


def test_each_part_is_recorded_with_how_it_ended(modules):
    chosen = [
        Part("one", "", ("good",), 60),
        Part("two", "", ("bad",), 60),
        Part("three", "", ("endless",), 1),
        Part("four", "", ("good",), 60, needs="no such command"),
        Part("five", "", ("good",), 60),
        Part("six", "", ("absent",), 60, missing_code=commands.MISSING),
        Part("seven", "", ("absent",), 60),
        Part("eight", "", ("misused",), 60, missing_code=commands.MISSING),
    ]
    gpu.run_parts(chosen, modules)
    record = json.loads((modules / "parts.json").read_text())
    status = {name: part["status"] for name, part in record.items()}
    expected = {"one": "ok", "two": "failed", "three": "timed out", "four": "missing", "five": "ok"}
    assert status == expected | {"six": "missing", "seven": "failed", "eight": "failed"}
    assert record["six"]["reason"] == "no such tool"
    assert record["two"]["reason"] == "exit code 1; see two/output.txt"
    assert record["three"]["seconds"] < 20
    assert (modules / "three/output.txt").read_text() == "begun\n"
    assert record["one"]["command"] == "python -m good"


def test_a_part_run_alone_leaves_the_record_of_the_others(modules):
    gpu.run_parts([Part("one", "", ("good",), 60), Part("two", "", ("bad",), 60)], modules)
    (modules.parent / "bad.py").write_text("")
    gpu.run_parts([Part("two", "", ("bad",), 60)], modules)
    record = json.loads((modules / "parts.json").read_text())
    assert [part["status"] for part in record.values()] == ["ok", "ok"]


def test_the_cases_are_measured_with_their_bytes(tmp_path):
    (part,) = [part for part in gpu.parts(tmp_path) if part.name == "cases"]
    command, *options = part.argv
    assert command == "bench"
    arguments = measure.parser().parse_args(options)
    assert arguments.traffic
    assert arguments.case == list(gpu.CASES)
    assert 60 * arguments.minutes + run.OVERTIME_S + 20 < part.limit_s  # 20: starting, and the last reference


def test_a_missing_tool_is_told_apart_from_a_command_that_is_misused(tmp_path, monkeypatch):
    (part,) = [part for part in gpu.parts(tmp_path) if part.name == "counters"]
    monkeypatch.setattr(counters, "missing", lambda: ["no tool"])
    assert counters.main([]) == part.missing_code
    with pytest.raises(SystemExit) as caught:
        counters.main(["--no-such-option"])
    assert caught.value.code != part.missing_code


def test_cases_that_were_begun_are_gone_on_with(tmp_path):
    results.write_text(tmp_path / "cases/results.json", "{}")
    (part,) = [part for part in gpu.parts(tmp_path) if part.name == "cases"]
    assert part.argv == ("bench", "--resume", str(tmp_path / "cases"))


def test_figures_are_drawn_from_what_the_cases_wrote(tmp_path):
    parts = {part.name: part for part in gpu.parts(tmp_path)}
    assert list(parts).index("plots") == list(parts).index("cases") + 1
    assert "--no-figures" in parts["cases"].argv
    assert parts["plots"].argv == ("bench", "report", str(tmp_path / "cases"))


def test_parts_leave_some_of_eight_minutes_for_starting_up(tmp_path):
    assert sum(part.limit_s for part in gpu.parts(tmp_path)) <= 460


def test_publishing_replaces_what_was_measured_again_and_keeps_the_rest(tmp_path):
    run_folder, place = tmp_path / "run", tmp_path / "results"
    for path, text in (("run/cases/a", "new"), ("results/cases/a", "old"), ("results/cases/b", "old")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (place / "tune").mkdir()
    (place / "tune/table").write_text("kept")
    (run_folder / "counters").mkdir()
    (place / "counters").mkdir()
    (place / "counters/table").write_text("kept")
    (run_folder / "parts.json").write_text('{"cases": {"status": "failed"}, "counters": {"status": "missing"}}')
    (place / "parts.json").write_text('{"cases": {"status": "ok"}, "tune": {"status": "ok"}}')
    gpu.publish(run_folder, place)
    assert (place / "cases/a").read_text() == "new"
    assert not (place / "cases/b").exists()
    assert (place / "tune/table").read_text() == "kept"
    assert (place / "counters/table").read_text() == "kept"
    assert sorted(path.name for path in place.iterdir()) == ["cases", "counters", "parts.json", "tune"]
    assert gpu.read_record(place) == {"cases": {"status": "failed"}, "tune": {"status": "ok"}}


def test_without_a_gpu_it_says_so_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "look", lambda _: {"device": "cpu", "notes": ["a note"]})
    monkeypatch.setattr(gpu, "run_parts", None)
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert "a note" in printed.out
    assert "jax sees only the CPU" in printed.err


def test_results_of_a_known_gpu_go_to_its_folder():
    assert gpu.target_slug({"device": "cuda", "device_name": "NVIDIA H200"}) == "h200"
    assert gpu.target_slug({"device": "cpu", "device_name": "AMD EPYC"}) == "cpu"
