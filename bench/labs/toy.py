"""`lab toy`: tiny transformers learn copy, reverse, recall, sort; which attention can, and which cannot.

Design fact: width, layers, data and optimiser are the same for all; a variant changes heads, mask or kind of attention.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from bench.labs import lab, tasks
from bench.labs.measure import measure
from bench.labs.tasks import VARIANTS

GOOD = 0.98  # accuracy of what has learnt a task
EQUAL_AT, EQUAL = 50, 1e-3  # at this step losses are equal to this part
SEVERAL = ("reverse", "sort")  # tasks that need several places at once
LESS = 0.1  # what an accuracy must lie below another to be called worse
DEFAULT = ("MHA", "MQA", "1 head", "window", "linear")
SIZES = {"d": 64, "layers": 2, "batch": 32}
# From so many tokens back on a pattern cannot see, or not directly. Two layers of a window reach twice as far as one.
FAR = {"window": SIZES["layers"] * (tasks.WINDOW - 1) + 1, "bigbird": tasks.WINDOW}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", action="append", choices=tasks.TASKS, help="may be repeated (default recall)")
    parser.add_argument(
        "--variant", action="append", choices=list(VARIANTS), help=f"may be repeated (default {', '.join(DEFAULT)})"
    )
    parser.add_argument("--steps", type=lab.positive, default=200, help="of training (default 200)")
    parser.add_argument("--length", type=lab.positive, default=6, help="symbols or facts in a sequence (default 6)")
    parser.add_argument("--equal", action="store_true", help="also compare losses between implementations")
    parser.add_argument("--all", action="store_true", help="every task and variant, 600 steps, --equal: minutes")


def check(options: argparse.Namespace) -> None:
    if options.length > tasks.KEYS:
        raise ValueError(f"--length {options.length} must be at most {tasks.KEYS}: recall has {tasks.KEYS} keys")
    if options.all:
        options.task, options.variant, options.equal = list(tasks.TASKS), list(VARIANTS), True
        options.steps = max(options.steps, 600)
    options.task = options.task or ["recall"]
    options.variant = options.variant or list(DEFAULT)


def run(options: argparse.Namespace) -> dict:
    rows, equal = [], []
    total = len(options.task) * len(options.variant) + 1 + 3 * options.equal
    with lab.Steps(total) as steps:
        sizes = SIZES | {"task": options.task[0], "length": options.length, "seed": options.seed}
        first = options.variant[0]  # measuring the step of each would take longer than the lab may
        steps.start(f"one step of {first}, measured")
        [cost] = measure("bench.labs.tasks:step_program", [{"name": first, **sizes}])
        for task in options.task:
            for name in options.variant:
                steps.start(f"{task}: {name}")
                sizes = SIZES | {"steps": options.steps, "length": options.length, "seed": options.seed}
                trained = tasks.train(task, VARIANTS[name], **sizes, progress=steps.part)
                rows.append(
                    {
                        "task": task,
                        "variant": name,
                        "accuracy": trained.accuracy,
                        "by_distance": trained.by_distance,
                        "losses": trained.losses.tolist(),
                        "parameters": trained.size,
                        "seconds": trained.seconds,
                    }
                )
        if options.equal:
            equal = losses_of_implementations(options, steps)
    return {"rows": rows, "cost": cost, "equal": equal, "claims": claims(rows, equal)}


def losses_of_implementations(options: argparse.Namespace, steps: lab.Steps) -> list[dict]:
    """The loss of step 50, same seed: naive, blockwise, and naive with every block recomputed."""
    mha = VARIANTS["MHA"]
    found = []
    for name, variant in {
        "naive": mha,
        "blockwise": dataclasses.replace(mha, implementation="blockwise"),
        "naive, checkpointed": dataclasses.replace(mha, remat=True),
    }.items():
        steps.start(f"the same training by {name}")
        sizes = SIZES | {"steps": EQUAL_AT, "length": options.length, "seed": options.seed}
        trained = tasks.train(options.task[0], variant, **sizes, progress=steps.part)
        found.append({"name": name, "loss": float(trained.losses[-1])})
    return [row | {"difference": abs(row["loss"] / found[0]["loss"] - 1)} for row in found]


def beyond(row: dict, first: int = tasks.WINDOW) -> float | None:
    """Accuracy of the answers that lie at least `first` tokens back, the mean over distances."""
    far = [accuracy for distance, accuracy in row["by_distance"].items() if int(distance) >= first]
    return float(np.mean(far)) if far else None


def nearer(row: dict, first: int) -> float | None:
    """Accuracy of the answers that lie less than `first` tokens back, the mean over distances."""
    near = [accuracy for distance, accuracy in row["by_distance"].items() if int(distance) < first]
    return float(np.mean(near)) if near else None


def loses(row: dict, first: int) -> bool:
    """Whether the answers that lie at least `first` tokens back are worse than the nearer ones."""
    near, far = nearer(row, first), beyond(row, first)
    return None not in (near, far) and far < near - LESS


def claims(rows: list[dict], equal: list[dict]) -> list[dict]:
    found = []
    for task in ("copy", "recall"):
        scores = {
            r["variant"]: r["accuracy"] for r in rows if r["task"] == task and r["variant"] in ("MHA", "GQA", "MQA")
        }
        if scores:
            found.append(
                {
                    "text": f"{', '.join(scores)} learn {task}: accuracy at least {GOOD}",
                    "holds": min(scores.values()) >= GOOD,
                    "found": ", ".join(f"{name} {score:.3f}" for name, score in scores.items()),
                }
            )
    recall = {r["variant"]: r for r in rows if r["task"] == "recall" and r["variant"] in ("MHA", "window")}
    far = FAR["window"]
    if len(recall) == 2 and beyond(recall["MHA"], far) is not None:
        found.append(
            {
                "text": f"recall: from {far} tokens back on a window answers worse than nearer, MHA does not",
                "holds": loses(recall["window"], far) and not loses(recall["MHA"], far),
                "found": ", ".join(
                    f"{name} {nearer(row, far):.2f} and {beyond(row, far):.2f}" for name, row in recall.items()
                ),
            }
        )
    for task, (one, eight) in last_losses([row for row in rows if row["task"] in SEVERAL]).items():
        found.append(
            {
                "text": f"{task}: 8 heads end at less than 1 head's loss, at equal width and parameters",
                "holds": eight < one,
                "found": f"{eight:.3g} against {one:.3g}",
            }
        )
    if equal:
        worst = max(row["difference"] for row in equal)
        found.append(
            {
                "text": f"at step {EQUAL_AT} the losses of all implementations are equal to {EQUAL:g}",
                "holds": worst <= EQUAL,
                "found": f"{worst:.1e}",
            }
        )
    return found


def reached(row: dict, loss: float = 0.1) -> int | None:
    """The first step at which the mean loss of the last ten is below `loss`."""
    steps, means = smooth(row["losses"], 10)
    below = np.flatnonzero(means < loss)
    return int(steps[below[0]]) if below.size else None


def smooth(losses: list[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and at each the mean loss of the last `width` of them, or of all where there are fewer."""
    width = min(width, len(losses))
    means = np.convolve(losses, np.full(width, 1 / width), "valid")
    return np.arange(len(means)) + width, means


def tables(data: dict):
    rows = []
    for row in data["rows"]:
        far = beyond(row)
        rows.append(
            [
                f"{row['task']}: {row['variant']}",
                f"{row['accuracy']:.3f}",
                "" if far is None else f"{far:.3f}",
                reached(row) or "never",
                f"{row['losses'][-1]:.4f}",
                f"{row['parameters']:,}",
                f"{row['seconds']:.0f} s",
            ]
        )
    columns = ["", "accuracy", f"from {tasks.WINDOW} back", "loss 0.1 at step", "last loss", "parameters", "training"]
    chosen = data["settings"]
    title = f"{chosen['steps']} steps, width {SIZES['d']}, {SIZES['layers']} layers, {chosen['length']} to remember"
    yield lab.table(title, columns, rows)
    yield lab.cost_table(f"loss and gradients of {SIZES['batch']} sequences, a process of its own", [data["cost"]])
    if data["equal"]:
        rows = [[row["name"], f"{row['loss']:.6f}", f"{row['difference']:.1e}"] for row in data["equal"]]
        yield lab.table(f"loss of step {EQUAL_AT}, same seed", ["", "loss", "relative difference"], rows)


def draw(data: dict, path: Path) -> Path:
    shown = list(dict.fromkeys(row["task"] for row in data["rows"]))
    figure, axes = lab.picture(len(shown), 2, 11, 1.2 + 3.3 * len(shown))
    farthest = max(2 * tasks.WINDOW, *(int(n) for row in data["rows"] for n in row["by_distance"]))
    for (left, right), task in zip(axes, shown, strict=True):
        for row in data["rows"]:
            if row["task"] != task:
                continue
            look = lab.STYLES[row["variant"]]
            steps, means = smooth(row["losses"], 5)
            every = max(1, len(steps) // 8)
            drawn = {"color": look.colour, "linestyle": look.line, "marker": look.marker, "markersize": 5}
            left.plot(steps, means, markevery=every, label=row["variant"], **drawn)
            right.plot([int(n) for n in row["by_distance"]], list(row["by_distance"].values()), **drawn)
        left.set_yscale("log")
        left.set_xlabel("step")
        left.set_ylabel(f"{task}: loss")
        right.axvline(tasks.WINDOW - 0.5, color="#808080", linewidth=1, linestyle=(0, (6, 3)))
        right.text(tasks.WINDOW - 0.4, 0.02, "beyond the window", fontsize=8)
        right.set_ylim(0, 1.05)
        right.set_xlim(0.5, farthest + 0.5)
        right.set_xlabel("tokens between the question and what decides the answer")
        right.set_ylabel("share of answers right")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    chosen = data["settings"]
    model = f"width {SIZES['d']}, {SIZES['layers']} layers"
    title = f"Toy tasks: {model}, {chosen['steps']} steps, window {tasks.WINDOW}"
    return lab.save_picture(figure, title, data, path)


def see(data: dict) -> tuple[str, str]:
    tasks_seen = list(dict.fromkeys(row["task"] for row in data["rows"]))
    return "; ".join(told(task, data["rows"]) for task in tasks_seen) + ".", heads_told(data["rows"])


def told(task: str, rows: list[dict]) -> str:
    """Who learns a task, who does not, and whether what lies far back is what is wrong."""
    own = {row["variant"]: row for row in rows if row["task"] == task}
    short = [f"{name} {row['accuracy']:.2f}" for name, row in own.items() if row["accuracy"] < GOOD]
    rest = f"{'the others' if short else 'all'} at least {GOOD}"
    text = f"{task}: {', '.join([*short, rest] if len(short) < len(own) else short)}"
    far = [f"{name} from {first}" for name, first in FAR.items() if name in own and loses(own[name], first)]
    return f"{text} (far answers are worse than near ones: {' and '.join(far)} tokens back on)" if far else text


def last_losses(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """By task, the mean loss of the last ten steps of 1 head and of 8, where both were trained."""
    by = {(row["task"], row["variant"]): float(np.mean(row["losses"][-10:])) for row in rows}
    return {
        task: (by[task, "1 head"], by[task, "MHA"]) for task, name in by if name == "1 head" and (task, "MHA") in by
    }


def heads_told(rows: list[dict]) -> str:
    """One head against eight: on the task where eight win most clearly, if on any."""
    losses = last_losses(rows)
    if not losses:
        return "add --variant MHA --variant '1 head' to see what several heads are for."
    task = max(losses, key=lambda task: losses[task][0] / losses[task][1])
    one, eight = losses[task]
    sizes = {row["parameters"] for row in rows if row["task"] == task and row["variant"] in ("1 head", "MHA")}
    text = f"at equal width and {'equal' if len(sizes) == 1 else 'different'} parameters"
    if eight >= one:
        return (
            f"{text} 1 head ends at loss {one:.3g}, 8 heads at {eight:.3g} ({task}): it asks for one place at a time, "
            "which one wide head finds well; see --task reverse --steps 300."
        )
    return (
        f"{text} 8 heads end at loss {eight:.3g}, 1 head at {one:.3g} ({task}): one softmax is one set of weights for "
        "all, eight share the places and distances out (lab heads --task reverse shows which head looks where)."
    )
