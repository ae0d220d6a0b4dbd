"""`lab complexity`: how time and memory of each kind of attention grow with length.

Design fact: each kind runs in one process, the lengths in rising order; the exponents are fitted to what was measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import calculators
from bench.labs import lab
from bench.labs.measure import measure
from jaxattn.impl.loops import MOST_SCORES

KINDS = ("loops", "naive", "blockwise", "window", "linear")
DOUBLINGS = 3
FITTED = 3  # the longest lengths: there what grows fastest outweighs what a call costs anyway

NEAR = 0.25  # how far a fitted exponent may lie from the one that is claimed


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq", type=lab.positive, default=4096, help=f"longest length (default 4096); {DOUBLINGS} halvings before"
    )
    parser.add_argument("--d", type=lab.positive, default=64, help="head dim (default 64)")
    parser.add_argument("--heads", type=lab.positive, default=1, help="heads (default 1)")


def check(options: argparse.Namespace) -> None:
    if options.seq % (1 << DOUBLINGS) or options.seq < 128:
        raise ValueError(f"--seq {options.seq} must be a multiple of {1 << DOUBLINGS} and at least 128")
    if options.heads * 16 > MOST_SCORES // 16:
        raise ValueError(f"--heads {options.heads} must be at most {MOST_SCORES // 256}: loops are for tiny sizes")


def lengths_of(kind: str, options: argparse.Namespace) -> list[int]:
    longest = options.seq
    while kind == "loops" and options.heads * longest**2 > MOST_SCORES:
        longest //= 2
    return [longest >> i for i in reversed(range(DOUBLINGS + 1))]


def run(options: argparse.Namespace) -> dict:
    shared = {name: getattr(options, name) for name in ("heads", "d", "seed")}
    rows = []
    with lab.Steps(len(KINDS) * (DOUBLINGS + 1)) as steps:
        for kind in KINDS:
            cases = [{"name": kind, "seq": seq, **shared} for seq in lengths_of(kind, options)]
            found = measure("bench.labs.patterns:program", cases, profile="last")
            for case in cases:
                steps.start(f"{kind}, length {case['seq']}")
                rows.append(next(found))
    fitted = {kind: exponents(of(kind, rows)) for kind in KINDS}
    return {"rows": rows, "exponents": fitted, "claims": claims(fitted, options)}


def claims(fitted: dict[str, dict[str, float]], options: argparse.Namespace) -> list[dict]:
    """The exponents of memory; none where inputs and outputs are larger than a tile or a matrix of scores."""
    if options.seq >> (FITTED - 1) < 2 * options.d:
        return []
    found = {kind: f"n^{fitted[kind]['memory']:.2f}" for kind in ("naive", "window", "linear")}
    return [
        {
            "text": "the memory of naive attention grows as the square of the length",
            "holds": abs(fitted["naive"]["memory"] - 2) <= NEAR,
            "found": found["naive"],
        },
        {
            "text": "that of a window and of linear attention at most as the length",
            "holds": all(fitted[kind]["memory"] <= 1 + NEAR for kind in ("window", "linear")),
            "found": f"{found['window']} and {found['linear']}",
        },
    ]


def of(kind: str, rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["name"] == kind]


def memory(row: dict) -> int:
    """What one call allocates, by the compiler: temporaries and output."""
    return row["temporaries_bytes"] + row["output_bytes"]


def exponents(rows: list[dict]) -> dict[str, float]:
    """The powers of the length that time and memory grow with."""
    longest = rows[-FITTED:]
    lengths = [row["seq"] for row in longest]
    return {
        "time": lab.exponent(lengths, [min(row["times_s"]) for row in longest]),
        "memory": lab.exponent(lengths, [memory(row) for row in longest]),
    }


def tables(data: dict):
    rows = []
    for kind in KINDS:
        last, fitted = of(kind, data["rows"])[-1], data["exponents"][kind]
        rows.append(
            [
                kind,
                f"{fitted['time']:.2f}",
                f"{fitted['memory']:.2f}",
                last["seq"],
                lab.milliseconds(last["time_s"]),
                lab.mebibytes(last["rss_bytes"]),
                lab.mebibytes(memory(last)),
                lab.mebibytes(last["requested_bytes"]),
            ]
        )
    columns = ["", "time ~ n^", "memory ~ n^", "at length", "time", "peak RSS", "temp + output", "requested"]
    yield lab.table(f"growth over the {FITTED} longest lengths", columns, rows)
    lengths, d = (128, 512, 1024, 2048, 4096), data["settings"]["d"]
    rows = [
        [
            n,
            lab.mebibytes(calculators.score_bytes(n, item_bytes=4)),
            f"{calculators.multiply_adds(n, d) / 1e9:.4g} G",
            f"{calculators.attention_flops(n, d) / 1e9:.4g} GFLOP",
            f"{calculators.attention_flops(n, d, causal=True) / 1e9:.4g} GFLOP",
        ]
        for n in lengths
    ]
    columns = ["n", "scores, float32", "multiply-adds of one product", "both products", "causal"]
    yield lab.table(f"by formula (python -m bench calculate), one head of {d}", columns, rows)


def draw(data: dict, path: Path) -> Path:
    figure, axes = lab.picture(1, 2, 10, 4.4)
    every = sorted({row["seq"] for row in data["rows"]})
    for kind in KINDS:
        rows, fitted = of(kind, data["rows"]), data["exponents"][kind]
        xs = [row["seq"] for row in rows]
        label = f"{kind}: time n^{fitted['time']:.1f}, memory n^{fitted['memory']:.1f}"
        lab.line(axes[0, 0], kind, xs, [row["time_s"] * 1e3 for row in rows], label=label)
        lab.line(axes[0, 1], kind, xs, [memory(row) / 2**20 for row in rows])
    lab.length_axes(axes[0, 0], every, "time of one call (ms, median)")
    lab.length_axes(axes[0, 1], every, "temporaries + output (MiB)")
    for ax in axes[0]:
        ax.tick_params(axis="x", labelrotation=45)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    chosen = data["settings"]
    heads = "1 head" if chosen["heads"] == 1 else f"{chosen['heads']} heads"
    return lab.save_picture(figure, f"Cost against length: {heads} of {chosen['d']}", data, path)


def see(data: dict) -> tuple[str, str]:
    time, memory_ = (
        {kind: f"n^{fitted[what]:.1f}" for kind, fitted in data["exponents"].items()} for what in ("time", "memory")
    )
    return (
        f"naive's memory grows as {memory_['naive']}, blockwise's as {memory_['blockwise']}: tiling changes memory, "
        "not the number of operations.",
        f"window and linear attention do less: time {time['window']} and {time['linear']}, against "
        f"{time['blockwise']} of full attention.",
    )
