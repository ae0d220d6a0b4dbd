"""What every lab shares: arguments, progress, the JSON file, how numbers and lines are shown.

Design fact: a lab is a module with `arguments`, `check`, `run`, `tables`, `draw` and `see`. `run` alone computes;
tables, picture and the two lines of what to see are made from its JSON-ready result.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import shutil
from pathlib import Path

from rich import box
from rich.console import Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bench import environment, plot, results
from bench.plot import Style
from bench.run import ROOT

PUBLISHED = ROOT / "bench/results/labs"

# One look per name in all labs; no two share a marker.
STYLES = {
    "loops": Style("#404040", "+", ":"),
    "naive": plot.STYLES["jaxattn-naive"],
    "blockwise": plot.STYLES["jaxattn-blockwise"],
    "full": plot.STYLES["jaxattn-blockwise"],
    "window": Style("#56b4e9", "D"),
    "dilated": Style("#009e73", "^", "--"),
    "bigbird": Style("#7e3f8f", "P"),
    "longformer": Style("#0072b2", "X", "-."),
    "linear": Style("#cc79a7", "v", "-."),
    "MHA": Style("#d55e00", "s"),
    "GQA": Style("#009e73", "p", "--"),
    "MQA": Style("#4b0082", "^", "-."),
    "1 head": Style("#404040", "o", ":"),
    "parallel": Style("#e69f00", "o", "--"),
    "chunked": Style("#cc79a7", "v", "-."),
    "recurrent": Style("#0072b2", "X", ":"),
}


def at_least(least: int, text: str) -> int:
    """An argument that must be a whole number, and not a smaller one."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
    return value


positive = functools.partial(at_least, 1)
natural = functools.partial(at_least, 0)


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=natural, default=0, help="of every random number (default 0)")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture (default: a new one below results/runs)")
    parser.add_argument("--publish", action="store_true", help="copy JSON and picture to bench/results/labs")


class Steps:
    """A progress bar over a known number of steps, named as they start."""

    def __init__(self, total: int):
        self.bar = Progress(
            TextColumn("{task.description:<44}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
        )
        self.total, self.started = total, 0
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> Steps:
        self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self.bar.update(self.task, completed=self.total, description="done")
        self.bar.stop()

    def start(self, text: str) -> None:
        """The next step begins."""
        self.bar.update(self.task, completed=self.started, description=text)
        self.started += 1

    def part(self, fraction: float) -> None:
        """So much of the step under way is done."""
        self.bar.update(self.task, completed=self.started - 1 + fraction)


def record(name: str, command: str, settings: dict, found: dict) -> dict:
    """What a lab found, with everything that is needed to take it again."""
    return {
        "kind": "lab",
        "schema": results.SCHEMA,
        "lab": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": environment.commit(),
        "settings": settings,
        "environment": environment.describe(),
        **found,
    }


def folder_for(name: str) -> Path:
    return ROOT / "bench/results/runs" / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-lab-{name}"


def publish(paths: list[Path]) -> None:
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copy(path, PUBLISHED / path.name)


def save(data: dict, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(path, json.dumps(data, indent=1, default=str) + "\n")
    return path


def table(title: str, columns: list[str], rows: list[list]) -> Group:
    """A table whose first column is text and whose others are numbers, below its title."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        made.add_row(*map(str, row))
    return Group(Text(title, style="italic"), made)  # a table's own title would be broken at the table's width


def cost_table(title: str, rows: list[dict]) -> Group:
    """What `bench.labs.measure` found of the programs of a lab, by the `name` of each row."""
    return table(
        title,
        ["", "time", "peak RSS", "requested", "in + out, once"],
        [
            [
                row["name"],
                milliseconds(row["time_s"]),
                mebibytes(row["rss_bytes"]),
                mebibytes(row["requested_bytes"]),
                mebibytes(row["compulsory_bytes"]),
            ]
            for row in rows
        ],
    )


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three digits.

    >>> milliseconds(0.01234), milliseconds(2.5)
    ('12.3 ms', '2500 ms')
    """
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def mebibytes(count: float) -> str:
    """Bytes, as they are, in KiB or in MiB, three digits.

    >>> mebibytes(3 << 20), mebibytes(2048), mebibytes(8)
    ('3 MiB', '2 KiB', '8 bytes')
    """
    if count < 1024:
        return f"{count:.0f} bytes"
    if count < 1 << 20:
        return f"{count / 1024:.3g} KiB"
    value = count / 2**20
    return f"{value:.0f} MiB" if value >= 100 else f"{value:.3g} MiB"


def exponent(lengths: list[int], values: list[float]) -> float:
    """The b of the power law a x^b that fits best, by least squares of the logarithms.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    xs, ys = [math.log(x) for x in lengths], [math.log(y) for y in values]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return slope / sum((x - x_mean) ** 2 for x in xs)


def canvas(width: float, height: float):
    """An empty figure, inches, drawn without a display.

    Raises: ImportError where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained")


def picture(rows: int, columns: int, width: float, height: float):
    """A figure and its axes [rows, columns]; as `canvas` otherwise."""
    figure = canvas(width, height)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_picture(figure, title: str, data: dict, path: Path, *, dtype: str = "float32") -> Path:
    """Write a figure below its title and the machine that its numbers are from."""
    import matplotlib.pyplot as plt

    found = data["environment"]
    machine = f"{found['device_name']}, {found['cores']} cores, {dtype}"
    figure.suptitle(f"{title}\n{machine}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def line(ax, name: str, xs, ys, *, label: str | None = None, modelled: bool = False) -> None:
    """One line in the look of its name; what is modelled, not measured, is hollow and dotted."""
    look = STYLES[name]
    ax.plot(
        xs,
        ys,
        color=look.colour,
        marker=look.marker,
        linestyle=":" if modelled else look.line,
        markerfacecolor="none" if modelled else look.colour,
        markersize=6,
        linewidth=1.5,
        label=label,
    )


def length_axes(ax, lengths: list[int], ylabel: str) -> None:
    """Both axes logarithmic, lengths marked."""
    ax.set_xscale("log", base=2)
    plot.log_scale(ax.yaxis)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.tick_params(axis="x", which="minor", bottom=False)
    ax.set_xlabel("sequence length")
    ax.set_ylabel(ylabel)
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
