"""`lab flash`: tiled attention with an online softmax against the dense definition.

Design fact: both are `dot_product_attention` on the same inputs; only `implementation` differs.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench.labs import lab
from bench.labs.measure import measure
from jaxattn import Blockwise, Causal, Full, dot_product_attention
from jaxattn.tiles import plan

TIMED = ("naive", "blockwise")
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_ERROR = 1e-5  # between the two in float32, inputs normal


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq", type=lab.positive, default=1024, help="shortest length (default 1024); 2x and 4x follow"
    )
    parser.add_argument("--d", type=lab.positive, default=64, help="head dim (default 64)")
    parser.add_argument("--heads", type=lab.positive, default=4, help="heads (default 4)")
    parser.add_argument("--block", type=lab.positive, default=256, help="tokens a side of a tile (default 256)")
    parser.add_argument("--full", action="store_true", help="no causal mask")


def check(options: argparse.Namespace) -> None:
    if options.block > options.seq:
        raise ValueError(f"--block {options.block} must be at most --seq {options.seq}")


def operands(seq: int, heads: int, d: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(np.random.default_rng(seed).standard_normal((3, 1, seq, heads, d), np.float32))


def implementation(name: str, block: int):
    return Blockwise(block_q=block, block_k=block) if name == "blockwise" else name


def program(seq: int, heads: int, d: int, causal: bool, name: str, block: int, seed: int):
    attend = functools.partial(dot_product_attention, is_causal=causal, implementation=implementation(name, block))
    return attend, operands(seq, heads, d, seed)


def run(options: argparse.Namespace) -> dict:
    lengths = [options.seq * factor for factor in (1, 2, 4)]
    shared = {"heads": options.heads, "d": options.d, "causal": not options.full}
    shared |= {"block": options.block, "seed": options.seed}
    rows = []
    with lab.Steps(len(TIMED) * len(lengths) + len(DTYPES)) as steps:
        for name in TIMED:
            cases = [{"name": name, "seq": seq, **shared} for seq in lengths]
            found = measure("bench.labs.flash:program", cases)
            for case in cases:
                steps.start(f"{name}, length {case['seq']}")
                rows.append(next(found))
        errors = []
        for dtype in DTYPES:
            steps.start(f"error in {dtype}")
            errors.append(error(dtype, options))
    tiles = [{"seq": seq, **visited(seq, options.block, not options.full)} for seq in lengths]
    return {"rows": rows, "errors": errors, "tiles": tiles, "claims": claims(rows, errors)}


def error(dtype: str, options: argparse.Namespace) -> dict:
    """Largest differences at the shortest length: of the two, and of each from float64 on the same inputs."""
    arrays = [jnp.asarray(x, dtype) for x in operands(options.seq, options.heads, options.d, options.seed)]
    attend = functools.partial(dot_product_attention, is_causal=not options.full)
    naive, blockwise = (
        np.asarray(attend(*arrays, implementation=implementation(name, options.block)), np.float64) for name in TIMED
    )
    with jax.enable_x64(True):
        exact = np.asarray(attend(*(x.astype(jnp.float64) for x in arrays), implementation="naive"))
    return {
        "dtype": dtype,
        "difference": np.abs(blockwise - naive).max(),
        "naive": np.abs(naive - exact).max(),
        "blockwise": np.abs(blockwise - exact).max(),
    }


def visited(seq: int, block: int, causal: bool) -> dict:
    """Tiles that one head visits, and all that there are."""
    tiles = plan(Causal() if causal else Full(), seq, seq, block, block)
    return {"visited": tiles.visited, "tiles": int(np.prod(tiles.codes.shape[-2:]))}


def claims(rows: list[dict], errors: list[dict]) -> list[dict]:
    found = [
        {
            "text": f"in float32 blockwise and naive differ by at most {LARGEST_ERROR:g}",
            "holds": bool(errors[0]["difference"] <= LARGEST_ERROR),
            "found": f"{errors[0]['difference']:.1e}",
        }
    ]
    for naive in rows:
        if naive["name"] == "naive" and naive["seq"] >= 4096:
            ours = next(r for r in rows if r["name"] == "blockwise" and r["seq"] == naive["seq"])
            for what, show, text in (("rss_bytes", lab.mebibytes, "memory"), ("time_s", lab.milliseconds, "time")):
                found.append(
                    {
                        "text": f"at length {naive['seq']} blockwise takes at most naive's {text}",
                        "holds": ours[what] <= naive[what],
                        "found": f"{show(ours[what])} against {show(naive[what])}",
                    }
                )
    return found


def tables(data: dict):
    rows = [
        [
            row["name"],
            row["seq"],
            lab.milliseconds(row["time_s"]),
            lab.mebibytes(row["rss_bytes"]),
            lab.mebibytes(row["temporaries_bytes"]),
            lab.mebibytes(row["requested_bytes"]),
            lab.mebibytes(row["dram_bytes"][0]),
            f"{tiles['visited']} of {tiles['tiles']}" if row["name"] == "blockwise" else "",
        ]
        for row in data["rows"]
        for tiles in data["tiles"]
        if tiles["seq"] == row["seq"]
    ]
    columns = ["", "length", "time", "peak RSS", "temp", "requested", "DRAM (model)", "tiles"]
    yield lab.table(f"one call, {data['settings']['heads']} heads of {data['settings']['d']}", columns, rows)
    rows = [[e["dtype"], *(f"{e[key]:.1e}" for key in ("naive", "blockwise", "difference"))] for e in data["errors"]]
    columns = ["dtype", "naive from float64", "blockwise from float64", "blockwise from naive"]
    yield lab.table(f"largest error at length {data['settings']['seq']}", columns, rows)


def draw(data: dict, path: Path) -> Path:
    figure, axes = lab.picture(1, 3, 12, 3.9)
    lengths = [tiles["seq"] for tiles in data["tiles"]]
    for name in TIMED:
        rows = [row for row in data["rows"] if row["name"] == name]
        lab.line(axes[0, 0], name, lengths, [row["time_s"] * 1e3 for row in rows], label=name)
        lab.line(axes[0, 1], name, lengths, [max(row["rss_bytes"], 1 << 12) / 2**20 for row in rows])
    lab.length_axes(axes[0, 0], lengths, "time of one call (ms, median)")
    lab.length_axes(axes[0, 1], lengths, "peak RSS above start (MiB)")
    ax, errors = axes[0, 2], data["errors"]
    for shift, name in ((-0.2, "naive"), (0.2, "blockwise")):
        hatch = "//" if name == "naive" else None
        colour = lab.STYLES[name].colour
        ax.bar([i + shift for i in range(len(errors))], [e[name] for e in errors], 0.38, color=colour, hatch=hatch)
    ax.set_yscale("log")
    ax.set_xticks(range(len(errors)), [e["dtype"] for e in errors])
    ax.set_ylabel(f"largest error from float64, {lengths[0]} tokens")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    mask = "causal" if not data["settings"]["full"] else "no mask"
    heads = f"{data['settings']['heads']} heads of {data['settings']['d']}"
    return lab.save_picture(figure, f"Flash (blockwise) against baseline (naive): {heads}, {mask}", data, path)


def see(data: dict) -> tuple[str, str]:
    naive, ours = (next(r for r in reversed(data["rows"]) if r["name"] == name) for name in TIMED)
    tiles = data["tiles"][-1]
    return (
        f"naive keeps every score: at {naive['seq']} tokens {lab.mebibytes(naive['rss_bytes'])} against "
        f"{lab.mebibytes(ours['rss_bytes'])}, and {naive['time_s'] / ours['time_s']:.1f} times the time; the error is "
        "the same, set by the dtype.",
        f"of {tiles['tiles']} tiles {tiles['visited']} are visited: a causal mask leaves "
        f"{1 - tiles['visited'] / tiles['tiles']:.0%} of the work undone.",
    )
