"""`python -m bench traffic`: bytes moved per call against sequence length, naive attention against tiled.

Design fact: from compiled programs only. No attention is run and no score array is ever allocated, so lengths
that fit no memory are counted like any other. Everything here is modelled or counted, nothing measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

from bench import environment, plot
from bench import results as result_files

LENGTHS = (1024, 4096, 16384)
BATCH, HEADS, HEAD_DIM, DTYPE = 1, 8, 64, "bfloat16"
LABELS = {"naive": "naive (scores in memory)", "blockwise": "blockwise (tiled, plain XLA)", "triton": "Pallas kernel"}
WHY_XLA_WRITES = "XLA writes each tile of scores out between kernels; most of it stays in the cache"
CPU_SAYS_LITTLE = "Traffic of a CPU's program says little about a GPU's: fusion, tiles and caches differ."
ROOT = Path(__file__).parent.parent


def default_target() -> str | None:
    """The device that is there if it is a GPU, else `h200` where the compile wheels are, else the CPU."""
    import jax

    from jaxattn.profiler.compile import find_wheels

    if jax.default_backend() in ("gpu", "cuda"):
        return None
    try:
        find_wheels()
    except FileNotFoundError:
        return None
    return "h200"


def traffic_results(target: str | None = None, lengths=LENGTHS, wheels=None, say=lambda text: None) -> dict:
    """Bytes that causal self-attention moves, by implementation and length.

    Args:
        target: a GPU that need not be there, e.g. `h200`; None for the default device.
        lengths: sequence lengths.
        wheels: folder of the compile wheels, for a target.
        say: called with a line before each program is compiled.

    Returns:
        JSON-ready values; sizes in bytes. A program that could not be compiled has a `reason` and no figures.

    Raises:
        FileNotFoundError: for a target without compile wheels, with the command that installs them.
    """
    import jax

    from jaxattn import profiler
    from jaxattn.profiler import targets
    from jaxattn.profiler.compile import find_wheels

    if target is not None:
        targets.get(target)
        find_wheels(wheels)
    device = jax.devices()[0]
    facts = targets.get(target) if target else targets.here(device.platform, device.device_kind)
    rows = []
    for length in lengths:
        for name in LABELS:
            say(f"{LABELS[name]}, length {length}")
            row = {"implementation": f"jaxattn-{name}", "label": LABELS[name], "keys": length}
            shape = jax.ShapeDtypeStruct((BATCH, length, HEADS, HEAD_DIM), DTYPE)
            try:
                report = profiler.profile(_attention(name, target), shape, shape, shape, target=target, wheels=wheels)
            except (ImportError, NotImplementedError, RuntimeError) as error:
                rows.append(row | {"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"})
                continue
            cold = report.dram.cold
            rows.append(
                row
                | {
                    "requested": {"read": report.requested.read, "written": report.requested.written},
                    "dram": {
                        side: {"low": part.low, "high": part.high}
                        for side, part in (("read", cold.read), ("written", cold.written))
                    },
                    "compulsory": report.compulsory.total,
                    "peak": report.peak_bytes,
                    "launches": report.launches,
                    "flops": report.flops,
                    "unknown": list(report.unknown),
                    "notes": list(report.notes),
                }
            )
    return {
        "kind": "traffic",
        "schema": 1,
        "target": facts.slug,
        "target_name": facts.name,
        "cache_bytes": facts.l2_bytes,
        "is_cpu": facts.platform == "cpu",
        "is_here": target is None,
        "shape": {"batch": BATCH, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": DTYPE, "mask": "causal"},
        "versions": environment.versions(),
        "commit": environment.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }


def _attention(name: str, target: str | None):
    import jax

    import jaxattn

    implementation = name
    if name == "triton" and (target is not None or jax.default_backend() not in ("gpu", "cuda")):
        from jaxattn.impl.triton import Triton

        implementation = Triton(platform="cuda")  # compiled or counted here, run nowhere

    def attention(q, k, v):
        return jaxattn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return attention


def total(row: dict, what: str, end: str = "low") -> int:
    """Read + written bytes of a row: `requested`, or one end of the model's interval of `dram`."""
    parts = row[what]
    if what == "requested":
        return parts["read"] + parts["written"]
    return sum(p["low"] for p in parts.values()) if end == "low" else sum(p["high"] for p in parts.values())


def table(data: dict) -> str:
    """The figures as text, each tiled implementation's ratio to naive beside them, and what they are not."""
    lines = [heading(data), ""]
    form = "{:>7}  {:<30}{:>12}{:>26}{:>12}{:>14}{:>10}"
    lines.append(
        form.format("length", "", "requested", "DRAM, cold cache (model)", "vs naive", "DRAM vs naive", "launches")
    )
    for length in sorted({row["keys"] for row in data["rows"]}):
        rows = {row["implementation"]: row for row in data["rows"] if row["keys"] == length}
        naive = rows.get("jaxattn-naive", {})
        for row in rows.values():
            if "reason" in row:
                lines.append(f"{length:>7}  {row['label']:<30}{row['reason']}")
                continue
            low, high = total(row, "dram"), total(row, "dram", "high")
            dram = _bytes(low) if _bytes(low) == _bytes(high) else f"{_bytes(low)} to {_bytes(high)}"
            ratios = ["", ""]
            if row is not naive and "requested" in naive:
                ratios = [f"{total(naive, w) / max(total(row, w), 1):.3g}x" for w in ("requested", "dram")]
            cells = [length, row["label"], _bytes(total(row, "requested")), dram, *ratios, row["launches"]]
            lines.append(form.format(*cells))
            lines += [f"{'':>9}UNKNOWN, in no figure: {text}" for text in row["unknown"]]
    lines += [
        "",
        f"'vs naive': how many times fewer bytes. Where blockwise asks for more than naive: {WHY_XLA_WRITES}.",
    ]
    if data["is_cpu"]:
        lines.append(CPU_SAYS_LITTLE)
    return "\n".join(lines)


def heading(data: dict) -> str:
    """What was compiled for what."""
    shape = data["shape"]
    what = f"batch {shape['batch']}, {shape['heads']} heads of {shape['head_dim']}, {shape['dtype']}, {shape['mask']}"
    where = "this machine's " if data["is_here"] else ""
    absent = "" if data["is_here"] else " (no GPU was used)"
    return f"Bytes moved by one attention call, compiled for {where}{data['target_name']}{absent}: {what}"


def figure(data: dict, path: Path) -> Path:
    """Draws the picture from `traffic_results` alone: requested left, DRAM (model) right, against length.

    Raises: ImportError where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 2, figsize=(11, 5.4), sharey=True, layout="constrained")
    rows = [row for row in data["rows"] if "reason" not in row]
    lengths = sorted({row["keys"] for row in rows})
    for ax, what in zip(axes, ("requested", "dram"), strict=True):
        for name, own in plot.by_implementation(rows).items():
            look = plot.STYLES[name]
            keys = [row["keys"] for row in own]
            low = [total(row, what) for row in own]
            hollow = {"marker": look.marker, "markerfacecolor": "none", "markersize": 9}
            label = own[0]["label"] if what == "requested" else None
            ax.plot(keys, low, color=look.colour, linestyle=look.line, label=label, **hollow)
            if what == "dram":
                ax.fill_between(keys, low, [total(r, what, "high") for r in own], color=look.colour, alpha=0.3)
        floor = {row["keys"]: row["compulsory"] for row in rows}
        label = "inputs + output, once" if what == "requested" else None
        ax.plot(lengths, [floor[n] for n in lengths], color="#808080", linestyle=(0, (1, 2)), label=label)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.minorticks_off()
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
        ax.set_xlabel("sequence length")
    axes[0].set_ylabel("bytes per call")
    units = {1e6: "1 MB", 1e7: "10 MB", 1e8: "100 MB", 1e9: "1 GB", 1e10: "10 GB", 1e11: "100 GB", 1e12: "1 TB"}
    lowest, highest = axes[0].get_ylim()
    shown = {at: text for at, text in units.items() if lowest <= at <= highest}
    axes[0].set_yticks(list(shown), list(shown.values()))
    axes[0].set_title("asked of the memory system by all kernels\n(counted from the compiled program)", fontsize=10)
    cache = _bytes(data["cache_bytes"])
    axes[1].set_title(f"crossing DRAM, from a cold cache\n(modelled, with a cache of {cache})", fontsize=10)
    _annotate(axes[1], rows, lengths)
    title = heading(data).replace(": ", "\n", 1)
    if data["is_cpu"]:
        title += f"\n{CPU_SAYS_LITTLE}\nFor a GPU's: python -m jaxattn.profiler wheels, then python -m bench traffic"
    drawn.suptitle(title, fontsize=11)
    drawn.legend(loc="outside lower center", ncols=4, frameon=False)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


def _annotate(ax, rows: list[dict], lengths: list[int]) -> None:
    """How many times fewer bytes the kernel moves than naive, at the greatest length."""
    last = {row["implementation"]: row for row in rows if row["keys"] == lengths[-1]}
    if "jaxattn-naive" not in last or "jaxattn-triton" not in last:
        return
    high, low = (total(last[f"jaxattn-{name}"], "dram") for name in ("naive", "triton"))
    ax.annotate(
        "", (lengths[-1], low * 1.25), (lengths[-1], high / 1.25), arrowprops={"arrowstyle": "<->", "color": "0.3"}
    )
    middle = (low * high) ** 0.5
    ax.annotate(
        f"{high / low:.0f}x", (lengths[-1], middle), (-8, 0), textcoords="offset points", ha="right", va="center"
    )


def write(data: dict, folder: Path) -> list[Path]:
    """Saves `traffic.json`, `traffic.txt` and, where matplotlib is there, `traffic.png`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "traffic.json", folder / "traffic.txt"]
    result_files.write_text(paths[0], json.dumps(data, indent=1) + "\n")
    result_files.write_text(paths[1], table(data) + "\n")
    try:
        paths.append(figure(data, folder / "traffic.png"))
    except ImportError as error:
        print(f"No figure: {error}. Install with pip install -e '.[bench]'", file=sys.stderr)
    return paths


def _bytes(n: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return f"{n:.0f} B"


def main(argv: list[str]) -> int:
    """Compile naive, blockwise and kernel attention, count their bytes, save table and picture."""
    parser = argparse.ArgumentParser(prog="python -m bench traffic", description=main.__doc__)
    parser.add_argument("--target", help="a GPU that need not be there: h200, h100, a100, l4, t4, b200")
    parser.add_argument("--here", action="store_true", help="the default device, even if it is a CPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="T")
    parser.add_argument("--wheels", type=Path, help="folder of the compile wheels")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw the picture of an earlier result again")
    arguments = parser.parse_args(argv)
    if arguments.draw:
        print(figure(json.loads(arguments.draw.read_text()), arguments.draw.with_suffix(".png")))
        return 0
    from rich.console import Console

    target = arguments.target or (None if arguments.here else default_target())
    console = Console(stderr=True)
    try:
        with console.status("compiling") as status:
            data = traffic_results(target, tuple(arguments.lengths), arguments.wheels, say=status.update)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.UTC)
    folder = arguments.out or ROOT / "bench/results/runs" / f"{now:%Y%m%dT%H%M%SZ}-traffic-{data['target']}"
    print(table(data))
    for path in write(data, folder):
        print(path)
    return 1 if all("reason" in row for row in data["rows"]) else 0
