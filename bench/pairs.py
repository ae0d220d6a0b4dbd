"""The pairs of `python -m bench cpu`: torch's time over ours, as a table, sentences and a picture.

Design fact: reads results files only and imports neither jax nor torch, as `plot` does.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from pathlib import Path

from bench import plot, report, results

OURS, TORCH = "jaxattn-blockwise", "torch-sdpa-flash"
WINDOW = "window("


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One row of ours, with the repeats that count, and its torch row.

    ratios: torch's time over ours, pair by pair, of the pairs that count; share: of the product's rate.
    """

    row: dict
    ratios: tuple[float, ...]
    share: float

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None


def pairs(data: dict) -> list[Pairs]:
    """The rows of ours in a results file with their ratios to torch; a pair is undisturbed where both halves are."""
    least_s = results.least_control_s(data)
    torch = {results.key(row)[:-1]: row for row in data["rows"] if row["implementation"] == TORCH}
    found = []
    for row, counted in zip(data["rows"], results.counting(data), strict=True):
        if row["implementation"] == OURS and results.measured(row):
            beside = torch.get(results.key(row)[:-1], {})
            ratios: tuple[float, ...] = ()
            if results.measured(beside):
                every = [b / a for a, b in zip(row["times_s"], beside["times_s"], strict=False)]
                fine = zip(results.undisturbed(row, least_s), results.undisturbed(beside, least_s), strict=False)
                ratios = tuple(itertools.compress(every, results.chosen([a and b for a, b in fine])))
            rate = row["flops"] / statistics.median(counted["times_s"])
            found.append(Pairs(counted, ratios, rate / data["product_flops_per_s"]))
    return found


def table(data: dict) -> str:
    """The ratios as Markdown."""
    lines = [
        ("N, K, H", "mask", "dtype, direction", "T x S", "ours ms", "torch time / ours", "pairs", "of the product"),
        ("---", "---", "---", "---:", "---:", "---:", "---:", "---:"),
    ]
    for pair in pairs(data):
        row = pair.row
        low_high = f" ({min(pair.ratios):.2f} to {max(pair.ratios):.2f})" if pair.ratios else ""
        lines.append(
            (
                f"{row['heads']}, {row['kv_heads']}, {row['head_dim']}",
                row["mask"],
                f"{row['dtype']}, {'forward' if row['direction'] == 'forward' else 'forward + backward'}",
                f"{row['queries']} x {row['keys']}",
                report.number(results.summary(row).time_ms),
                f"{pair.ratio:.2f}{low_high}" if pair.ratios else "",
                str(len(pair.ratios) or len(row["times_s"])),
                f"{pair.share:.2f}" if row["dtype"] == "float32" else "",
            )
        )
    found = data["environment"]
    title = (
        f"{found['device_name']}, {data['settings']['threads']} threads, {data['date'][:10]}; JAX's product of "
        f"large float32 matrices: {report.number(data['product_flops_per_s'], 1e9)} GFLOP/s.\n\n"
    )
    return title + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def findings(data: dict) -> list[str]:
    """What a window saves against the whole causal mask, and how its time grows with the length."""
    times: dict[tuple[str, int], float] = {}
    rows = results.counting(data)
    (heads,) = {row["heads"] for row in rows if row["mask"].startswith(WINDOW)} or {None}
    for row in rows:
        alike = row["implementation"] == OURS and row["heads"] == heads and row["queries"] == row["keys"]
        if alike and (row["dtype"], row["direction"]) == ("float32", "forward") and results.measured(row):
            key = row["mask"], row["keys"]  # the causal mask is measured twice: the faster one counts
            times[key] = min(statistics.median(row["times_s"]), times.get(key, math.inf))
    window = {keys: time for (mask, keys), time in times.items() if mask.startswith(WINDOW)}
    sentences = [
        f"At {keys} tokens the window of 256 is {times['causal', keys] / time:.0f} times as fast as the causal mask."
        for keys, time in window.items()
        if ("causal", keys) in times
    ]
    if len(window) > 1:
        short, long = min(window), max(window)
        sentences.append(f"From {short} to {long} tokens its time grows {window[long] / window[short]:.2f}-fold.")
    return sentences


def markdown(data: dict, folder: str) -> str:
    """The table, the sentences and the picture, as the README shows them."""
    return "\n".join([table(data), *findings(data), "", f"![torch's time over ours]({folder}/pairs.png)", ""])


COLOURS = {"causal": "#d55e00", "full": "#0072b2"}
MARKERS = "osD^vP"


def draw(data: dict, path: Path) -> Path:
    """Torch's time over ours against the length, a panel for each dtype and direction; bars from least to most.

    Raises: ImportError where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[Pairs]] = {}
    for pair in pairs(data):
        row = pair.row
        if pair.ratios:
            kind = (
                "decoding" if row["queries"] < row["keys"] else row["direction"].replace("both", "forward + backward")
            )
            panels.setdefault(f"{row['dtype']}, {kind}", []).append(pair)
    figure, axes = plt.subplots(
        1, max(len(panels), 1), figsize=(2 + 2.9 * len(panels), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    shapes = list(dict.fromkeys(_shape(pair.row) for found in panels.values() for pair in found))
    shown = set()
    for ax, (title, found) in zip(axes[0], panels.items(), strict=False):
        lines: dict[tuple, dict[int, Pairs]] = {}
        for pair in found:  # what was measured in two parts is drawn once
            lines.setdefault((_shape(pair.row), pair.row["mask"]), {}).setdefault(pair.row["keys"], pair)
        for index, ((shape, mask), by_keys) in enumerate(lines.items()):
            line = [by_keys[keys] for keys in sorted(by_keys)]
            beside = 2 ** (0.05 * (index - (len(lines) - 1) / 2))  # so that bars do not hide each other
            label = f"{shape}, {mask}"
            ax.errorbar(
                [pair.row["keys"] * beside for pair in line],
                [pair.ratio for pair in line],
                yerr=[
                    [pair.ratio - min(pair.ratios) for pair in line],
                    [max(pair.ratios) - pair.ratio for pair in line],
                ],
                color=COLOURS[mask],
                marker=MARKERS[shapes.index(shape) % len(MARKERS)],
                linestyle="-" if mask == "causal" else "--",
                capsize=2,
                label=None if label in shown else label,
            )
            shown.add(label)
        lengths = sorted({pair.row["keys"] for pair in found})
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{length}" for length in lengths], fontsize=8)
        ax.minorticks_off()
        ax.margins(x=0.12)
        ax.axhline(1, color="#808080", linewidth=1, linestyle=(0, (6, 3)))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("keys" if "decoding" in title else "sequence length")
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ticks = [0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4]
    axes[0][0].set_yscale("log", base=2)
    low, high = axes[0][0].get_ylim()
    axes[0][0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0][0].set_ylim(low, high)
    axes[0][0].set_ylabel("torch's time / ours (above 1: ours is faster)")
    figure.suptitle(f"blockwise beside torch's flash attention\n{plot.where(data)}", fontsize=10)
    return plot.save(figure, path)


def _shape(row: dict) -> str:
    tokens = f"T={row['queries']}, " if row["queries"] < row["keys"] else ""
    return f"{tokens}N={row['heads']} K={row['kv_heads']} H={row['head_dim']}"
