"""The results file: read, written, summarised, compared.

Design fact: `results.json` holds every repeat and every reason; medians, spreads and rates are computed from
it by `counting` and `summary`, in one place, for tables and plots alike. Written whole to a new file that then takes
the old one's place, so that a stopped run leaves a readable one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
from pathlib import Path

SCHEMA = 1
# What makes two rows the same measurement, for --resume and compare.
_SHAPE = ("batch", "queries", "keys", "heads", "kv_heads", "head_dim")
KEY = ("case", "mask", *_SHAPE, "dtype", "direction", "cold", "implementation")
CHECKOUT = "jaxattn, oracle, bench"  # what the digest of the checkout's code is called
STOPPED = "stopped"  # the status of a row whose repeats a stopped run had begun; --resume measures it again
MEASURED = ("ok", STOPPED)
# What a results file must hold, at the top level, in its settings and environment, in each row: what tables,
# figures and comparisons read without asking whether it is there.
REQUIRED = {
    "file": {"date", "command", "commit", "settings", "environment", "rows"},
    "settings": {"threads"},
    "environment": {"device", "device_name", "cores", "load_average"},
    "row": {
        *KEY,
        *("label", "tiled", "layer", "flops", "status", "reason", "error", "times_s", "device_times_s"),
    },
}
# A repeat is disturbed where the control beside it took more than so many times the run's least: up to 1.5 is usual,
# and 1.7 to 2.7 were seen where the host of a virtual machine had moved a core to another socket.
DISTURBED = 1.6
FEWEST = 3  # undisturbed repeats that stand for a row; where there are fewer, all repeats do
SMALLEST_NOISE = 0.05  # two runs of one program on one machine differ by this much with no reason at all


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a table shows of one row; None where it was not measured.

    time_ms: median end to end (call and wait). device_ms: median per call of queued calls, GPU only.
    low_ms, high_ms: the fastest and slowest repeat. noise: how far below and above it another run's median may lie, as
    logarithms of ratios: to the quartiles, for machines drift, or to the ends of the `median_interval`, for repeats may
    be few and scatter, whichever is farther, at least `SMALLEST_NOISE`; None with fewer than three repeats. It knows
    nothing of what lasts for the whole run. tflops: by device time where there is one, else by end-to-end time.
    """

    time_ms: float | None
    device_ms: float | None
    low_ms: float | None
    high_ms: float | None
    noise: tuple[float, float] | None
    repeats: int
    tflops: float | None


def measured(row: dict) -> bool:
    """Whether the row's repeats are a measurement: it has some, and nothing went wrong after them.

    >>> measured({"times_s": [0.1], "status": "crashed"})
    False
    """
    return bool(row.get("times_s")) and row.get("status", "ok") in MEASURED


def summary(row: dict) -> Summary:
    """Summarise a row, as `counting` gives it: every repeat that it holds counts.

    >>> summary({"times_s": [0.2, 0.1, 0.3], "flops": 2e11}).tflops
    1.0
    """
    times, device_times = row.get("times_s") or [], row.get("device_times_s") or []
    if not measured(row):
        return Summary(None, None, None, None, None, 0, None)
    median = statistics.median(times)
    device = statistics.median(device_times) if device_times else None
    noise = None
    if len(times) >= 3:
        first, _, third = statistics.quantiles(times, n=4, method="inclusive")
        low, high = median_interval(times)
        below, above = math.log(median / min(first, low)), math.log(max(third, high) / median)
        noise = max(SMALLEST_NOISE, below), max(SMALLEST_NOISE, above)
    return Summary(
        time_ms=median * 1e3,
        device_ms=None if device is None else device * 1e3,
        low_ms=min(times) * 1e3,
        high_ms=max(times) * 1e3,
        noise=noise,
        repeats=len(times),
        tflops=row["flops"] / (device or median) / 1e12,
    )


def median_interval(times: list[float]) -> tuple[float, float]:
    """The 95% confidence interval of the median, from the repeats alone: all of them up to eight.

    Of n repeats k or fewer lie on one side of the median with the binomial's probability, whatever they scatter like.

    >>> median_interval([5.0, 3.0, 1.0, 4.0, 2.0, 9.0, 6.0, 8.0, 7.0])
    (2.0, 8.0)
    """
    count, outside = len(times), 0
    while 2 * sum(math.comb(count, k) for k in range(outside + 2)) <= 0.05 * 2**count:
        outside += 1
    ordered = sorted(times)
    return ordered[outside], ordered[-1 - outside]


def least_control_s(data: dict) -> float | None:
    """Seconds of the run's fastest control; None for a run without one."""
    return min((s for row in data["rows"] for s in row.get("control_s") or () if s is not None), default=None)


def undisturbed(row: dict, least_s: float | None) -> list[bool]:
    """For each of the row's repeats whether its control allows it; what has no control is undisturbed.

    >>> undisturbed({"times_s": [3.0, 5.0, 3.0], "control_s": [0.1, 0.2, None]}, 0.1)
    [True, False, True]
    """
    controls = itertools.chain(row.get("control_s") or (), itertools.repeat(None))
    return [s is None or s <= DISTURBED * least_s for s, _ in zip(controls, row["times_s"], strict=False)]


def chosen(undisturbed: list[bool]) -> list[bool]:
    """Which repeats, or pairs of them, count: the undisturbed ones if they are `FEWEST` or more, else all.

    >>> chosen([True, False, True, True]), chosen([True, False, True])
    ([True, False, True, True], [True, True, True])
    """
    return undisturbed if sum(undisturbed) >= FEWEST else [True] * len(undisturbed)


def counting(data: dict) -> list[dict]:
    """The rows of a results file as tables and figures show them: in `times_s` the repeats that count.

    Each has two numbers more: `disturbed`, how many of its repeats were, and `left_out`, how many do not count.
    """
    least_s, rows = least_control_s(data), []
    for row in data["rows"]:
        fine = undisturbed(row, least_s)
        times_s = list(itertools.compress(row["times_s"], chosen(fine)))
        numbers = {"disturbed": fine.count(False), "left_out": len(fine) - len(times_s)}
        rows.append(row | numbers | {"times_s": times_s})
    return rows


def key(row: dict) -> tuple:
    """What makes two rows the same measurement: `cases.Problem.key`, from a row."""
    return tuple(row[name] for name in KEY)


def save(results: dict, folder: Path) -> None:
    """Write `results.json` so that a reader sees the old file or the new one, never a part."""
    write_text(folder / "results.json", json.dumps(finite(results), indent=1, allow_nan=False) + "\n")


def finite(value):
    """The value with None for NaN and infinities, which JSON has no word for; a row's reason names them.

    >>> finite({"rmse": math.nan, "rows": [1.0, math.inf]})
    {'rmse': None, 'rows': [1.0, None]}
    """
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class WriteError(OSError):
    """A file of results that cannot be written: where, and why."""


@contextlib.contextmanager
def writing(path: Path):
    """What stands under it writes a file; where that is not possible, a WriteError names the file."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: whole under another name, then renamed.

    Raises: WriteError where that is not possible; the file is then as it was.
    """
    new = path.with_name(path.name + ".new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def load(path: Path) -> dict:
    """Read a results file, or the one in a folder.

    Raises: ValueError where it is not one this version reads.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: no results here ({error.strerror}); give a run's folder or its JSON") from None
    except ValueError as error:  # text that is no JSON, or bytes that are no text
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a results file of schema {SCHEMA}")
    kinds = {"date": str, "command": str, "settings": dict, "environment": dict, "rows": list}
    unlike = {name for name, kind in kinds.items() if not isinstance(results.get(name), kind)}
    if absent := unlike | (REQUIRED["file"] - results.keys()):
        raise ValueError(f"{path}: not a whole results file, without {', '.join(sorted(absent))}")
    parts = [("settings", results["settings"]), ("environment", results["environment"])]
    for name, part in [*parts, *(("row", row) for row in results["rows"])]:
        if absent := REQUIRED[name] - (part.keys() if isinstance(part, dict) else set()):
            where = "a row" if name == "row" else f"its {name}"
            raise ValueError(f"{path}: not a whole results file, without {', '.join(sorted(absent))} in {where}")
    return results


def differences(one: dict, two: dict) -> list[tuple[str, object, object]]:
    """What makes rows of two results files incomparable, as (name, in one, in the other): another machine, version,
    code, seed or number of threads. A user's module is compared where both hold it.
    """

    def facts(data: dict) -> dict:
        found, settings, code = data["environment"], data["settings"], data.get("code", {})
        machine = {name: found.get(name) for name in ("device_name", "platform", "cores")}
        versions = {"python": found.get("python"), **found.get("versions", {})}
        code = {f"code of {name}": digest for name, digest in code.items()}
        return machine | versions | {name: settings.get(name) for name in ("seed", "threads")} | code

    a, b = facts(one), facts(two)
    alone = one.get("code", {}).keys() ^ two.get("code", {}).keys()
    modules = {f"code of {name}" for name in alone - {CHECKOUT}}
    names = [name for name in {**a, **b} if name not in modules]
    return [(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One measurement in two files. ratio: time in B over time in A. noise: None where it is not known. machine: the
    ratio of the runs' controls where it says that the machine differed, else None. disturbed: whether disturbed
    repeats count in either row, for want of others.
    """

    row: dict
    a_ms: float
    b_ms: float
    ratio: float
    noise: float | None
    machine: float | None = None
    disturbed: bool = False

    @property
    def verdict(self) -> str:
        if self.machine is not None:
            return "the machine differed"
        if self.noise is None:
            return "too few repeats to say"
        if abs(math.log(self.ratio)) <= self.noise:
            return "within noise"
        if self.disturbed:
            return "disturbed"
        return "faster" if self.ratio < 1 else "slower"


def machine_ratio(a: dict, b: dict) -> float | None:
    """The least control time of B over that of A, where one is more than `DISTURBED` times the other: the whole of one
    run was disturbed. None where they are nearer, or a run has no control.
    """
    least_a, least_b = least_control_s(a), least_control_s(b)
    if least_a is None or least_b is None or max(least_a, least_b) <= DISTURBED * min(least_a, least_b):
        return None
    return least_b / least_a


def compare(a: dict, b: dict) -> list[Ratio]:
    """Ratios of the measurements that both files hold, in the order of A, over the repeats that count.

    The noise of a ratio is the sum of both rows' noise, each towards the other.
    """
    other = {key(row): row for row in counting(b)}
    machine, ratios = machine_ratio(a, b), []
    for row in counting(a):
        beside = other.get(key(row), {})
        one, two = summary(row), summary(beside)
        if one.time_ms is None or two.time_ms is None:
            continue
        noise = None
        if one.noise and two.noise:
            towards = int(two.time_ms > one.time_ms)
            noise = one.noise[towards] + two.noise[1 - towards]
        disturbed = any(half["disturbed"] and not half["left_out"] for half in (row, beside))
        ratios.append(Ratio(row, one.time_ms, two.time_ms, two.time_ms / one.time_ms, noise, machine, disturbed))
    return ratios
