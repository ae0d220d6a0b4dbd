"""`lab linear`: one sum in three orders, random features against exact attention, and what decoding must keep.

Design fact: the three forms of causal linear attention compute the same numbers; they differ in what exists at once.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench.labs import lab
from bench.labs.measure import measure_outputs
from jaxattn import dot_product_attention
from jaxattn.linear import FORMS, EluPlusOne, PositiveRandomFeatures, linear_attention

DRAWS = 16  # of random features, for the mean error
SHORTEST = 512
COUNTS = (64, 128, 256, 512, 1024, 2048)
AGREE = 1e-4  # of the largest output: the forms add up in another order


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq", type=lab.positive, default=2048, help="longest length (default 2048); a half and a quarter before"
    )
    parser.add_argument("--d", type=lab.positive, default=64, help="head dim (default 64)")
    parser.add_argument("--heads", type=lab.positive, default=4, help="heads (default 4)")


def check(options: argparse.Namespace) -> None:
    if options.seq % 4 or options.seq < SHORTEST:
        raise ValueError(
            f"--seq {options.seq} must be a multiple of 4 and at least {SHORTEST}: its half and quarter "
            "are measured too, and hold a chunk"
        )


def program(form: str, seq: int, heads: int, d: int, seed: int):
    arrays = tuple(np.random.default_rng(seed).standard_normal((3, 1, seq, heads, d), np.float32))
    return functools.partial(linear_attention, feature_map=EluPlusOne(), is_causal=True, form=form), arrays


def run(options: argparse.Namespace) -> dict:
    lengths = [options.seq // 4, options.seq // 2, options.seq]
    shared = {name: getattr(options, name) for name in ("heads", "d", "seed")}
    rows, expected = [], {}
    with lab.Steps(len(FORMS) * len(lengths) + len(COUNTS)) as steps:
        for form in FORMS:
            cases = [{"form": form, "seq": seq, **shared} for seq in lengths]
            found = measure_outputs("bench.labs.linear:program", cases, profile="last")
            for seq in lengths:
                steps.start(f"{form}, length {seq}")
                row, (out,) = next(found)
                exact = expected.setdefault(seq, out)
                rows.append(row | {"difference": float(np.abs(out - exact).max() / np.abs(exact).max())})
        errors = features(options, steps)
    rate = lab.exponent([row["features"] for row in errors], [row["error"] for row in errors])
    found = {"rows": rows, "errors": errors, "rate": rate, "cache": cache(options, lengths)}
    return found | {"claims": claims(rows, rate)}


def features(options: argparse.Namespace, steps: lab.Steps) -> list[dict]:
    """Relative error of positive random features against softmax attention, by their number."""
    random = np.random.default_rng(options.seed)
    d = min(options.d, 8)  # short vectors: the variance grows as exp(|q + k|^2), and hides the rate
    query, key, value = (jnp.asarray(random.standard_normal((1, 64, 2, d), np.float32)) for _ in range(3))
    query, key = 0.35 * query, 0.35 * key
    exact = dot_product_attention(query, key, value, implementation="naive")

    @jax.jit
    def squared_error(projection):
        out = linear_attention(query, key, value, feature_map=PositiveRandomFeatures(projection))
        return jnp.mean((out - exact) ** 2) / jnp.mean(exact**2)

    found = []
    for count in COUNTS:
        steps.start(f"{count} random features")
        projections = [PositiveRandomFeatures.orthogonal(key, count, d).projection for key in keys(options.seed)]
        found.append({"features": count, "error": float(np.sqrt(np.mean([squared_error(w) for w in projections])))})
    return found


def keys(seed: int) -> list[jax.Array]:
    return [jax.random.fold_in(jax.random.key(seed), draw) for draw in range(DRAWS)]


def cache(options: argparse.Namespace, lengths: list[int]) -> list[dict]:
    """Bytes that decoding keeps of the past: the state, and the keys and values of full attention."""
    state = 4 * options.heads * (options.d**2 + options.d)
    return [{"seq": seq, "state": state, "kv": 2 * 4 * seq * options.heads * options.d} for seq in lengths]


def of(form: str, rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["form"] == form]


def growth(form: str, rows: list[dict]) -> float:
    """The power of the length that a form's temporaries grow with."""
    own = of(form, rows)
    return lab.exponent([row["seq"] for row in own], [row["temporaries_bytes"] for row in own])


def claims(rows: list[dict], rate: float) -> list[dict]:
    worst = max(row["difference"] for row in rows)
    return [
        {
            "text": f"parallel, chunked and recurrent agree to {AGREE:g} of the largest output",
            "holds": worst <= AGREE,
            "found": f"{worst:.1e}",
        },
        {
            "text": "the error of random features falls as one over the root of their number",
            "holds": -0.65 < rate < -0.4,
            "found": f"features^{rate:.2f}",
        },
        {
            "text": "chunked memory grows as the length, parallel memory as its square",
            "holds": growth("chunked", rows) < 1.2 and growth("parallel", rows) > 1.6,
            "found": f"n^{growth('chunked', rows):.2f} and n^{growth('parallel', rows):.2f}",
        },
    ]


def tables(data: dict):
    rows = []
    for form in FORMS:
        last = of(form, data["rows"])[-1]
        rows.append(
            [
                form,
                lab.milliseconds(last["time_s"]),
                lab.mebibytes(last["rss_bytes"]),
                lab.mebibytes(last["temporaries_bytes"]),
                f"n^{growth(form, data['rows']):.2f}",
                lab.mebibytes(last["requested_bytes"]),
                f"{last['difference']:.1e}",
            ]
        )
    chosen = data["settings"]
    title = f"causal linear attention, {chosen['heads']} heads of {chosen['d']}, {chosen['seq']} tokens"
    columns = ["", "time", "peak RSS", "temp", "temp grows as", "requested", "differs from parallel"]
    yield lab.table(title, columns, rows)
    rows = [[row["features"], f"{row['error']:.3f}"] for row in data["errors"]]
    title = f"positive orthogonal random features: error falls as features^{data['rate']:.2f}"
    yield lab.table(title, ["features", "relative error"], rows)


def draw(data: dict, path: Path) -> Path:
    figure, axes = lab.picture(1, 3, 13, 4.2)
    for form in FORMS:
        rows = of(form, data["rows"])
        lengths = [row["seq"] for row in rows]
        lab.line(axes[0, 0], form, lengths, [row["time_s"] * 1e3 for row in rows], label=form)
    lab.length_axes(axes[0, 0], lengths, "time of one call (ms, median)")
    ax = axes[0, 1]
    for key, name, label in (("kv", "full", "keys and values (full attention)"), ("state", "linear", "state (linear)")):
        lab.line(ax, name, lengths, [row[key] / 1024 for row in data["cache"]], label=label, modelled=True)
    lab.length_axes(ax, lengths, "kept for decoding (KiB, by formula)")
    ax.legend(frameon=False, fontsize=8)
    ax = axes[0, 2]
    counts, errors = zip(*((row["features"], row["error"]) for row in data["errors"]), strict=True)
    lab.line(ax, "linear", counts, errors, label="random features")
    theory = [errors[0] * (counts[0] / n) ** 0.5 for n in counts]
    ax.plot(counts, theory, color="#808080", linestyle=":", label="falling as 1 / root of F")
    ax.legend(frameon=False, fontsize=8)
    lab.length_axes(ax, list(counts), "relative error against softmax attention")
    ax.set_xlabel("random features F")
    axes[0, 0].legend(frameon=False, fontsize=8)
    chosen = data["settings"]
    return lab.save_picture(figure, f"Linear attention: {chosen['heads']} heads of {chosen['d']}", data, path)


def see(data: dict) -> tuple[str, str]:
    kept = data["cache"][-1]
    return (
        "three orders of one sum: parallel holds all pairs, recurrent one state, chunked is parallel inside a chunk "
        f"and recurrent between chunks; decoding keeps {lab.mebibytes(kept['state'])} at any length, not "
        f"{lab.mebibytes(kept['kv'])}.",
        f"random features come nearer to softmax as features^{data['rate']:.2f}: by theory ten times nearer costs a "
        "hundred times the features.",
    )
