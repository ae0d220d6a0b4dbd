"""`lab checkpoint`: what each block keeps for the backward pass, against the time to compute it again.

Design fact: one model, one loss, one set of tokens; only the policy given to `jax.checkpoint` differs, and the
gradients of all are compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from bench.labs import lab
from bench.labs.measure import measure_outputs
from bench.labs.model import first_parameters, small_model
from bench.plot import Style

VOCAB, HEADS = 256, 4
LARGEST_DIFFERENCE = 2e-6  # of each gradient's largest value
POLICIES = {
    "keep everything": None,
    "keep matrix products": jax.checkpoint_policies.dots_saveable,
    "keep attention's output": jax.checkpoint_policies.save_only_these_names("context"),
    "recompute everything": jax.checkpoint_policies.nothing_saveable,
}
LOOKS = dict(
    zip(
        POLICIES,
        (Style("#404040", "o"), Style("#d55e00", "s"), Style("#56b4e9", "D"), Style("#4b0082", "^")),
        strict=True,
    )
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=lab.positive, default=6, help="blocks of the model (default 6)")
    parser.add_argument("--seq", type=lab.positive, default=512, help="tokens of a sequence (default 512)")
    width = f"model width, a multiple of {2 * HEADS} (default 128)"
    parser.add_argument("--d", type=lab.positive, default=128, help=width)
    parser.add_argument("--batch", type=lab.positive, default=4, help="sequences (default 4)")
    implementation = "of attention (default blockwise)"
    choices = ("naive", "blockwise")
    parser.add_argument("--implementation", choices=choices, default="blockwise", help=implementation)


def check(options: argparse.Namespace) -> None:
    if options.d % (2 * HEADS):
        raise ValueError(f"--d {options.d} must be a multiple of {2 * HEADS}: {HEADS} heads of even size")


def program(layers: int, seq: int, d: int, batch: int, implementation: str, policy: str, seed: int):
    graph, shapes = small_model(
        vocab=VOCAB,
        d=d,
        layers=layers,
        heads=HEADS,
        implementation=implementation,
        remat=POLICIES[policy],
    )
    parameters = first_parameters(shapes, seed)
    tokens = np.random.default_rng(seed).integers(VOCAB, size=(batch, seq + 1), dtype=np.int32)

    def loss(parameters, tokens):
        logits = nnx.merge(graph, parameters)(tokens[:, :-1])
        picked = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -picked.mean()

    return jax.value_and_grad(loss), (jax.tree.map(np.asarray, parameters), tokens)


def run(options: argparse.Namespace) -> dict:
    shared = {name: getattr(options, name) for name in ("layers", "seq", "d", "batch", "implementation", "seed")}
    rows, kept = [], None
    with lab.Steps(len(POLICIES)) as steps:
        cases = [{"policy": policy, **shared} for policy in POLICIES]
        found = measure_outputs("bench.labs.checkpoint:program", cases, repeats=5, enough_s=4.0)
        for policy in POLICIES:
            steps.start(policy)
            row, (loss, *gradients) = next(found)
            kept = gradients if kept is None else kept
            row["loss"] = float(loss)
            row["gradient_difference"] = difference(gradients, kept)
            again = [kernel for kernel in row.pop("kernels") if "rematted_computation" in kernel["scope"]]
            row["recomputed"] = {
                "kernels": len(again),
                "calls": sum(kernel["calls"] for kernel in again),
                "bytes": sum(kernel["bytes"] for kernel in again),
                "flops": sum(kernel["flops"] for kernel in again),
            }
            rows.append(row)
    return {"rows": rows, "claims": claims(rows)}


def difference(gradients: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference of any gradient, relative to that gradient's largest value; 0 for zeros that agree."""
    tiny = np.finfo(np.float32).tiny  # with one key no logit has a gradient
    pairs = zip(gradients, expected, strict=True)
    return max(float(np.abs(ours - other).max() / max(np.abs(other).max(), tiny)) for ours, other in pairs)


def claims(rows: list[dict]) -> list[dict]:
    everything, nothing = rows[0], rows[-1]
    worst = max(row["gradient_difference"] for row in rows)
    return [
        {
            "text": f"gradients differ by at most {LARGEST_DIFFERENCE:g} of their largest value",
            "holds": worst <= LARGEST_DIFFERENCE,
            "found": f"{worst:.1e}",
        },
        {
            "text": "recomputing everything needs less temporary memory than keeping everything",
            "holds": nothing["temporaries_bytes"] < everything["temporaries_bytes"],
            "found": f"{lab.mebibytes(nothing['temporaries_bytes'])} against "
            f"{lab.mebibytes(everything['temporaries_bytes'])}",
        },
    ]


def tables(data: dict):
    rows = [
        [
            row["policy"],
            lab.milliseconds(row["time_s"]),
            lab.mebibytes(row["rss_bytes"]),
            lab.mebibytes(row["temporaries_bytes"]),
            lab.mebibytes(row["requested_bytes"]),
            f"{row['recomputed']['calls']}",
            f"{row['recomputed']['flops'] / 1e9:.3g} G",
            f"{row['gradient_difference']:.1e}",
        ]
        for row in data["rows"]
    ]
    columns = ["per block", "time", "peak RSS", "temp", "requested", "run again", "flops again", "gradients differ"]
    yield lab.table(title(data), columns, rows)


def title(data: dict) -> str:
    chosen = data["settings"]
    return (
        f"loss and gradients: {chosen['layers']} layers of width {chosen['d']}, batch {chosen['batch']} x "
        f"{chosen['seq']} tokens, {chosen['implementation']} attention"
    )


def draw(data: dict, path: Path) -> Path:
    figure, axes = lab.picture(1, 1, 6.4, 4.4)
    ax = axes[0, 0]
    for row in data["rows"]:
        look, y = LOOKS[row["policy"]], row["time_s"] * 1e3
        for key, filled in (("temporaries_bytes", False), ("rss_bytes", True)):
            ax.plot(
                [row[key] / 2**20],
                [y],
                linestyle="none",
                marker=look.marker,
                markersize=10,
                color=look.colour,
                markerfacecolor=look.colour if filled else "none",
                label=row["policy"] if filled else None,
            )
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1.15e3 * max(row["time_s"] for row in data["rows"]))
    ax.set_xlabel("memory (MiB): filled peak RSS above start, hollow XLA's temporaries")
    ax.set_ylabel("time of one training step (ms, median)")
    ax.grid(True, color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return lab.save_picture(figure, title(data).replace(", batch", "\nbatch"), data, path)


def see(data: dict) -> tuple[str, str]:
    everything, nothing = data["rows"][0], data["rows"][-1]
    return (
        f"keeping nothing but each block's input takes {lab.mebibytes(nothing['temporaries_bytes'])} instead of "
        f"{lab.mebibytes(everything['temporaries_bytes'])}, for {nothing['time_s'] / everything['time_s']:.2f} times "
        "the time; the gradients are the same.",
        f"what comes back is the forward pass: {nothing['recomputed']['calls']} kernels run again, "
        f"{nothing['recomputed']['flops'] / 1e9:.3g} G operations; the policies between keep some of it.",
    )
