"""`lab heads`: what each head of a trained model looks at, in pictures and numbers.

Design fact: weights come from the layers' own projections and rotation, through `attention_weights`, so what is drawn
is what the model computes; a user's Llama-family checkpoint is looked at in the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.labs import lab, tasks
from bench.labs.measure import measure
from bench.labs.model import first_parameters
from bench.labs.tasks import VARIANTS
from jaxattn import attention_weights, llama

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
MOST_SHARES = (1, 2, 4, 8)
MOST_TOKENS = 256
SIZES = {"d": 64, "layers": 2}
MOST_LAYERS, MOST_HEADS = 4, 8  # drawn
LAYER_LOOKS = (("#404040", "o", "-"), ("#d55e00", "s", "--"), ("#56b4e9", "D", "-."), ("#4b0082", "^", ":"))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=tasks.TASKS, default="copy", help="to train on (default copy)")
    parser.add_argument("--steps", type=lab.positive, default=200, help="of training (default 200)")
    parser.add_argument("--length", type=lab.positive, default=7, help="symbols or facts in a sequence (default 7)")
    parser.add_argument("--checkpoint", type=Path, help="a Llama-family folder to look at instead")
    parser.add_argument("--tokens", type=int, nargs="+", help="token ids for --checkpoint (default 0 to 31)")


def check(options: argparse.Namespace) -> None:
    if options.length > tasks.KEYS:
        raise ValueError(f"--length {options.length} must be at most {tasks.KEYS}")
    if options.tokens and not options.checkpoint:
        raise ValueError("--tokens goes with --checkpoint: the toy task makes its own")
    if options.checkpoint and not (options.checkpoint / "config.json").is_file():
        raise ValueError(f"--checkpoint {options.checkpoint}: no config.json in it")
    if options.tokens and options.checkpoint:
        vocabulary = llama.LlamaConfig.from_folder(options.checkpoint).vocab_size
        wrong = [token for token in options.tokens if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"--tokens {wrong[0]} must be from 0 to {vocabulary - 1}, the checkpoint's vocabulary")
    if options.tokens and len(options.tokens) > MOST_TOKENS:
        raise ValueError(f"--tokens: {len(options.tokens)} of them; at most {MOST_TOKENS} can be drawn")


def run(options: argparse.Namespace) -> dict:
    with lab.Steps(3) as steps:
        steps.start("loading the checkpoint" if options.checkpoint else f"learning to {options.task}")
        if options.checkpoint:
            graph, parameters = loaded(options.checkpoint)
            tokens = np.array(options.tokens or range(min(32, parameters["embedding"].shape[0])), np.int32)
            accuracy = None
        else:
            sizes = SIZES | {"batch": 32, "steps": options.steps, "length": options.length}
            trained = tasks.train(options.task, VARIANTS["MHA"], **sizes, seed=options.seed, progress=steps.part)
            graph, parameters, accuracy = trained.graph, trained.parameters, trained.accuracy
            tokens = tasks.examples(options.task, 1, options.length, options.seed + 1).tokens[0]
        steps.start("looking at its heads")
        weights, entropies = look(graph, parameters, tokens)
        steps.start("the model on these tokens, measured")
        case = {"name": "logits of these tokens", "tokens": tokens.tolist(), "seed": options.seed}
        case["checkpoint"] = str(options.checkpoint) if options.checkpoint else None
        [cost] = measure("bench.labs.heads:program", [case])
    heads = [
        {"layer": layer, "head": head, **measures(weights[layer, head])}
        for layer, head in np.ndindex(weights.shape[:2])
    ]
    drawn = weights[:MOST_LAYERS, :MOST_HEADS]
    return {
        "tokens": tokens.tolist(),
        "dtype": str(parameters["embedding"].dtype),
        "accuracy": accuracy,
        "heads": heads,
        "temperatures": dict(zip(map(str, TEMPERATURES), entropies, strict=True)),
        "weights": np.round(drawn, 4).tolist(),
        "cost": cost,
        "claims": claims(weights, entropies),
    }


def program(name: str, tokens: list[int], checkpoint: str | None, seed: int):
    """The model's logits for one sequence; the toy model with weights as they were before training."""
    if checkpoint:
        graph, parameters = loaded(Path(checkpoint))
    else:
        graph, shapes = tasks.graph_of(VARIANTS["MHA"], **SIZES)
        parameters = first_parameters(shapes, seed)
    arguments = jax.tree.map(np.asarray, parameters), np.array([tokens], np.int32)
    return lambda parameters, tokens: nnx.merge(graph, parameters)(tokens), arguments


def loaded(folder: Path) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(llama.load(llama.LlamaConfig.from_folder(folder), llama.Safetensors(folder)))


def look(graph, parameters, tokens: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Weights [layers, N, T, T] of every head, and the mean entropy of all by softmax temperature."""
    model = nnx.merge(graph, parameters)
    block, stacked = nnx.split(model.blocks)
    x = model.embedding[...][tokens][None]
    x = x.astype(model.dtype or x.dtype)
    found, entropies = [], np.zeros(len(TEMPERATURES))

    @jax.jit
    def one_layer(x, parameters):
        layer = nnx.merge(block, parameters)
        stages = layer.attention.stages(layer.attention_norm(x))
        scale = layer.attention.scale or stages.query.shape[-1] ** -0.5
        options = {"mask": layer.attention.mask, "logits_soft_cap": layer.attention.logits_soft_cap}
        weights = [
            attention_weights(stages.rotated_query, stages.rotated_key, scale=scale / temperature, **options)[0]
            for temperature in TEMPERATURES
        ]
        return layer(x), jnp.stack(weights)

    for index in range(model.n_layers):
        x, weights = one_layer(x, jax.tree.map(lambda p, index=index: p[index], stacked))
        weights = np.asarray(weights)
        found.append(weights[TEMPERATURES.index(1.0)])
        entropies += entropy(weights).mean((1, 2))
    return np.stack(found), (entropies / model.n_layers).tolist()


def entropy(weights: np.ndarray) -> np.ndarray:
    """-sum w log2 w over the last axis, in bits; 0 for one key, log2 S for all alike."""
    return -np.sum(weights * np.log2(np.where(weights > 0, weights, 1)), axis=-1)


def measures(weights_TS: np.ndarray) -> dict:
    """Of one head: median distance and mean entropy of its queries, mass of the previous token and the k largest keys.

    kind: "previous token" where that has most of the mass; "local" where the distance is below half of that of a
    uniform causal head; "global" where the entropy is above three quarters of a uniform one's; else "content".
    """
    T = len(weights_TS)
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    uniform = np.tri(T) / np.arange(1, T + 1)[:, None]
    distance, usual = (float(np.median((w * (t - s)).sum(-1))) for w in (weights_TS, uniform))
    bits, most_bits = float(entropy(weights_TS).mean()), float(entropy(uniform).mean())
    previous = float(np.diagonal(weights_TS, -1).mean()) if T > 1 else 0.0
    ordered = -np.sort(-weights_TS, axis=-1)
    kind = "content"
    if previous > 0.5:
        kind = "previous token"
    elif distance < usual / 2:
        kind = "local"
    elif bits > 0.75 * most_bits:
        kind = "global"
    shares = {str(k): float(ordered[:, :k].sum(-1).mean()) for k in MOST_SHARES}
    return {"distance": distance, "entropy_bits": bits, "previous": previous, "top": shares, "kind": kind}


def claims(weights: np.ndarray, entropies: list[float]) -> list[dict]:
    off = float(np.abs(weights.sum(-1) - 1).max())
    return [
        {"text": "every row of weights sums to 1", "holds": off < 1e-5, "found": f"{off:.1e} off"},
        {
            "text": "the hotter the softmax, the higher the entropy",
            "holds": entropies == sorted(entropies),
            "found": ", ".join(f"{bits:.2f}" for bits in entropies),
        },
    ]


def tables(data: dict):
    rows = [
        [
            f"layer {head['layer']} head {head['head']}",
            head["kind"],
            f"{head['distance']:.1f}",
            f"{head['entropy_bits']:.2f}",
            f"{head['previous']:.2f}",
            *(f"{share:.2f}" for share in head["top"].values()),
        ]
        for head in data["heads"]
    ]
    columns = ["", "kind", "distance", "entropy (bits)", "previous", *(f"top {k}" for k in MOST_SHARES)]
    learnt = "" if data["accuracy"] is None else f"; the model answers {data['accuracy']:.1%} right"
    yield lab.table(f"what each head looks at, {len(data['tokens'])} tokens{learnt}", columns, rows)
    yield lab.cost_table(f"the model, {len(data['tokens'])} tokens, in a process of its own", [data["cost"]])
    rows = [[temperature, f"{bits:.2f}"] for temperature, bits in data["temperatures"].items()]
    yield lab.table("mean entropy of all heads by softmax temperature", ["temperature", "bits"], rows)


def draw(data: dict, path: Path) -> Path:
    weights = np.array(data["weights"])
    layers, heads, T, _ = weights.shape
    figure = lab.canvas(4.6 + 1.25 * heads, max(4.8, 1.2 + 1.65 * layers))
    left, right = figure.subfigures(1, 2, width_ratios=(0.9 + 1.25 * heads, 3.7))
    axes = left.subplots(layers, heads, squeeze=False)
    kinds = {(head["layer"], head["head"]): head["kind"] for head in data["heads"]}
    for (layer, head), ax in np.ndenumerate(axes):
        image = ax.imshow(weights[layer, head], cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(f"{layer}.{head}\n{kinds[layer, head]}", fontsize=8)
        ax.set_xticks([0, T - 1])
        ax.set_yticks([0, T - 1])
        ax.tick_params(labelbottom=layer == layers - 1, labelleft=head == 0, length=2, labelsize=7)
    left.supxlabel("key (token)", fontsize=9)
    left.supylabel("query (token)", fontsize=9)
    left.colorbar(image, ax=axes, location="right", shrink=0.7, aspect=30, label="weight")
    upper, lower = right.subplots(2, 1)
    temperatures = [float(t) for t in data["temperatures"]]
    upper.plot(temperatures, list(data["temperatures"].values()), color="#404040", marker="o")
    upper.set_xscale("log", base=2)
    upper.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
    upper.set_ylim(bottom=0)
    upper.set_xlabel("softmax temperature")
    upper.set_ylabel("mean entropy (bits)")
    for layer, (colour, marker, line) in zip(range(layers), LAYER_LOOKS, strict=False):
        shares = [list(head["top"].values()) for head in data["heads"] if head["layer"] == layer]
        mean = np.mean(shares, axis=0)
        lower.plot(MOST_SHARES, mean, color=colour, marker=marker, linestyle=line, label=f"layer {layer}")
    lower.set_xscale("log", base=2)
    lower.set_xticks(MOST_SHARES, MOST_SHARES)
    lower.set_ylim(0, 1.05)
    lower.set_xlabel("largest keys, k")
    lower.set_ylabel("share of mass in them")
    lower.legend(frameon=False, fontsize=8)
    chosen = data["settings"]
    what = (
        Path(chosen["checkpoint"]).resolve().name
        if chosen["checkpoint"]
        else f"a model of width {SIZES['d']} trained on {chosen['task']}"
    )
    return lab.save_picture(
        figure, f"Attention of each head (layer.head, kind): {what}", data, path, dtype=data["dtype"]
    )


def see(data: dict) -> tuple[str, str]:
    kinds: dict[str, int] = {}
    for head in data["heads"]:
        kinds[head["kind"]] = kinds.get(head["kind"], 0) + 1
    sharpest = min(data["heads"], key=lambda head: head["entropy_bits"])
    return (
        f"heads found: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; the sharpest is layer "
        f"{sharpest['layer']} head {sharpest['head']}: {sharpest['top']['1']:.0%} of its mass lies on one key.",
        f"from temperature {TEMPERATURES[0]:g} to {TEMPERATURES[-1]:g} the mean entropy goes from "
        f"{data['temperatures'][str(TEMPERATURES[0])]:.2f} to {data['temperatures'][str(TEMPERATURES[-1])]:.2f} bits: "
        "from picking keys to averaging them.",
    )
