"""`python -m bench gpu`: everything for a machine with a GPU, in parts, each saved as soon as it is done.

Design fact: a part is a command of this project in a process of its own, with a limit of time; what it prints
and what it writes lies in a folder of its name. A part that fails or takes too long is recorded with its
reason, and the next one runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench import commands, environment, results, run

RECORD = "parts.json"
# In this order, until the time of the part is spent: what matters most comes first.
CASES = ("llama-3.2-1b", "speedup", "decode", "packed", "window-64", "windows", "mqa", "llama-2-7b")


@dataclasses.dataclass(frozen=True)
class Part:
    """One command. limit_s: it is ended after that. needs: the subcommand of bench that must be there.
    missing_code: the exit code by which it says that something it needs is not on this machine.
    """

    name: str
    text: str
    argv: tuple[str, ...]
    limit_s: float
    needs: str | None = None
    missing_code: int | None = None


def parts(folder: Path) -> list[Part]:
    """The parts in order; together they leave some of the eight minutes for starting up.

    The cases' own time leaves what one row may take beyond it; their figures are a part of their own.
    """
    chosen = [word for name in CASES for word in ("--case", name)]
    cases, traffic, counters = (str(folder / name) for name in ("cases", "traffic", "counters"))
    options = ("--device", "cuda", "--minutes", "2.8", "--traffic", "--no-figures", "--out", cases)
    begun = (folder / "cases/results.json").exists()
    measure = ("--resume", cases) if begun else (*chosen, *options)  # gone on with by its own options
    oracle = ("oracle", "--json", str(folder / "parity/parity.json"))
    return [
        Part("parity", "every stage against torch, planted faults", oracle, 90),
        Part("cases", "every implementation beside every other", ("bench", *measure), 200),
        Part("plots", "the cases' figures and reports", ("bench", "report", cases), 40),
        Part("traffic", "bytes moved, modelled for this GPU", ("bench", "traffic", "--out", traffic), 35, "traffic"),
        Part(
            "counters",
            "hardware counters beside the model",
            ("bench", "counters", "--out", counters),
            55,
            "counters",
            missing_code=commands.MISSING,
        ),
        Part(
            "tune",
            "the shipped block sizes against their neighbours",
            ("bench", "tune", "--minutes", "0.5"),
            40,
            "tune",
        ),
    ]


def main(argv: list[str]) -> int:
    """Run the parts, or those asked for; returns 1 where one failed, 2 without a GPU."""
    names = [part.name for part in parts(Path())]
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=main.__doc__)
    parser.add_argument("--part", action="append", default=[], choices=names, help="only this part; may be repeated")
    parser.add_argument("--out", type=Path, help="folder for the results; an earlier run's goes on there")
    parser.add_argument("--publish", action="store_true", help="copy the results to bench/results/<device>/")
    arguments = parser.parse_args(argv)
    found = look(run.child_environment("auto", environment.cores()))
    for note in found["notes"]:
        print(f"Note: {note}")
    if found["device"] != "cuda":
        print("No GPU: jax sees only the CPU, so nothing was run.", file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.UTC)
    slug = environment.slug(found["device_name"])
    folder = arguments.out or run.ROOT / "bench/results/runs" / f"{now:%Y%m%dT%H%M%SZ}-{slug}"
    print(f"{found['device_name']}\nResults: {folder}")
    chosen = [part for part in parts(folder) if not arguments.part or part.name in arguments.part]
    record = run_parts(chosen, folder)
    if arguments.publish:
        print(f"Published: {publish(folder, run.ROOT / 'bench/results' / target_slug(found))}")
    return 0 if all(part["status"] in ("ok", "missing") for part in record.values()) else 1


def look(variables: dict[str, str]) -> dict:
    """The environment, found in a process of its own, so that this one holds no GPU memory."""
    code = "import json; from bench import environment; print(json.dumps(environment.describe()))"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=run.ROOT, env=variables, capture_output=True, text=True, check=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


def run_parts(chosen: list[Part], folder: Path) -> dict[str, dict]:
    """Run parts one after the other; `parts.json` says at any time which are done and how they ended."""
    record = read_record(folder)
    for part in chosen:
        print(f"\n== {part.name}: {part.text}", flush=True)
        if part.needs and part.needs not in commands.available():
            record[part.name] = {"status": "missing", "reason": f"this checkout has no bench {part.needs}"}
        else:
            record[part.name] = run_part(part, folder / part.name)
        print(f"== {part.name}: {record[part.name]['status']} {record[part.name]['reason']}", flush=True)
        results.write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def run_part(part: Part, folder: Path) -> dict:
    """Run one part, its output shown and kept in `output.txt`; how it ended and how long it took."""
    with results.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", *part.argv]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=run.ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # so that a part that is ended has shown what it did
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()

    timer = threading.Timer(part.limit_s, end)
    timer.start()
    try:
        line = ""
        with (folder / "output.txt").open("w") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
    if late.is_set():
        status, reason = "timed out", f"ended after {part.limit_s:g} s; what it had written is kept"
    elif code == part.missing_code:
        status, reason = "missing", line.strip()
    elif code:
        status, reason = "failed", f"exit code {code}; see {part.name}/output.txt"
    else:
        status, reason = "ok", ""
    seconds = round(time.monotonic() - start, 1)
    words = ["python", *command[1:]]
    return {"status": status, "reason": reason, "seconds": seconds, "command": shlex.join(words)}


def target_slug(found: dict) -> str:
    """The device's folder under `bench/results`: the profiler's name for it."""
    from jaxattn.profiler import targets

    return targets.here(found["device"], found["device_name"]).slug


def publish(folder: Path, place: Path) -> Path:
    """Copy a run's parts to their place, those that could not run apart; nothing is committed.

    What is there of other parts stays, in `parts.json` too.
    """
    record, old = (read_record(where) for where in (folder, place))
    absent = {name for name, part in record.items() if part["status"] == "missing"}
    for source in sorted(folder.iterdir()):
        if source.is_dir() and source.name not in absent:
            publish_part(source, place / source.name)
    kept = {name: part for name, part in record.items() if name not in absent}
    results.write_text(place / RECORD, json.dumps(old | kept, indent=1) + "\n")
    return place


def read_record(folder: Path) -> dict[str, dict]:
    """How the parts in a folder ended; empty where nothing says so."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def publish_part(source: Path, place: Path) -> Path:
    """Copy one file or folder, which takes the old one's place only when it is whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(place.name + ".new")
    if source.is_dir():
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(source, new)
        shutil.rmtree(place, ignore_errors=True)
    else:
        shutil.copy2(source, new)
    new.rename(place)
    return place
