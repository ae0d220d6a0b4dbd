"""`lab anatomy`: attention step by step on four tokens, then every mask as a picture.

Design fact: each step is a line of NumPy that a reader can redo by hand; the last line compares with the library.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np

import jaxattn
from bench import masks
from bench.labs import lab
from bench.labs.measure import measure

LOGITS = (2.1, 3.5, 1.8, 2.9)
AGREE = 1e-6


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq", type=lab.positive, default=4, help="tokens of the steps (default 4)")
    parser.add_argument("--d", type=lab.positive, default=8, help="head dim (default 8)")
    parser.add_argument("--heads", type=lab.positive, default=2, help="heads (default 2)")


def check(options: argparse.Namespace) -> None:
    if options.seq > 16:
        raise ValueError(f"--seq {options.seq} must be at most 16: its weights are printed")


def program(name: str, seq: int, d: int, heads: int, seed: int):
    return functools.partial(jaxattn.dot_product_attention, is_causal=True), inputs(seq, d, heads, seed)


def inputs(seq: int, d: int, heads: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(np.random.default_rng(seed).standard_normal((3, 1, seq, heads, d), np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(x) / sum exp(x) over the last axis, the largest taken off first."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def run(options: argparse.Namespace) -> dict:
    T, H = options.seq, options.d
    shared = {name: getattr(options, name) for name in ("seq", "d", "heads", "seed")}
    [cost] = measure("bench.labs.anatomy:program", [{"name": "dot_product_attention", **shared}])
    query, key, value = inputs(**shared)
    scores = np.einsum("btnh,bsnh->bnts", query, key)
    scaled = scores / np.sqrt(H)
    masked = np.where(np.tri(T, dtype=bool), scaled, -np.inf)
    weights = softmax(masked)
    output = np.einsum("bnts,bsnh->btnh", weights, value)
    steps = [
        {"step": text, "shape": list(array.shape)}
        for text, array in (
            ("query [B, T, N, H]", query),
            ("key, value [B, S, K, H]", key),
            ("scores = q . k, for every pair [B, N, T, S]", scores),
            ("scaled by 1 / sqrt(H)", scaled),
            ("masked: -inf where s > t", masked),
            ("weights = softmax over keys", weights),
            ("output = sum of weights x values [B, T, N, H]", output),
        )
    ]
    theirs = np.asarray(jaxattn.dot_product_attention(query, key, value, is_causal=True))
    row = first_row()
    sums = weights.sum(-1)
    patterns = {
        name: {key: mask.stats(64, 64, 8)[key] for key in ("density", "flops_saved")}
        for name, mask in masks.patterns(64, 8).items()
    }
    return {
        "steps": steps,
        "weights": weights[0, 0].tolist(),
        "row_sums": sums[0].tolist(),
        "first_row": {"logits": list(LOGITS), "unmasked": softmax(np.array(LOGITS)).tolist(), "masked": row.tolist()},
        "patterns": patterns,
        "cost": cost,
        "claims": [
            {
                "text": "every row of weights sums to 1",
                "holds": bool(np.abs(sums - 1).max() <= AGREE),
                "found": f"{np.abs(sums - 1).max():.1e} off",
            },
            {
                "text": f"the first of four tokens turns {list(LOGITS)} into [1, 0, 0, 0]",
                "holds": row.tolist() == [1, 0, 0, 0],
                "found": str(row.tolist()),
            },
            {
                "text": "the steps give what the library gives",
                "holds": bool(np.abs(output - theirs).max() <= AGREE * 10),
                "found": f"{np.abs(output - theirs).max():.1e}",
            },
        ],
    }


def first_row() -> np.ndarray:
    """The library's weights of the first of four causal queries whose logits are LOGITS: q = 1, keys = the logits."""
    key = np.array(LOGITS, np.float32).reshape(1, 4, 1, 1)
    return np.asarray(jaxattn.attention_weights(np.ones_like(key), key, is_causal=True, scale=1.0))[0, 0, 0]


def tables(data: dict):
    rows = [[step["step"], " x ".join(map(str, step["shape"]))] for step in data["steps"]]
    yield lab.table("step by step", ["step", "shape"], rows)
    rows = [
        [f"query {t}", *(f"{w:.3f}" for w in row), f"{total:.6f}"]
        for t, (row, total) in enumerate(zip(data["weights"], data["row_sums"][0], strict=True))
    ]
    columns = ["head 0", *(f"key {s}" for s in range(len(rows))), "row sum"]
    yield lab.table("causal weights", columns, rows)
    yield lab.cost_table("all of it by the library, in a process of its own", [data["cost"]])
    first = data["first_row"]
    rows = [
        ["logits", *(f"{x:g}" for x in first["logits"])],
        ["weights, all keys", *(f"{x:.3f}" for x in first["unmasked"])],
        ["weights, causal", *(f"{x:g}" for x in first["masked"])],
    ]
    yield lab.table("the first token sees only itself", ["", *(f"key {s}" for s in range(4))], rows)
    rows = [[name, f"{s['density']:.1%}", f"{s['flops_saved']:.0%}"] for name, s in data["patterns"].items()]
    yield lab.table("patterns at 64 tokens, tiles of 8", ["", "pairs allowed", "tiles skipped"], rows)


def draw(data: dict, path: Path) -> Path:
    masks.draw(64, 8, path)
    return path


def see(data: dict) -> tuple[str, str]:
    return (
        "scores are the only array with both T and S; every row of weights sums to 1, and a masked key gets exactly 0.",
        "a tile that a pattern leaves white is never computed: that is all that sparse attention saves.",
    )
