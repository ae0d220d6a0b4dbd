"""Gate, then measure: goes through cases and lengths, one child process per measurement.

Design fact: what is to be spent is decided before it is spent. A row's bytes are predicted from its shape and
compared with the memory that is there, its time from the previous length and its FLOPs and compared with the
time that is left; a row that cannot fit is skipped, and listed with these numbers. The children of one length
live side by side, and their repeats are interleaved, so that a machine that slows down slows all of them; on a CPU a
control between the repeats tells when it did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import adapters, environment, results
from bench.cases import Case, Problem

MEMORY_SHARE = 0.85  # of the memory that is available, what a row may be predicted to need
START_S = 2.0  # predicted for starting a process and its frameworks, several at once
FIRST_CALL_S = 60.0  # limit of one call that nothing predicts
COMPILE_S = 180.0  # limit of compiling
COMPILE_GUESS_S = 1.0  # predicted for compiling a JAX program of which nothing is known
OVERTIME_S = 10.0  # what a step may take beyond the time for measuring, before it is given up
CONTEXT_BYTES = 6 * 10**8  # that a process holds on a GPU beside its arrays
JUDGE_S = 300.0  # limit of one float64 reference
CONTROL_S = 20.0  # limit of one answer of the control, which gets ready while rows do
PATIENCE_S = 30.0  # for waiting and repeating where one length is disturbed, and at most a fifth of the length's time
REPEATS = 10
LENGTH_S = 20.0
ROOT = Path(__file__).resolve().parent.parent
DONE = ("ok", "wrong", "refused", "missing")  # what --resume does not try again
INTERRUPTED = {"status": results.STOPPED, "reason": "the run was stopped before this row was done"}
AGAIN = "; gone on with, it is "  # before how a later run's row of fewer repeats ended
STEPS = {"compile": "compilation", "first": "first call"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user chose.

    device: "auto", "cpu" or "cuda". total_s: time for measuring. threads 0: all cores. direction: "forward"
    or "both" (forward and backward). Empty tuples: what the case says. length_s: further repeats of one length
    stop after that.
    """

    device: str = "auto"
    total_s: float = 230.0
    quick: bool = False
    implementations: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    dtype: str | None = None
    direction: str = "forward"
    cold: bool = False
    traffic: bool = False
    repeats: int = REPEATS
    length_s: float = LENGTH_S
    threads: int = 0
    seed: int = 0


class ChildFailure(Exception):
    """A child that cannot answer any more. status: "crashed", "out of memory" or "timed out"."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Child:
    """One `python -m bench.child`, spoken to in JSON lines."""

    def __init__(self, device: str, threads: int, log: Path):
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=child_environment(device, threads),
            )
        self.buffer = b""

    def tell(self, do: str, **request) -> None:
        """Send a request without waiting for its reply."""
        with contextlib.suppress(BrokenPipeError):  # a dead child is reported by `hear`
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()

    def hear(self, timeout_s: float) -> dict:
        """Wait for one reply.

        Raises: ChildFailure where the process has ended or does not answer in time (it is then killed).
        """
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    self.close()
                    raise ChildFailure("timed out", f"no answer within {timeout_s:.0f} s; the process was ended")
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    raise self.failure()
                self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def ask(self, do: str, timeout_s: float, **request) -> dict:
        self.tell(do, **request)
        return self.hear(timeout_s)

    def failure(self) -> ChildFailure:
        """What the end of the process means, with the last line it wrote."""
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        if code == -signal.SIGKILL:
            return ChildFailure("out of memory", "killed by the system, as it does when memory runs out")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ChildFailure("crashed", f"the process ended with {how}{last}")

    def close(self) -> None:
        """End the process and wait for it; once is enough, twice does no harm."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Control(Child):
    """The child that times the control program; told to get ready when it is made."""

    def __init__(self, threads: int, log: Path):
        super().__init__("cpu", threads, log)
        self.tell("control")
        self.ready = False

    def seconds(self) -> float:
        """Of one call of the control program now.

        Raises: ChildFailure where the child fails or does not answer within `CONTROL_S`.
        """
        replies = [] if self.ready else [self.hear(CONTROL_S)]
        self.ready = True
        replies.append(self.ask("control", CONTROL_S))
        for reply in replies:
            if not reply["ok"]:
                raise ChildFailure(reply["status"], reply["reason"])
        return replies[-1]["control_s"]


@dataclasses.dataclass(eq=False)
class Measurement:
    """A row on its way: its problem, what is known of it so far, and its process while it has one."""

    problem: Problem
    row: dict
    child: Child | None = None
    saved: bool = False

    def close(self) -> None:
        if self.child is not None:
            self.child.close()
            self.child = None


def child_environment(device: str, threads: int) -> dict[str, str]:
    """The child's environment variables: its device, its threads, and no memory taken in advance."""
    variables = dict(os.environ)
    variables |= {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "NPROC": str(threads),  # XLA's CPU thread pool
    }
    if device == "cpu":
        variables["JAX_PLATFORMS"] = "cpu"
    return variables


class Progress:
    """A progress bar where rich is installed, else a line per measurement."""

    def __init__(self, total: int):
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            text = TextColumn("{task.description}")
            self.bar = Bar(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.task = self.bar.add_task("starting", total=total)
        except ImportError:
            self.bar = None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, what: str) -> None:
        if self.bar:
            self.bar.update(self.task, description=f"{what:<44}")

    def skip(self) -> None:
        """One measurement fewer: an earlier run has it."""
        if self.bar:
            self.bar.advance(self.task)

    def done(self, row: dict) -> None:
        line = describe(row)
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self.bar.advance(self.task)
        else:
            print(line, flush=True)


def describe(row: dict) -> str:
    """One line about a finished row, over all of its repeats."""
    short = results.summary(row)
    if short.time_ms is not None:
        error = row["error"]
        accuracy = f"rmse {error['rmse']:.1e} (allowed {error['bound']:.1e})" if error else "unchecked"
        outcome = f"{short.time_ms:>10.2f} ms {short.tflops:>8.3g} TFLOP/s  {accuracy}"
    else:
        outcome = f"{row['status']}: {row['reason']}"
    return f"{row['case']:<14}{row['keys']:>7}  {row['label']:<22}{outcome}"


def better(old: dict | None, new: dict) -> dict:
    """The row to keep of an earlier run's and this run's: this one if it is right or wrong, else the one with more
    repeats, those of a measurement before those of a failure. A kept earlier one also says how this one ended.
    """

    def repeats(row: dict) -> tuple[int, int]:
        count = len(row["times_s"])
        return count if results.measured(row) else 0, count

    if old is None or new["status"] in ("ok", "wrong") or repeats(new) >= repeats(old):
        return new
    if new["status"] == results.STOPPED:
        return old
    return old | {"reason": f"{old['reason'].partition(AGAIN)[0]}{AGAIN}{new['status']}: {new['reason']}"}


class Runner:
    """One run: its settings, its results so far, and the time that is left."""

    def __init__(self, settings: Settings, folder: Path | None, command: str, earlier: dict | None = None):
        """Raises: RuntimeError where the folder holds another run's results, or `earlier` is of another machine or
        code, or jax does not start.
        """
        if earlier is None and folder is not None and (folder / "results.json").exists():
            raise RuntimeError(f"{folder} holds results: give --resume {folder} to go on with them, or another folder")
        self.start = time.monotonic()
        self.settings = settings
        self.scratch = Path(tempfile.mkdtemp(prefix="jaxattn-bench-"))
        self.threads = settings.threads or environment.cores()
        self.started = 0
        self.under_way: list[Measurement] = []
        self.always: set[str] = set()
        self.left_out: dict[tuple[str, str], str] = {}
        chosen = settings.device
        self.control: Control | None = None
        self.judge = self.new_child()
        try:
            found = self.judge.ask("environment", 120, device=chosen)
            if not found.pop("ok"):
                raise RuntimeError(f"jax does not start: {found['reason']}")
        except ChildFailure as failure:
            raise RuntimeError(f"jax does not start: {failure.reason}") from None
        self.device = found["device"]
        if chosen == "cuda" and self.device != "cuda":
            self.close()
            raise RuntimeError(f"--device cuda: jax sees no GPU; install with {environment.CUDA_INSTALL}")
        self.can_judge = "torch" in found["versions"]
        if not self.can_judge:
            found["notes"].append(
                "torch is not installed: no float64 reference, so results are unchecked, and no torch rows. "
                "Install with pip install -e '.[all]'"
            )
        for note in found["notes"]:
            print(f"Note: {note}")
        now = datetime.datetime.now(datetime.UTC)
        slug = environment.slug(found["device_name"])
        self.folder = folder or ROOT / "bench/results/runs" / f"{now:%Y%m%dT%H%M%SZ}-{slug}"
        self.results = {
            "schema": results.SCHEMA,
            "date": now.isoformat(timespec="seconds"),
            "command": command,
            "commit": environment.commit(),
            "settings": dataclasses.asdict(settings) | {"threads": self.threads},
            "environment": found,
            "code": environment.code(name.split(":")[-2] for name in settings.implementations if ":" in name),
            "method": method(self.device, self.threads),
            "rows": [],
        }
        if earlier is not None:
            unlike = results.differences(earlier, self.results)
            if unlike:
                self.close()
                what = "; ".join(f"{name} was {then}, is {now}" for name, then, now in unlike)
                raise RuntimeError(f"--resume: the earlier run is not comparable with this one: {what}")
            self.results["rows"] = list(earlier["rows"])
            self.results["resumed"] = [*earlier.get("resumed", []), earlier["date"]]
        if self.device == "cpu":
            self.control = Control(self.threads, self.scratch / "control.log")
        self.save()

    def close(self) -> None:
        self.judge.close()
        if self.control is not None:
            self.control.close()
        for path in self.scratch.iterdir():
            path.unlink()
        self.scratch.rmdir()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def save(self) -> None:
        """Write the results file; rows that are being timed stand in it as those of a run that was stopped now."""
        rows = self.results["rows"]
        for one in self.under_way:
            if not one.saved and results.measured(one.row):
                rows = self.with_row(rows, one.row | INTERRUPTED)
        results.save(self.results | {"rows": rows}, self.folder)

    @staticmethod
    def with_row(rows: list[dict], row: dict) -> list[dict]:
        """The rows with this one, or with what `better` keeps of it and an earlier one of the same measurement."""
        old = next((other for other in rows if results.key(other) == results.key(row)), None)
        return [*(other for other in rows if other is not old), better(old, row)]

    def left_s(self) -> float:
        return self.settings.total_s - (time.monotonic() - self.start)

    def run(self, chosen: list[Case]) -> dict:
        """Measure the cases, saving after each row; returns what is in the results file."""
        self.always = {case.name for case in chosen if case.always}
        if self.device == "cpu" and not self.settings.implementations:
            self.left_out = {(case.name, name): reason for case in chosen for name, reason in case.not_on_cpu}
        plan = [(case, mask, length) for case in chosen for mask in case.masks for length in self.lengths(case)]
        total = sum(len(self.names(case)) for case, _, _ in plan)
        with Progress(total) as progress:
            for index, (case, mask, length) in enumerate(plan):
                later = [
                    self.problem(other, name, other_mask, other_length)
                    for other, other_mask, other_length in plan[index + 1 :]
                    for name in self.names(other)
                ]
                problems = [self.problem(case, name, mask, length) for name in self.names(case)]
                self.measure(problems, later, progress)
        return self.results

    def must_run(self, problem: Problem) -> bool:
        """The tiled implementation that is measured at every length of such a case, whatever it takes."""
        capability = self.results["environment"]["compute_capability"]
        kernel = self.device == "cuda" and float(capability or 0) >= environment.KERNEL_CAPABILITY
        tiled = "jaxattn-triton" if kernel else "jaxattn-blockwise"
        return problem.implementation == tiled and problem.case in self.always

    def lengths(self, case: Case) -> tuple[int, ...]:
        if self.settings.lengths:
            return self.settings.lengths
        return case.quick_lengths if self.settings.quick else case.lengths

    def names(self, case: Case) -> tuple[str, ...]:
        return self.settings.implementations or case.implementations

    def problem(self, case: Case, name: str, mask: str, length: int) -> Problem:
        return Problem(
            case=case.name,
            implementation=name,
            batch=case.batch,
            queries=case.queries or length,
            keys=length,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            mask=mask,
            dtype=self.settings.dtype or case.dtype(self.device),
            device=self.device,
            direction=self.settings.direction,
            seed=self.settings.seed,
            threads=self.threads,
            cold=self.settings.cold,
            layer=adapters.find(name).layer,
        )

    def measure(self, problems: list[Problem], later: list[Problem], progress: Progress) -> None:
        """All rows of one length: start what must run, admit the rest, gate, time in turns, save.

        What must run starts first: its first call corrects what later lengths are predicted to take.
        """
        done = {results.key(row) for row in self.results["rows"] if row["status"] in DONE}
        waiting = []
        for problem in problems:
            if problem.key() in done:
                progress.skip()
                continue
            one = Measurement(problem, self.new_row(problem))
            reason = self.refusal(problem)
            if reason:
                one.row["status"], one.row["reason"] = reason
            if reason or not self.fits(one):
                self.finish(one, progress)
            else:
                waiting.append(one)
        self.under_way = waiting
        must = [one for one in waiting if self.must_run(one.problem)]
        try:
            self.open(must, -math.inf, progress)
            reserved_s = sum(self.cost_s(problem, 2) for problem in later if self.must_run(problem))
            admitted = self.admit([one for one in waiting if one not in must], reserved_s, progress)
            beside = [one for one in must if one.row["status"] == "ok"]
            for batch in list(self.batches(admitted)) or [[]]:
                self.open(batch, reserved_s, progress)
                going = [one for one in beside + batch if one.row["status"] == "ok"]
                self.time_in_turns(going, reserved_s, bool(later), progress)
                for one in beside + batch:
                    if one.row["status"] == "ok" and self.counts(one.problem):
                        progress.say(f"{one.problem.case} {one.problem.keys}: bytes of {one.row['label']}")
                        self.count_bytes(one, reserved_s)
                    self.finish(one, progress)
                beside = []
        finally:
            for one in waiting:
                if one.row["times_s"] and not one.saved:
                    one.row |= INTERRUPTED if results.measured(one.row) else {}
                    self.finish(one, progress)
                one.close()
            self.under_way = []

    def admit(self, waiting: list[Measurement], reserved_s: float, progress: Progress) -> list[Measurement]:
        """Those whose two calls are predicted to fit in the time that is left, the quickest first."""
        admitted, spent_s = [], 0.0
        for one in sorted(waiting, key=lambda one: self.predicted_s(one.problem) or 0):
            cost_s = self.cost_s(one.problem, 2)
            left_s = self.left_s() - reserved_s - spent_s
            one.row["predicted_s"] = self.predicted_s(one.problem)
            if cost_s > left_s:
                one.row["status"] = "skipped"
                one.row["reason"] = f"time: about {cost_s:.0f} s predicted, {max(0, left_s):.0f} s left"
                self.finish(one, progress)
                continue
            spent_s += cost_s
            admitted.append(one)
        return admitted

    def new_row(self, problem: Problem) -> dict:
        adapter = adapters.find(problem.implementation)
        return dataclasses.asdict(problem) | {
            "label": adapter.label,
            "framework": adapter.framework,
            "tiled": adapter.tiled,
            "status": "waiting",
            "reason": "",
            "flops": problem.flops(),
            "predicted_bytes": adapter.predicted_bytes(problem),
            "error": None,
            "traffic": None,
            "times_s": [],
            "device_times_s": [],
            "control_s": [],
        }

    def refusal(self, problem: Problem) -> tuple[str, str] | None:
        """(status, reason) where it is known without starting a process that this row cannot be measured."""
        adapter = adapters.find(problem.implementation)
        if adapter.framework == "torch":
            if "torch" not in self.results["environment"]["versions"]:
                return "missing", "torch is not installed"
            torch_cuda = self.results["environment"].get("torch_cuda", True)
            if self.device == "cuda" and torch_cuda is not True:
                return "missing", torch_cuda
        if adapter.layer and self.settings.quick:
            return "skipped", "left out by --quick"
        if reason := adapter.refuses(problem):
            return "refused", reason
        if adapter.needs and importlib.util.find_spec(adapter.needs) is None:
            return "missing", f"{adapter.needs} is not installed"
        if reason := self.left_out.get((problem.case, problem.implementation)):
            return "skipped", f"{reason}; to have it: --impl {problem.implementation}"
        return None

    def fits(self, one: Measurement) -> bool:
        """Whether the predicted bytes are there; where not, the row says so with both numbers."""
        row, limit = one.row, MEMORY_SHARE * self.available_bytes()
        row["available_bytes"] = self.available_bytes()
        if row["predicted_bytes"] is None or row["predicted_bytes"] <= limit:
            return True
        row["status"], row["reason"] = "skipped", memory_reason(row["predicted_bytes"], limit)
        return False

    def available_bytes(self) -> int:
        if self.device == "cuda":
            return self.results["environment"]["memory_bytes"]
        return environment.available_bytes()

    def predicted_s(self, problem: Problem) -> float | None:
        """Seconds of one call: the nearest shorter length's time, times the ratio of FLOPs."""
        best = None
        for row in [*self.results["rows"], *(one.row for one in self.under_way)]:
            same = all(
                row[name] == getattr(problem, name)
                for name in ("case", "mask", "implementation", "dtype", "direction", "batch", "heads", "cold")
            )
            nearer = best is None or row["keys"] > best["keys"]
            if same and nearer and row["keys"] < problem.keys and (row["times_s"] or row.get("first_s")):
                best = row
        if best is None:
            return None
        measured_s = statistics.median(best["times_s"] or [best["first_s"]])
        return measured_s * problem.flops() / best["flops"]

    def cost_s(self, problem: Problem, calls: int) -> float:
        """Predicted seconds for a row: starting its process, getting ready, and `calls` calls (one second where
        nothing is known).
        """
        predicted = self.predicted_s(problem)
        return START_S + self.ready_s(problem) + calls * (1.0 if predicted is None else predicted)

    def ready_s(self, problem: Problem) -> float:
        """Seconds that the implementation's last row took beside its calls: compiling, counting bytes (which
        compiles once more), and what its first call took longer than the others.
        """
        for row in reversed([*self.results["rows"], *(one.row for one in self.under_way)]):
            if row["implementation"] == problem.implementation and row.get("first_s"):
                spent_s = sum(row.get(name) or 0.0 for name in ("compile_s", "build_s", "traffic_s"))
                return spent_s + max(0.0, row["first_s"] - statistics.median(row["times_s"] or [row["first_s"]]))
        if adapters.find(problem.implementation).framework != "jax":
            return 0.0
        return COMPILE_GUESS_S * (2 if self.settings.traffic else 1)

    def batches(self, admitted: list[Measurement]) -> Iterator[list[Measurement]]:
        """Rows that may live side by side: together they are predicted to fit in memory."""
        batch, total = [], 0
        limit = MEMORY_SHARE * self.available_bytes()
        for one in admitted:
            need = one.row["predicted_bytes"] or one.problem.arrays_bytes()
            need += CONTEXT_BYTES if self.device == "cuda" else 0
            if batch and total + need > limit:
                yield batch
                batch, total = [], 0
            batch.append(one)
            total += need
        if batch:
            yield batch

    def open(self, batch: list[Measurement], reserved_s: float, progress: Progress) -> None:
        """Start the children together, then gate them one by one; what fails is closed and saved.

        Where the machine is slower than predicted and less than `reserved_s` is left, the rest is skipped: what
        must run later keeps its time.
        """
        if not batch:
            return
        progress.say(f"{batch[0].problem.case} {batch[0].problem.keys}: starting {len(batch)} processes")
        for one in batch:
            one.child = self.new_child()
            one.child.tell("load", problem=dataclasses.asdict(one.problem))
        if self.can_judge:  # the references, while the others start
            for problem in {one.problem.layer: one.problem for one in batch}.values():
                self.ask_judge("expect", problem=dataclasses.asdict(problem))
        for one in batch:
            self.step(one, lambda child=one.child: child.hear(120))
        for one in batch:
            if one.row["status"] == "waiting" and self.left_s() < reserved_s:
                one.row["status"], one.row["reason"] = "skipped", "time: the rows before it took what was left"
            if one.row["status"] == "waiting":
                progress.say(f"{one.problem.case} {one.problem.keys}: {one.row['label']}")
                self.gate(one, reserved_s)
            if one.row["status"] != "ok":
                self.finish(one, progress)

    def new_child(self) -> Child:
        self.started += 1
        return Child(self.settings.device, self.threads, self.scratch / f"{self.started}.log")

    def step(self, one: Measurement, request: Callable[[], dict]) -> dict | None:
        """One request; what goes wrong becomes the row's status and reason, and None is returned."""
        try:
            reply = request()
        except ChildFailure as failure:
            one.row["status"], one.row["reason"] = failure.status, failure.reason
            return None
        if not reply.pop("ok"):
            one.row["status"], one.row["reason"] = reply["status"], reply["reason"]
            return None
        return reply

    def within(self, one: Measurement, most_s: float, reserved_s: float, do: str, **request) -> dict | None:
        """One request that may take `most_s`, less where little time is left; then a late one is skipped for time."""
        limit_s = min(most_s, max(0.0, self.left_s() - reserved_s) + OVERTIME_S)
        reply = self.step(one, lambda: one.child.ask(do, limit_s, **request))
        if one.row["status"] == "timed out" and limit_s < most_s:
            one.row["status"], one.row["reason"] = "skipped", f"time: its {STEPS[do]} did not end by the deadline"
        return reply

    def gate(self, one: Measurement, reserved_s: float) -> None:
        """Compile, compare the compiler's bytes with the memory, call once, judge; "ok" if it may be timed."""
        row = one.row
        reply = self.within(one, COMPILE_S, reserved_s, "compile")
        if reply is None:
            return
        row |= reply
        needed, limit = reply.get("compiled_peak_bytes"), MEMORY_SHARE * self.available_bytes()
        if needed is not None and needed > limit:
            row["status"], row["reason"] = "skipped", memory_reason(needed, limit)
            return
        rows_path = str(self.scratch / "rows.npz")
        patience_s = max(FIRST_CALL_S, 10 * (row.get("predicted_s") or 0))
        reply = self.within(one, patience_s, reserved_s, "first", rows_path=rows_path)
        if reply is None:
            return
        row |= reply
        if self.can_judge:
            reply = self.ask_judge("judge", problem=dataclasses.asdict(one.problem), rows_path=rows_path)
            if not reply.pop("ok"):
                row["status"], row["reason"] = "failed", f"not judged, so not timed: {reply['reason']}"
                return
            row["error"] = reply
            if not reply["right"]:
                row["status"], row["reason"] = "wrong", reply["reason"]
                return
        row["status"] = "ok"

    def counts(self, problem: Problem) -> bool:
        """Whether the bytes that the row moves are counted."""
        return self.settings.traffic and adapters.find(problem.implementation).framework == "jax"

    def counting_s(self, problem: Problem) -> float:
        """Predicted seconds of counting the row's bytes: what the implementation's last count took."""
        if not self.counts(problem):
            return 0.0
        for row in reversed(self.results["rows"]):
            if row["implementation"] == problem.implementation and row.get("traffic_s"):
                return row["traffic_s"]
        return COMPILE_GUESS_S

    def count_bytes(self, one: Measurement, reserved_s: float) -> None:
        """Count the bytes that a timed row moves. What goes wrong stands in their place and costs no time of the row.

        After the timing, so that neither what counting allocates is in the peak of memory, nor a process that it
        ends has times to lose.
        """
        start, left_s = time.monotonic(), self.left_s() - reserved_s
        if left_s < 0:
            one.row["traffic"] = {"reason": "time: nothing was left for counting its bytes"}
            return
        try:
            reply = one.child.ask("traffic", min(COMPILE_S, left_s + OVERTIME_S))
            if not reply.pop("ok"):
                reply = {"reason": reply["reason"]}
        except ChildFailure as failure:
            reply = {"reason": f"{failure.status}: {failure.reason}"}
        one.row["traffic"], one.row["traffic_s"] = reply, time.monotonic() - start

    def ask_judge(self, do: str, **request) -> dict:
        """The judge's reply; where its process has ended, why, and a new judge takes its place."""
        try:
            return self.judge.ask(do, JUDGE_S, **request)
        except ChildFailure as failure:
            self.judge.close()
            self.judge = self.new_child()
            return {"ok": False, "reason": f"the judge {failure.status}: {failure.reason}"}

    def time_in_turns(self, going: list[Measurement], reserved_s: float, more: bool, progress: Progress) -> None:
        """Round after round, one turn each, until every row has its repeats or the length's time is spent.

        A turn of a fast implementation takes several samples, so that rounds are not all waiting. After each
        round the repeats so far are on the disk, as those of a run that was stopped there. On a CPU the control runs
        between the turns; a repeat keeps the slower of the two beside it. Where some were disturbed there are up to as
        many rounds again, and before each round an undisturbed moment is waited for, both within `PATIENCE_S`.
        """
        if not going:
            return
        left_s = max(0.0, self.left_s() - reserved_s - sum(self.counting_s(one.problem) for one in going))
        end = time.monotonic() + (min(self.settings.length_s, left_s / 3) if more else left_s)
        spare_s = min(PATIENCE_S, (end - time.monotonic()) / 5)
        for turn in range(2 * self.settings.repeats):
            again = turn >= self.settings.repeats
            if again and (spare_s <= 0 or not any(self.lacks_repeats(one.row) for one in going)):
                break
            if self.control is not None:
                progress.say(f"{going[0].row['case']} {going[0].row['keys']}: looking for an undisturbed moment")
            before_s, spare_s = self.calm(spare_s)
            start = time.monotonic()
            for one in going:
                row = one.row
                expected_s = min(row["times_s"], default=row["first_s"])
                if row["status"] != "ok" or (row["times_s"] and time.monotonic() + expected_s > end):
                    continue
                progress.say(f"{row['case']} {row['keys']}: repeat {turn + 1}")
                count = 3 if expected_s < 0.02 else 1
                patience_s = max(FIRST_CALL_S, 20 * expected_s)
                reply = self.step(one, lambda c=one.child, n=count, p=patience_s: c.ask("sample", p, count=n))
                after_s = self.control_s()
                if reply is not None:
                    if self.device == "cpu":
                        slower_s = None if after_s is None else max(before_s, after_s)
                        row["control_s"] += [slower_s] * len(reply["times_s"])
                    row["times_s"] += reply["times_s"]
                    row["device_times_s"] += reply["device_times_s"]
                elif row["times_s"]:
                    row["reason"] = f"after {len(row['times_s'])} repeats: {row['reason']}"
                before_s = after_s
            if again:
                spare_s -= time.monotonic() - start
            self.save()

    def lacks_repeats(self, row: dict) -> bool:
        """Whether fewer repeats than asked for were undisturbed, and others were not."""
        fine = results.undisturbed(row, self.least_control_s())
        return row["status"] == "ok" and not all(fine) and sum(fine) < self.settings.repeats

    def least_control_s(self) -> float | None:
        """That of the rows so far."""
        return results.least_control_s({"rows": [*self.results["rows"], *(one.row for one in self.under_way)]})

    def calm(self, patience_s: float) -> tuple[float | None, float]:
        """The control's seconds, now or, where they say that the machine is disturbed, when it no longer is; and the
        patience that is left.
        """
        least_s, start = self.least_control_s(), time.monotonic()
        while True:
            now_s, left_s = self.control_s(), patience_s - (time.monotonic() - start)
            if now_s is None or least_s is None or now_s <= results.DISTURBED * least_s:
                return now_s, left_s
            if left_s < 0:
                return now_s, 0.0
            time.sleep(min(0.5, left_s))

    def control_s(self) -> float | None:
        """Seconds of the control program now; None without one. A control that fails is not tried again: a note says
        so, and the run goes on.
        """
        if self.control is None:
            return None
        try:
            return self.control.seconds()
        except ChildFailure as failure:
            self.control.close()
            self.control = None
            note = f"No control from here on, so disturbed repeats count as well ({failure.status}: {failure.reason})"
            self.results["environment"]["notes"].append(note)
            print(f"Note: {note}")
            return None

    def finish(self, one: Measurement, progress: Progress) -> None:
        """A row is final: its process ends, and it goes to the disk. Once: a second time does nothing.

        It takes the place of an earlier run's row where it is the `better` one.
        """
        one.close()
        if one.saved:
            return
        one.saved = True
        self.results["rows"] = self.with_row(self.results["rows"], one.row)
        self.results["seconds"] = time.monotonic() - self.start
        self.save()
        progress.done(one.row)


def memory_reason(needed: float, limit: float) -> str:
    return f"memory: {needed / 1e9:.1f} GB predicted, {limit / 1e9:.1f} GB may be used"


def method(device: str, threads: int) -> list[str]:
    """How the figures were taken, in sentences for the report."""
    lines = [
        "Correct first: a result whose error against float64 breaks the accuracy rule (RMSE at most twice plain "
        "torch's in the same dtype, plus one unit roundoff of the formula in absolute values) is not timed. "
        "Judged on 32 query rows: the first, the last, and 30 drawn from the seed; a layer on its first 128 "
        "tokens against Hugging Face's eager layer in float64.",
        "Same inputs from one seed, in [B, T, N, H] layout, for both frameworks; queries are 3 times unit normal, "
        "so that attention is peaked.",
        "Each measurement in a fresh process; the processes of one length are timed in turns, one call each. "
        "The first call warms up and is not counted; JAX compiles before it, torch (FlexAttention) in it. A call of "
        "less than 20 ms takes three repeats a turn, after one more that is not counted.",
        "TFLOP/s: 4 * H for each (query, key) pair that the mask allows; causal counts half of T * S; a layer adds 2 "
        "for each weight and token.",
        "float32 products are full float32 in both frameworks: TF32 is off.",
        "torch runs under inference_mode; its keys are not copied for grouped heads where it takes them grouped.",
    ]
    if device == "cuda":
        lines.append(
            "End to end: one call and a wait for the device. Device: calls queued for about 20 ms and one wait, "
            "per call; the same way for both frameworks."
        )
        lines.append(
            "Memory: the peak of each framework's own allocator, inputs included; XLA's also counts what it tried out "
            "while it compiled."
        )
    else:
        lines.append(f"{threads} threads for both frameworks; a call's time is end to end, waited for.")
        lines.append(
            "Control: a small JAX program, whose threads hand data to each other all the time, runs between the calls "
            "that are timed; it slows down where the host of a virtual machine moves a core to another socket, which "
            "slows JAX's rows as well. A repeat is disturbed where the control before or after it took more than "
            f"{results.DISTURBED:g} times the run's least: it is repeated if time allows, stays in the file, and is in "
            f"no median of a row with {results.FEWEST} or more undisturbed repeats."
        )
        lines.append("Memory: peak resident memory above what the process held before its inputs.")
    return lines
