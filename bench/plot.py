"""Figures, from results files only: time, rate, memory and error, one look per implementation.

Design fact: imports neither jax nor torch, so that a figure can be redrawn anywhere from the JSON that was
committed. Measured values are filled markers on solid or dashed lines; what was predicted, not measured, is
a hollow marker on a dotted line.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from bench import results


@dataclasses.dataclass(frozen=True)
class Style:
    """How an implementation is drawn everywhere. No two share a marker and line, so that grey paper will do."""

    colour: str
    marker: str | tuple[int, int, int]
    line: str = "-"


STYLES = {
    "jaxattn-naive": Style("#e69f00", "o", "--"),
    "jaxattn-blockwise": Style("#d55e00", "s"),
    "jaxattn-triton": Style("#990000", "*"),
    "jax-nn-xla": Style("#b8a000", "^", "--"),
    "jax-nn-cudnn": Style("#806600", "v"),
    "pallas-ops": Style("#cc79a7", "<"),
    "tokamax-triton": Style("#7e3f8f", ">"),
    "tokamax-mosaic": Style("#4b0082", "P"),
    "tokamax-cudnn": Style("#9467bd", "1"),
    "tokamax-xla": Style("#b48cd0", "h", "--"),
    "tokamax-xla-chunked": Style("#c8a8e0", "2"),
    "torch-eager": Style("#56b4e9", "D", "--"),
    "torch-sdpa-math": Style("#0072b2", "X", "--"),
    "torch-sdpa-flash": Style("#004d80", "p"),
    "torch-sdpa-efficient": Style("#009e73", "d"),
    "torch-sdpa-cudnn": Style("#005c42", "H"),
    "torch-flex": Style("#40c0a0", "8"),
    "jaxattn-layer": Style("#d55e00", (4, 1, 0), "-."),
    "hf-eager-layer": Style("#56b4e9", "d", "--"),
    "hf-sdpa-layer": Style("#004d80", "p", "-."),
}
OTHERS = tuple(Style("#404040", marker, line) for line in ("-", "--", "-.") for marker in "x+34")  # a user's own
ORDER = {name: index for index, name in enumerate(STYLES)}

KINDS = ("time", "tflops", "memory", "error", "bytes", "roofline")  # of figures, one group of rows each
TIME = "time of one call, waited for (ms, median)"
FASTER = 2.0  # flash (a tile of scores at a time) is to be more than so many times as fast as standard
NEVER = math.inf


def styles(data: dict) -> dict[str, Style]:
    """The look of every implementation of a results file: a user's own functions get theirs in the order of rows."""
    own = dict.fromkeys(row["implementation"] for row in data["rows"] if row["implementation"] not in STYLES)
    return STYLES | dict(zip(own, itertools.cycle(OTHERS), strict=False))


def groups(data: dict) -> dict[tuple, list[dict]]:
    """Rows of counting repeats by (case, mask, dtype, direction), each group in the fixed order and by length."""
    found: dict[tuple, list[dict]] = {}
    for row in results.counting(data):
        found.setdefault((row["case"], row["mask"], row["dtype"], row["direction"]), []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: (row["keys"], ORDER.get(row["implementation"], len(ORDER))))
    return found


def by_implementation(rows: Iterable[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["implementation"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: ORDER.get(item[0], len(ORDER))))


def crossover(rows: list[dict]) -> float | None:
    """The first measured length at which the fastest tiled row is more than twice as fast as the fastest standard one.

    `NEVER` if there is none; None where no length has a row of each kind. Attention alone: no layers, and no
    functions of a user, which may be either.
    """
    compared = False
    for length in sorted({row["keys"] for row in rows}):
        times: dict[bool | None, list[float]] = {True: [], False: [], None: []}
        for row in rows:
            time_ms = results.summary(row).time_ms
            if row["keys"] == length and not row["layer"] and time_ms is not None:
                times[row["tiled"]].append(time_ms)
        if times[True] and times[False]:
            compared = True
            if min(times[False]) > FASTER * min(times[True]):
                return length
    return NEVER if compared else None


def where(data: dict) -> str:
    """The device and dtype-independent part of a caption."""
    found = data["environment"]
    cores = "" if found["device"] == "cuda" else f", {data['settings']['threads']} threads"
    return f"{found['device_name']}{cores}"


def draw(data: dict, folder: Path) -> list[Path]:
    """Draw every figure that the rows allow into `folder`; returns the paths.

    Raises: ImportError where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    many = groups(data)
    for key, rows in many.items():
        if not any(results.measured(row) for row in rows):
            continue
        stem = name_of(key, many)
        for kind, figure in (("time", time_figure), ("tflops", rate_figure), ("memory", memory_figure)):
            paths.append(figure(data, key, rows, folder / f"{stem}-{kind}.png"))
        if any(row["error"] and results.measured(row) and not row["layer"] for row in rows):
            paths.append(error_figure(data, key, rows, folder / f"{stem}-error.png"))
        if any(counted(row) for row in rows):
            paths.append(bytes_figure(data, key, rows, folder / f"{stem}-bytes.png"))
        if any(counted(row) and row["traffic"]["bytes_per_s"] and results.measured(row) for row in rows):
            paths.append(roofline_figure(data, key, rows, folder / f"{stem}-roofline.png"))
    for case in {key[0]: None for key in many}:
        alike = {key: rows for key, rows in many.items() if key[0] == case and any(map(results.measured, rows))}
        if len({key[1] for key in alike}) > 1:
            paths.append(masks_figure(data, alike, folder / f"{case}-masks.png"))
    return paths


def name_of(key: tuple, many: Iterable[tuple]) -> str:
    """A group's file name: the case, and of mask, dtype and direction those that tell it from others."""
    case = key[0]
    alike = [other for other in many if other[0] == case]
    parts = [case]
    for index, part in enumerate(key[1:], 1):
        if len({other[index] for other in alike}) > 1:
            parts.append("".join(c if c.isalnum() else "-" for c in part).strip("-"))
    name = "-".join(parts)
    while "--" in name:
        name = name.replace("--", "-")
    return name


def caption(key: tuple, rows: list[dict]) -> str:
    row, (_, mask, dtype, direction) = rows[0], key
    queries = "" if row["queries"] == row["keys"] else f", {row['queries']} quer{'y' if row['queries'] == 1 else 'ies'}"
    heads = f"{row['heads']} heads of {row['head_dim']}"
    if row["kv_heads"] != row["heads"]:
        heads += f" on {row['kv_heads']} key head{'' if row['kv_heads'] == 1 else 's'}"
    direction = "" if direction == "forward" else ", forward + backward"
    return f"B={row['batch']}{queries}, {heads}, {mask}, {dtype}{direction}"


def panels(rows: list[dict]):
    """A figure with a panel for attention and, where there is something to show, one for whole layers."""
    import matplotlib.pyplot as plt

    layers = [row for row in rows if row["layer"] and (results.measured(row) or does_not_fit(row))]
    parts = [part for part in ([row for row in rows if not row["layer"]], layers) if part]
    figure, axes = plt.subplots(
        1, len(parts), figsize=(5.6 + 3.9 * (len(parts) - 1), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    titles = ["attention", "whole layer: projections, RoPE, attention"]
    for ax, part, title in zip(axes[0], parts, titles, strict=False):
        lengths = sorted({row["keys"] for row in rows})
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{length}" for length in lengths])
        ax.minorticks_off()
        ax.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
        ax.set_xlabel("sequence length" if part[0]["queries"] == part[0]["keys"] else "keys in the cache")
        ax.set_title(title, fontsize=10)
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    return figure, list(zip(axes[0], parts, strict=True))


def log_scale(axis) -> None:
    """A logarithmic axis with plain numbers (0.5, 20, 3,000), as many as have room beside each other."""

    def between(x: float, pos) -> str:
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        digits = range(2, 10) if decades < 0.3 else (2, 3, 5) if decades < 1 else (2, 5) if decades < 1.5 else ()
        return f"{x:,g}" if round(x / 10 ** math.floor(math.log10(x) + 1e-9)) in digits else ""

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_formatter(lambda x, pos: f"{x:,g}")
    axis.set_minor_formatter(between)


def lines(ax, data: dict, part: list[dict], value) -> None:
    """One line per implementation through the rows where `value(row)` is not None."""
    looks = styles(data)
    for name, rows in by_implementation(part).items():
        points = [(row["keys"], value(row)) for row in rows if value(row) is not None]
        if points:
            look = looks[name]
            ax.plot(
                *zip(*points, strict=True),
                color=look.colour,
                marker=look.marker,
                linestyle=look.line,
                markersize=7,
                linewidth=1.6,
                label=rows[0]["label"],
            )


def save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    with results.writing(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def time_figure(data: dict, key: tuple, rows: list[dict], path: Path) -> Path:
    """Milliseconds against length, log-log, with the length from which flash is twice as fast."""
    figure, parts = panels(rows)
    for ax, part in parts:
        log_scale(ax.yaxis)
        lines(ax, data, part, lambda row: results.summary(row).time_ms)
        mark_crossover(ax, part)
    parts[0][0].set_ylabel(TIME)
    mark_missing(data, parts)
    figure.suptitle(f"{caption(key, rows)}\n{where(data)}", fontsize=10)
    return save(figure, path)


def mark_crossover(ax, rows: list[dict]) -> None:
    """A vertical line at the crossover; the panel's title, which nothing else can cover, says what it is."""
    length = crossover(rows)
    if length is None:
        return
    if length != NEVER:
        ax.axvline(length, color="#808080", linewidth=1, linestyle=(0, (6, 3)), zorder=0)
    when = "never" if length == NEVER else f"first at {length}"
    ax.set_title(f"{ax.get_title()}\nflash more than {FASTER:g}x faster: {when}", fontsize=9)


def does_not_fit(row: dict) -> bool:
    """Whether the row was not measured for lack of memory, found by prediction or by running out of it."""
    return row["status"] == "out of memory" or row["reason"].startswith("memory:")


def mark_missing(data: dict, parts: list[tuple]) -> None:
    """A hollow marker for each row that did not fit in memory, in a strip above the data of panels with one scale."""
    lost: dict[tuple, list[dict]] = {}
    for ax, part in parts:
        for row in part:
            if does_not_fit(row):
                lost.setdefault((ax, row["keys"]), []).append(row)
    if not lost:
        return
    labelled = {line.get_label() for ax, _ in parts for line in ax.get_lines()}
    looks, step = styles(data), 0.05
    strip = step * (max(map(len, lost.values())) + 1)  # its name stands below the markers
    first = parts[0][0]
    low, high = first.get_ylim()
    first.set_ylim(low, high * (high / low) ** (strip / (1 - strip)))
    first.set_yticks([tick for tick in first.get_yticks() if low <= tick <= high])
    for ax in dict.fromkeys(ax for ax, _ in lost):
        ax.axhspan(high, ax.get_ylim()[1], color="#f0f0f0", zorder=1.5)
        ax.text(0.02, 1 - strip, "does not fit in memory", transform=ax.transAxes, va="bottom", fontsize=8)
    for (ax, length), rows in lost.items():
        for index, row in enumerate(rows):
            look = looks[row["implementation"]]
            ax.plot(
                [length],
                [1 - step * (index + 0.75)],
                transform=ax.get_xaxis_transform(),
                marker=look.marker,
                markersize=7,
                markerfacecolor="none",
                markeredgecolor=look.colour,
                linestyle="none",
                label=None if row["label"] in labelled else row["label"],
            )
            labelled.add(row["label"])


def rate_figure(data: dict, key: tuple, rows: list[dict], path: Path) -> Path:
    """TFLOP/s (GFLOP/s where all are below one) against length."""
    figure, parts = panels(rows)
    rates = [results.summary(row).tflops for row in rows if results.measured(row)]
    small = max(rates) < 1
    highest = max(rates) * (1e3 if small else 1)
    for ax, part in parts:
        lines(
            ax,
            data,
            part,
            lambda row: None if not results.measured(row) else results.summary(row).tflops * (1e3 if small else 1),
        )
        ax.set_ylim(0, 1.05 * highest)  # one scale for both panels
    unit = "GFLOP/s" if small else "TFLOP/s"
    halved = ", causal counts half" if key[1] == "causal" else ""
    by = "device time" if any(row["device_times_s"] for row in rows) else "time of one call"
    parts[0][0].set_ylabel(f"{unit} (by {by}{halved})")
    figure.suptitle(f"{caption(key, rows)}\n{where(data)}", fontsize=10)
    return save(figure, path)


def memory_figure(data: dict, key: tuple, rows: list[dict], path: Path) -> Path:
    """Peak memory against length: measured, and predicted for the rows that did not run for lack of memory."""
    figure, parts = panels(rows)
    for ax, part in parts:
        log_scale(ax.yaxis)
        lines(ax, data, part, lambda row: row["peak_bytes"] / 2**20 if row.get("peak_bytes") else None)
        for name, own in by_implementation(part).items():
            look = styles(data)[name]
            predicted = [row for row in own if does_not_fit(row) and row.get("predicted_bytes")]
            measured = [row for row in own if row.get("peak_bytes")]
            if predicted:
                start = [(row["keys"], row["peak_bytes"] / 2**20) for row in measured[-1:]]
                points = start + [(row["keys"], row["predicted_bytes"] / 2**20) for row in predicted]
                xs, ys = zip(*points, strict=True)
                ax.plot(xs, ys, color=look.colour, linestyle=":", linewidth=1.2)
                ax.plot(
                    xs[len(start) :],
                    ys[len(start) :],
                    color=look.colour,
                    marker=look.marker,
                    markerfacecolor="none",
                    markersize=7,
                    linestyle="none",
                    label=None if measured else own[0]["label"],
                )
    ax = parts[0][0]
    ax.set_ylabel("peak memory of one call (MiB)")
    available = max((row.get("available_bytes") or 0 for row in rows), default=0)
    if any(map(does_not_fit, rows)):
        ax.axhline(available / 2**20, color="#808080", linewidth=1, linestyle=(0, (6, 3)))
        ax.text(0.02, available / 2**20, "available", transform=ax.get_yaxis_transform(), va="bottom", fontsize=8)
        ax.text(0.02, 0.97, "hollow, dotted: predicted,\nnot measured", transform=ax.transAxes, va="top", fontsize=8)
    figure.suptitle(f"{caption(key, rows)}\n{where(data)}", fontsize=10)
    return save(figure, path)


def error_figure(data: dict, key: tuple, rows: list[dict], path: Path) -> Path:
    """Error against time at the longest length that has the most rows: both smaller is better."""
    import matplotlib.pyplot as plt

    timed = [row for row in rows if results.measured(row) and row["error"] and not row["layer"]]
    lengths = sorted({row["keys"] for row in timed})
    length = max(lengths, key=lambda n: (sum(row["keys"] == n for row in timed), n))
    figure, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    for row in timed:
        if row["keys"] == length:
            look = styles(data)[row["implementation"]]
            ax.plot(
                [results.summary(row).time_ms],
                [row["error"]["rmse"] / row["error"]["bound"]],
                color=look.colour,
                marker=look.marker,
                markersize=9,
                linestyle="none",
                label=row["label"],
            )
    ax.axhline(1, color="#808080", linewidth=1, linestyle=(0, (6, 3)))
    ax.set_ylim(0, 1.1)
    log_scale(ax.xaxis)
    ax.text(0.02, 1.01, "the accuracy rule's limit", transform=ax.get_yaxis_transform(), va="bottom", fontsize=8)
    ax.set_xlabel(TIME)
    ax.set_ylabel("RMSE against float64 / allowed RMSE")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    figure.suptitle(f"length {length}: {caption(key, rows)}\n{where(data)}", fontsize=10)
    return save(figure, path)


def masks_figure(data: dict, alike: dict[tuple, list[dict]], path: Path) -> Path:
    """Milliseconds against length, one panel for each mask of a case, on one scale."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(alike), figsize=(1.8 + 3.8 * len(alike), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    shown = set()
    for ax, (key, rows) in zip(axes[0], alike.items(), strict=True):
        lines(ax, data, rows, lambda row: results.summary(row).time_ms)
        for line in ax.get_lines():  # one entry in the legend for each look
            if line.get_label() in shown:
                line.set_label("_")
            shown.add(line.get_label())
        lengths = sorted({row["keys"] for row in rows})
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{length}" for length in lengths])
        ax.minorticks_off()
        log_scale(ax.yaxis)
        ax.set_xlabel("sequence length")
        ax.set_title(", ".join([key[1], *(part for part in key[2:] if part != "forward")]), fontsize=9)
        mark_crossover(ax, rows)
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes[0][0].set_ylabel(TIME)
    mark_missing(data, list(zip(axes[0], alike.values(), strict=True)))
    first = next(iter(alike.values()))[0]
    figure.suptitle(f"{first['case']}: {first['heads']} heads of {first['head_dim']}\n{where(data)}", fontsize=10)
    return save(figure, path)


def counted(row: dict) -> bool:
    """Whether the profiler counted every byte of the row."""
    found = row.get("traffic")
    return bool(found) and "reason" not in found and not found["unknown"]


def bytes_figure(data: dict, key: tuple, rows: list[dict], path: Path) -> Path:
    """Bytes moved against length: requested, and DRAM by the model. Modelled, so hollow and dotted."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.6), sharey=True, layout="constrained")
    titles = ("requested by the kernels", "DRAM, from a cold cache (band: the model's interval)")
    lengths = sorted({row["keys"] for row in rows})
    for ax, title in zip(axes, titles, strict=True):
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{length}" for length in lengths])
        ax.minorticks_off()
        log_scale(ax.yaxis)
        ax.set_xlabel("sequence length")
        ax.set_title(title, fontsize=9)
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes[0].set_ylabel("moved by one call (GB, model)")
    for name, own in by_implementation(row for row in rows if counted(row)).items():
        look = styles(data)[name]
        drawn = {"color": look.colour, "linestyle": ":", "marker": look.marker, "markerfacecolor": "none"}
        keys = [row["keys"] for row in own]
        requested, low, high = (
            [row["traffic"][name] / 1e9 for row in own]
            for name in ("requested_bytes", "dram_low_bytes", "dram_high_bytes")
        )
        axes[0].plot(keys, requested, label=own[0]["label"], **drawn)
        axes[1].plot(keys, high, **drawn)
        axes[1].fill_between(keys, low, high, color=look.colour, alpha=0.2, linewidth=0)
    figure.suptitle(f"{caption(key, rows)}\n{where(data)}; modelled, not measured", fontsize=10)
    return save(figure, path)


def roofline_figure(data: dict, key: tuple, rows: list[dict], path: Path) -> Path:
    """Measured TFLOP/s over modelled operations per byte of DRAM traffic, under the device's two roofs."""
    import matplotlib.pyplot as plt

    known = [row for row in rows if counted(row) and results.measured(row) and row["traffic"]["bytes_per_s"]]
    facts = known[0]["traffic"]
    figure, ax = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
    for name, own in by_implementation(known).items():
        look = styles(data)[name]
        xs = [row["flops"] / row["traffic"]["dram_low_bytes"] for row in own]
        ys = [results.summary(row).tflops for row in own]
        ax.plot(xs, ys, color=look.colour, marker=look.marker, linestyle=look.line, label=own[0]["label"])
    log_scale(ax.xaxis)
    log_scale(ax.yaxis)
    low, high = ax.get_xlim()
    ridge = facts["peak_flops"] / facts["bytes_per_s"]
    low, high = min(low, ridge / 2), max(high, ridge * 2)
    roof = [(x, min(facts["peak_flops"], x * facts["bytes_per_s"]) / 1e12) for x in (low, ridge, high)]
    ax.plot(*zip(*roof, strict=True), color="#808080", linewidth=1.2, zorder=0)
    ax.set_xlabel("operations per byte of DRAM traffic (model)")
    ax.set_ylabel("TFLOP/s (measured)")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    figure.suptitle(f"{caption(key, rows)}\n{where(data)}; roofs: {facts['target']}", fontsize=10)
    return save(figure, path)


def main(argv: list[str]) -> int:
    """Draw a results file again: `python -m bench plot FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description="Draw a results file again.")
    parser.add_argument("folder", type=Path, help="a run's folder, or its results.json")
    arguments = parser.parse_args(argv)
    try:
        data = results.load(arguments.folder)
    except ValueError as error:
        parser.error(str(error))
    folder = arguments.folder if arguments.folder.is_dir() else arguments.folder.parent
    for path in draw(data, folder):
        print(path)
    return 0
