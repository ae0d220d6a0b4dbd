"""`lab sparse`: published sparse patterns and linear attention against full attention, on the same inputs.

Design fact: theory is drawn beside what was measured: the operations on allowed pairs, at the rate that full attention
reaches, and the scores of allowed pairs, as a dense implementation would hold them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from bench.labs import lab, patterns
from bench.labs.measure import measure_outputs

LONG = 1024  # from here on lengths outweigh tiles
KINDS = ("full", "naive", "window", "dilated", "bigbird", "longformer", "linear")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq", type=lab.positive, default=2048, help="longest length (default 2048); 128, 256, ... before it"
    )
    parser.add_argument("--d", type=lab.positive, default=64, help="head dim (default 64)")
    parser.add_argument("--heads", type=lab.positive, default=8, help="heads (default 8)")


def check(options: argparse.Namespace) -> None:
    if options.seq < 4 * patterns.WINDOW:
        raise ValueError(
            f"--seq {options.seq} must be at least {4 * patterns.WINDOW}: shorter, BigBird sees everything"
        )


def run(options: argparse.Namespace) -> dict:
    lengths = [128]
    while lengths[-1] * 2 <= options.seq:
        lengths.append(lengths[-1] * 2)
    shared = {name: getattr(options, name) for name in ("heads", "d", "seed")}
    rows, exact = [], {}
    with lab.Steps(len(KINDS) * len(lengths)) as steps:
        for kind in KINDS:
            cases = [{"name": kind, "seq": seq, **shared} for seq in lengths]
            found = measure_outputs("bench.labs.patterns:program", cases, profile="last")
            for seq in lengths:
                steps.start(f"{kind}, length {seq}")
                row, (out,) = next(found)
                exact.setdefault(seq, out)
                rows.append(row | theory(kind, seq, options) | {"error": relative_error(out, exact[seq])})
    return {"rows": rows, "claims": claims(rows)}


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference over that of full attention's output."""
    return float(np.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2)))


def theory(kind: str, seq: int, options: argparse.Namespace) -> dict:
    """Share of pairs allowed; operations and bytes of what must be computed, all heads."""
    if kind == "linear":  # the state, phi(k)^T v, made once and read once by every query
        flops = 4 * seq * options.d**2 * options.heads
        return {"density": None, "theory_flops": flops, "theory_bytes": 4 * options.d**2 * options.heads}
    mask = patterns.mask(kind, seq)
    pairs = seq**2 if mask is None else int(np.asarray(mask.to_array(seq, seq)).sum())
    flops = 4 * pairs * options.d * options.heads
    return {"density": pairs / seq**2, "theory_flops": flops, "theory_bytes": 4 * pairs * options.heads}


def at_last(rows: list[dict]) -> dict[str, dict]:
    longest = max(row["seq"] for row in rows)
    return {row["name"]: row for row in rows if row["seq"] == longest}


def growth(kind: str, rows: list[dict]) -> float:
    """The power of the length that a kind's temporaries grow with, over the three longest."""
    own = [row for row in rows if row["name"] == kind][-3:]
    return lab.exponent([row["seq"] for row in own], [row["temporaries_bytes"] for row in own])


def claims(rows: list[dict]) -> list[dict]:
    last = at_last(rows)
    sparse = {kind: last[kind]["density"] for kind in ("window", "bigbird", "longformer", "dilated")}
    found = [
        {
            "text": "every sparse pattern allows fewer pairs than full attention",
            "holds": all(density < last["full"]["density"] for density in sparse.values()),
            "found": ", ".join(f"{kind} {density:.1%}" for kind, density in sparse.items()),
        }
    ]
    if last["full"]["seq"] < LONG:
        return found
    grown = {kind: growth(kind, rows) for kind in ("naive", "full", *sparse, "linear")}
    return [
        *found,
        {
            "text": "naive attention's memory grows as the square of the length, that of all others as the length",
            "holds": all(power > 1.8 if kind == "naive" else power < 1.2 for kind, power in grown.items()),
            "found": ", ".join(f"{kind} n^{power:.2f}" for kind, power in grown.items()),
        },
    ]


def tables(data: dict):
    last = at_last(data["rows"])
    rows = [
        [
            kind,
            lab.milliseconds(row["time_s"]),
            f"{last['full']['time_s'] / row['time_s']:.2f}x",
            "" if row["density"] is None else f"{row['density']:.1%}",
            f"{row['error']:.2f}",
            lab.mebibytes(row["rss_bytes"]),
            lab.mebibytes(row["temporaries_bytes"]),
            lab.mebibytes(row["requested_bytes"]),
        ]
        for kind, row in last.items()
    ]
    columns = ["", "time", "speed", "pairs allowed", "error", "peak RSS", "temp", "requested"]
    chosen = data["settings"]
    length = last["full"]["seq"]
    title = f"{chosen['heads']} heads of {chosen['d']}, {length} tokens, window {patterns.WINDOW}; error: RMS from full"
    yield lab.table(title, columns, rows)


def draw(data: dict, path: Path) -> Path:
    figure, axes = lab.picture(1, 2, 11, 5)
    lengths = sorted({row["seq"] for row in data["rows"]})
    full = at_last(data["rows"])["full"]
    rate = full["theory_flops"] / full["time_s"]
    for kind in KINDS:
        rows = [row for row in data["rows"] if row["name"] == kind]
        lab.line(axes[0, 0], kind, lengths, [row["time_s"] * 1e3 for row in rows], label=kind)
        lab.line(axes[0, 1], kind, lengths, [row["temporaries_bytes"] / 2**20 for row in rows])
        theories = (
            [row["theory_flops"] / rate * 1e3 for row in rows],
            [row["theory_bytes"] / 2**20 for row in rows],
        )
        for ax, values in zip(axes[0], theories, strict=True):
            lab.line(ax, kind, lengths, values, modelled=True)
    lab.length_axes(axes[0, 0], lengths, "time of one call (ms, median)")
    lab.length_axes(axes[0, 1], lengths, "memory (MiB)")
    axes[0, 0].set_title("filled: measured; hollow: operations on allowed pairs, at full attention's rate", fontsize=9)
    axes[0, 1].set_title("filled: temporaries of one call; hollow: scores of allowed pairs", fontsize=9)
    figure.legend(loc="outside lower center", ncols=7, frameon=False)
    chosen = data["settings"]
    return lab.save_picture(figure, f"Sparse and linear: {chosen['heads']} heads of {chosen['d']}", data, path)


def see(data: dict) -> tuple[str, str]:
    last = at_last(data["rows"])
    window, full = last["window"], last["full"]
    return (
        f"at {full['seq']} tokens the window allows {window['density']:.1%} of the pairs and runs "
        f"{full['time_s'] / window['time_s']:.1f} times as fast: whole tiles are saved, not single pairs, so theory "
        "promises more; dilated keys are spread over all tiles of their band.",
        "the error is that of leaving keys out (or of another kernel, for linear) on random inputs, where every key "
        "matters alike; a trained model looks mostly near, where a window keeps what counts.",
    )
