"""`lab gqa`: one, several or all heads with keys and values of their own.

Design fact: the queries are the same for all; only the number of key/value heads differs, so what changes is what is
read and kept, not how much is computed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from bench import calculators
from bench.labs import lab, tasks
from bench.labs.measure import measure
from jaxattn import dot_product_attention, nn

GOOD = 0.98  # accuracy of what has learnt the toy task
PHASES = {"prefill": "all tokens attend", "decode": "one token attends to all before it"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq", type=lab.positive, default=1024, help="tokens (default 1024)")
    parser.add_argument("--d", type=lab.positive, default=64, help="head dim (default 64)")
    parser.add_argument("--heads", type=lab.positive, default=8, help="query heads (default 8)")
    parser.add_argument("--gqa-groups", type=lab.positive, default=4, help="key/value heads of GQA (default 4)")
    parser.add_argument(
        "--steps", type=lab.natural, default=150, help="of training on the toy task (default 150); 0 leaves it out"
    )


def check(options: argparse.Namespace) -> None:
    if options.heads % options.gqa_groups:
        raise ValueError(f"--heads {options.heads} must be a multiple of --gqa-groups {options.gqa_groups}")


def program(phase: str, seq: int, d: int, heads: int, kv_heads: int, seed: int):
    random = np.random.default_rng(seed)
    queries = 1 if phase == "decode" else seq
    query = random.standard_normal((1, queries, heads, d), np.float32)
    key, value = random.standard_normal((2, 1, seq, kv_heads, d), np.float32)
    attend = functools.partial(dot_product_attention, is_causal=phase == "prefill", implementation="blockwise")
    return attend, (query, key, value)


def cache_bytes(options: argparse.Namespace, kv_heads: int) -> int:
    """What the layer's own cache holds for the sequence, in bytes."""
    layer = nnx.eval_shape(
        lambda: nn.Attention(
            options.heads * options.d, options.heads, n_kv_heads=kv_heads, head_dim=options.d, rngs=nnx.Rngs(0)
        )
    )
    cache = jax.eval_shape(lambda: layer.init_cache(1, options.seq, dtype="float32"))
    return sum(x.size * x.dtype.itemsize for x in (cache.key, cache.value))


def run(options: argparse.Namespace) -> dict:
    kinds = {"MHA": options.heads, "GQA": options.gqa_groups, "MQA": 1}
    rows = []
    with lab.Steps(len(kinds) * (len(PHASES) + bool(options.steps))) as steps:
        for name, kv_heads in kinds.items():
            shared = {name: getattr(options, name) for name in ("seq", "d", "heads", "seed")} | {"kv_heads": kv_heads}
            found = measure("bench.labs.gqa:program", [{"phase": phase, **shared} for phase in PHASES])
            row = {"name": name, "kv_heads": kv_heads, "cache_bytes": cache_bytes(options, kv_heads)}
            for phase in PHASES:
                steps.start(f"{name}, {phase}")
                row[phase] = next(found)
            rows.append(row)
        for row in rows if options.steps else ():
            steps.start(f"{row['name']} learns to copy")
            trained = learn(row, options, steps.part)
            row["quality"] = {
                "accuracy": trained.accuracy,
                "losses": trained.losses.tolist(),
                "parameters": trained.size,
                "seconds": trained.seconds,
            }
    model = calculators.Model("this layer", 1, options.heads, options.heads, options.d, 0)
    formula = [calculators.kv_cache_bytes(options.seq, model, kv_heads=row["kv_heads"], item_bytes=4) for row in rows]
    return {"rows": rows, "claims": claims(rows, formula)}


def learn(row: dict, options: argparse.Namespace, progress) -> tasks.Trained:
    """The toy task with as many query heads per key/value head as the row has, of 8 small heads."""
    kv_heads = max(1, 8 * row["kv_heads"] // options.heads)
    variant = dataclasses.replace(tasks.VARIANTS["MHA"], name=row["name"], kv_heads=kv_heads)
    sizes = {"steps": options.steps, "length": 6, "d": 64, "layers": 2, "batch": 32}
    return tasks.train("copy", variant, **sizes, seed=options.seed, progress=progress)


def learnt(rows: list[dict]) -> list[dict]:
    """The claim about accuracy, where there was training."""
    scores = {row["name"]: row["quality"]["accuracy"] for row in rows if "quality" in row}
    if not scores:
        return []
    return [
        {
            "text": f"{', '.join(scores)} learn to copy: accuracy at least {GOOD}",
            "holds": min(scores.values()) >= GOOD,
            "found": ", ".join(f"{name} {score:.3f}" for name, score in scores.items()),
        }
    ]


def claims(rows: list[dict], formula: list[int]) -> list[dict]:
    measured = [row["cache_bytes"] for row in rows]
    asked = [row["decode"]["compulsory_bytes"] for row in rows]
    return [
        {
            "text": "the layer's cache is 2 x kv heads x head dim x tokens x 4 bytes",
            "holds": measured == formula,
            "found": f"{measured} bytes, by the formula {formula}",
        },
        {
            "text": "a decoding step must read fewer bytes, the fewer key/value heads there are",
            "holds": asked == sorted(asked, reverse=True) and (asked[0] > asked[-1] or rows[0]["kv_heads"] == 1),
            "found": ", ".join(map(lab.mebibytes, asked)),
        },
        *learnt(rows),
    ]


def tables(data: dict):
    rows = []
    for row in data["rows"]:
        for phase in PHASES:
            one = row[phase]
            rows.append(
                [
                    f"{row['name']}, {row['kv_heads']} kv heads, {phase}",
                    lab.milliseconds(one["time_s"]),
                    lab.mebibytes(one["rss_bytes"]),
                    lab.mebibytes(one["requested_bytes"]),
                    lab.mebibytes(one["compulsory_bytes"]),
                    lab.mebibytes(row["cache_bytes"]),
                ]
            )
    chosen = data["settings"]
    title = f"{chosen['heads']} heads of {chosen['d']}, {chosen['seq']} tokens, causal, blockwise"
    yield lab.table(title, ["", "time", "peak RSS", "requested", "in + out, once", "KV cache"], rows)
    if chosen["steps"]:
        rows = [
            [
                row["name"],
                f"{one['accuracy']:.3f}",
                f"{one['losses'][-1]:.4f}",
                f"{one['parameters']:,}",
                f"{one['seconds']:.0f} s",
            ]
            for row in data["rows"]
            for one in [row["quality"]]
        ]
        title = f"copying 6 symbols after {chosen['steps']} steps, 8 query heads with as many heads a group"
        yield lab.table(title, ["", "accuracy", "last loss", "parameters", "training"], rows)


def draw(data: dict, path: Path) -> Path:
    figure, axes = lab.picture(1, 4, 13, 3.6)
    rows = data["rows"]
    names = [f"{row['name']}\n{row['kv_heads']} kv" for row in rows]
    colours = [lab.STYLES[row["name"]].colour for row in rows]
    panels = (
        ("KV cache (MiB)", [row["cache_bytes"] / 2**20 for row in rows]),
        ("decoding one token (ms, median)", [row["decode"]["time_s"] * 1e3 for row in rows]),
        ("decoding: bytes in + out (MiB)", [row["decode"]["compulsory_bytes"] / 2**20 for row in rows]),
    )
    for ax, (label, values) in zip(axes[0], panels, strict=False):
        bars = ax.bar(names, values, color=colours, width=0.6)
        ax.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8)
        ax.margins(y=0.12)
        ax.set_ylabel(label)
    ax = axes[0, 3]
    for row in rows:
        if "quality" in row:
            look, losses = lab.STYLES[row["name"]], row["quality"]["losses"]
            ax.plot(losses, color=look.colour, linestyle=look.line, label=row["name"])
            ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("loss, copying 6 symbols")
    if data["settings"]["steps"]:
        ax.legend(frameon=False, fontsize=9)
    chosen = data["settings"]
    title = f"Fewer key/value heads: {chosen['heads']} query heads of {chosen['d']}, {chosen['seq']} tokens"
    return lab.save_picture(figure, title, data, path)


def see(data: dict) -> tuple[str, str]:
    all_heads, _, one = data["rows"]
    prefill = [row["prefill"]["time_s"] for row in (all_heads, one)]
    quality = learnt(data["rows"])
    end = "."
    if quality:
        end = f"; accuracy on the toy task: {quality[0]['found']}."
        if quality[0]["holds"]:
            end = "; the toy task is learnt with any number of them."
    return (
        f"the cache shrinks from {lab.mebibytes(all_heads['cache_bytes'])} to {lab.mebibytes(one['cache_bytes'])}, and "
        "with it what each decoded token must read.",
        f"prefill does the same arithmetic for all: {' and '.join(map(lab.milliseconds, prefill))}{end}",
    )
