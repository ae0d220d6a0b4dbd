"""`python -m bench`: the main job. Environment, gate, measurements, figures, report, in one folder.

Design fact: the figures and the report are made again after every part, from the file on disk, so that a run
that is stopped leaves a complete picture of what it measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from bench import adapters, cases, commands, environment, gpu, plot, report, results, run

MAIN_CASE = "llama-3.2-1b"
TOTAL_S = 215.0  # of five minutes; figures, the traffic picture and starting up take the rest
QUICK_S = 44.0  # of one minute
TRAFFIC_S = 60.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Attention in JAX and torch, side by side: error, time, memory. Without arguments: the "
        "Llama-3.2-1B shape at 1024, 4096 and 16384, within five minutes on two cores.",
        epilog="Commands: " + "; ".join(f"{name}: {text}" for name, text in commands.available().items()),
    )
    made.add_argument("--quick", action="store_true", help="short lengths, within a minute")
    made.add_argument("--list", action="store_true", help="show cases and implementations, measure nothing")
    made.add_argument("--case", action="append", default=[], choices=list(cases.CASES), help="may be repeated")
    made.add_argument("--impl", action="append", default=[], metavar="NAME|MODULE:FUNCTION", help="may be repeated")
    made.add_argument("--seq", type=int, action="append", default=[], metavar="LENGTH", help="may be repeated")
    made.add_argument("--shape", metavar="B,T,S,N,K,H", help="a shape of your own")
    made.add_argument("--mask", default=None, help="its mask, e.g. 'causal & window(1024, 0)'; default causal")
    made.add_argument("--dtype", choices=list(cases.DTYPE_BYTES))
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--direction", choices=("forward", "both"), default="forward", help="both: and backward")
    made.add_argument("--cold", action="store_true", help="rotate inputs, so that none is in a cache")
    made.add_argument("--traffic", action="store_true", help="also model the bytes that the JAX rows move")
    made.add_argument("--repeats", type=int, default=run.REPEATS, help="at most so many rounds")
    made.add_argument("--minutes", type=float, help="time for measuring; what does not fit is skipped and listed")
    made.add_argument("--threads", type=int, default=0, help="CPU threads for both frameworks; 0: all cores")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="folder for the results")
    made.add_argument("--no-figures", action="store_true", help="draw nothing; python -m bench report FOLDER does so")
    made.add_argument("--publish", action="store_true", help="copy the results to bench/results/<device>/cases")
    made.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on with a run that was stopped, by its own options; those given beside this are added to them",
    )
    return made


def resumed(folder: Path, argv: list[str]) -> tuple[dict, list[str]]:
    """The run to go on with, and its options followed by those given now; the last of two values holds.

    Raises: ValueError where there is no results file of the main job.
    """
    earlier = results.load(folder)
    words = shlex.split(earlier["command"])
    if words[:3] != ["python", "-m", "bench"]:
        raise ValueError(f"{folder}: its command {earlier['command']!r} is not one to go on with")
    if words[3:] and not words[3].startswith("-"):
        raise ValueError(
            f"{folder}: its command is bench {words[3]}; "
            f"resume it with python -m bench {words[3]} --resume {shlex.quote(str(folder))}"
        )
    only = argparse.ArgumentParser(add_help=False)
    only.add_argument("--resume")
    given = only.parse_known_args(argv)[1]
    return earlier, words[3:] if given == words[3:] else [*words[3:], *given]


def main(argv: list[str]) -> int:
    """Parse, run, draw, report. Returns 1 where a result was wrong, else 0."""
    made = parser()
    arguments, earlier = made.parse_args(argv), None
    try:
        if folder := arguments.resume:
            earlier, argv = resumed(folder, argv)
            arguments = made.parse_args(argv)
        chosen = chosen_cases(arguments)
        for name in arguments.impl:
            adapters.find(name)
    except ValueError as error:
        made.error(str(error))
    if arguments.list:
        return show_list()
    if any(length < 1 for length in arguments.seq):
        made.error("--seq: a length must be at least 1")
    total_s = QUICK_S if arguments.quick else TOTAL_S
    settings = run.Settings(
        device=arguments.device,
        total_s=total_s if arguments.minutes is None else 60 * arguments.minutes,
        quick=arguments.quick,
        implementations=tuple(dict.fromkeys(arguments.impl)),
        lengths=tuple(sorted(set(arguments.seq))),
        dtype=arguments.dtype,
        direction=arguments.direction,
        cold=arguments.cold,
        traffic=arguments.traffic,
        repeats=max(1, arguments.repeats),
        threads=arguments.threads,
        seed=arguments.seed,
    )
    command = shlex.join(["python", "-m", "bench", *argv])
    main_job = not (arguments.case or arguments.shape or arguments.impl or arguments.seq)
    extras = Extras(not arguments.no_figures, main_job and not arguments.quick, arguments.publish)
    return measure(settings, chosen, folder or arguments.out, command, earlier, extras)


@dataclasses.dataclass(frozen=True)
class Extras:
    """What follows the measurements: figures, among them the picture of bytes moved, and publishing."""

    figures: bool = True
    traffic: bool = False
    publish: bool = False


def measure(settings, chosen, folder, command, earlier=None, extras=Extras()) -> int:
    """Run the cases and leave results, figures and reports in the folder, whose path is printed."""
    try:
        runner = run.Runner(settings, folder, command, earlier)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    stopped = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: as by Ctrl-C
    with runner:
        found = runner.results["environment"]
        packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        print(f"{found['device_name']} ({found['device']}), {runner.threads} threads; {packages}")
        print(f"Results: {runner.folder}")
        try:
            runner.run(chosen)
        except KeyboardInterrupt:
            stopped = True
    finish(runner.results, runner.folder, figures=extras.figures, traffic=extras.traffic and not stopped)
    if stopped:
        print(f"Stopped. To go on: python -m bench --resume {shlex.quote(str(runner.folder))}")
        return 130
    if extras.publish:
        place = run.ROOT / "bench/results" / gpu.target_slug(runner.results["environment"])
        print(f"Published: {gpu.publish_part(runner.folder, place / 'cases')}")
    wrong = [row for row in runner.results["rows"] if row["status"] == "wrong"]
    for row in wrong:
        print(f"WRONG: {row['label']} at {row['keys']}: {row['reason']}")
    return 1 if wrong else 0


def finish(data: dict, folder: Path, *, figures: bool, traffic: bool) -> None:
    """Figures and reports; says what was left out where a package is missing."""
    pictures = []
    try:
        pictures += plot.draw(data, folder) if figures else []
        if traffic:
            pictures += traffic_picture(folder)
    except ImportError as error:
        print(f"No figures: {error}. Install with pip install -e '.[all]', then python -m bench report {folder}")
    for key, rows in plot.groups(data).items():
        if any(results.measured(row) for row in rows):
            print(f"{plot.caption(key, rows)}: {report.findings(rows)}")
    reports = report.write(data, folder, pictures)
    for path in [folder / "results.json", *reports, *pictures]:
        print(path)


def traffic_picture(folder: Path) -> list[Path]:
    """The picture of bytes moved, by `python -m bench traffic`, where that is there; a reason where it fails."""
    if "traffic" not in commands.available():
        return []
    command = [sys.executable, "-m", "bench", "traffic", "--out", str(folder)]
    try:
        finished = subprocess.run(command, cwd=run.ROOT, timeout=TRAFFIC_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"No traffic picture: it took more than {TRAFFIC_S:.0f} s; run python -m bench traffic by itself.")
        return []
    if finished.returncode:
        print(f"No traffic picture: python -m bench traffic ended with exit code {finished.returncode}.")
    return [path for path in [folder / "traffic.png"] if path.exists()]


def chosen_cases(arguments: argparse.Namespace) -> list[cases.Case]:
    """The cases asked for; the main one by default."""
    if arguments.shape:
        if arguments.case:
            raise ValueError("--shape and --case: give one of them")
        return [cases.custom(arguments.shape, arguments.mask or "causal")]
    if arguments.mask:
        raise ValueError("--mask goes with --shape; cases have their own masks")
    return [cases.CASES[name] for name in dict.fromkeys(arguments.case or [MAIN_CASE])]


def show_list() -> int:
    """Print cases and implementations, and the GPU that is visible."""
    print("Cases:")
    for case in cases.CASES.values():
        lengths = ", ".join(map(str, case.lengths))
        print(f"  {case.name:<16}{case.title}; {'; '.join(case.masks)}; lengths {lengths}")
    print("Implementations:")
    for adapter in adapters.ADAPTERS.values():
        print(f"  {adapter.name:<22}{adapter.label}")
    print("  MODULE:FUNCTION       your own, called as jax.nn.dot_product_attention; torch:MODULE:FUNCTION for torch")
    print(f"GPU: {environment.nvidia_gpu() or 'none visible'}")
    return 0
