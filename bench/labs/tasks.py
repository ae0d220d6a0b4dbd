"""Toy tasks, and training a small model on one: what `lab toy`, `lab gqa` and `lab heads` share.

Design fact: data are made by NumPy before training and scanned in chunks on the device, so a step costs no Python.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench.labs.model import first_parameters, small_model
from jaxattn import Causal, Mask, bigbird, sliding_window

SYMBOLS = 16
KEYS = SYMBOLS // 2  # recall: the first half of the symbols are keys, the second half values
SEPARATOR = SYMBOLS
VOCAB = SYMBOLS + 1 + KEYS * KEYS  # and a token for each pair of key and value
TASKS = ("copy", "reverse", "recall", "sort")
CHUNK = 50  # steps scanned in one call
WINDOW = 8  # tokens that the window sees
_CAUSAL = Causal()


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model: heads, key/value heads, mask, or linear attention; how it is computed and what it keeps."""

    name: str
    heads: int = 8
    kv_heads: int = 8
    mask: Mask = _CAUSAL
    linear: bool = False
    implementation: str = "naive"
    remat: bool = False


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("MHA"),
        Variant("GQA", kv_heads=2),
        Variant("MQA", kv_heads=1),
        Variant("1 head", heads=1, kv_heads=1),
        Variant("window", mask=sliding_window(WINDOW)),
        Variant("bigbird", mask=Causal() & bigbird(64, block=4, window=3, global_blocks=1, random_blocks=1)),
        Variant("linear", linear=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """Sequences of L tokens.

    Attributes: tokens: int32 [count, L]. asked: bool [count, L], whether the token is an answer. distance: int
      [count, L], from the token before an answer back to the one that decides it.
    """

    tokens: np.ndarray
    asked: np.ndarray
    distance: np.ndarray


def examples(task: str, count: int, length: int, seed: int) -> Examples:
    """Sequences of a task.

    copy, reverse, sort: `length` symbols, a separator, then the answer. recall: `length` facts, each a token that
    stands for a key and a value, a separator, then every key in another order, each followed by its value.

    >>> examples("copy", 1, 3, seed=0).tokens.shape
    (1, 7)
    """
    random = np.random.default_rng([TASKS.index(task), seed])
    separator = np.full((count, 1), SEPARATOR)
    place = np.arange(length)
    if task == "recall":
        keys, order = (random.permuted(np.tile(np.arange(n), (count, 1)), axis=1)[:, :length] for n in (KEYS, length))
        values = random.integers(KEYS, size=(count, length))
        facts = SYMBOLS + 1 + KEYS * keys + values
        asked_for = [np.take_along_axis(x, order, axis=1) for x in (keys, KEYS + values)]
        tokens = np.concatenate([facts, separator, np.stack(asked_for, axis=-1).reshape(count, -1)], axis=1)
        answer_at = length + 2 + 2 * place
        distance = answer_at - 1 - order
    else:
        given = random.integers(SYMBOLS, size=(count, length))
        answer = {"copy": given, "reverse": given[:, ::-1], "sort": np.sort(given, axis=1)}[task]
        tokens = np.concatenate([given, separator, answer], axis=1)
        answer_at = length + 1 + place
        source = {"copy": place, "reverse": place[::-1], "sort": np.argsort(given, axis=1, kind="stable")}[task]
        distance = np.broadcast_to(answer_at - 1 - source, (count, length))
    asked, distances = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, int)
    asked[:, answer_at] = True
    distances[:, answer_at] = distance
    return Examples(tokens.astype(np.int32), asked, distances)


def step_program(name: str, task: str, length: int, d: int, layers: int, batch: int, seed: int):
    """Loss and gradients of one step of `train`, for `bench.labs.measure`; `name` is the variant's."""
    graph, shapes = graph_of(VARIANTS[name], d, layers)
    data = examples(task, batch, length, seed)
    arguments = jax.tree.map(np.asarray, first_parameters(shapes, seed)), data.tokens
    return jax.value_and_grad(loss_of(graph, data.asked[0])), arguments


def loss_of(graph: nnx.GraphDef, asked: np.ndarray) -> Callable[[nnx.State, jax.Array], jax.Array]:
    """The mean cross entropy of the tokens that are asked, as a function of parameters and tokens."""
    asked = jnp.asarray(asked)

    def loss(parameters, tokens):
        logits = nnx.merge(graph, parameters)(tokens[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
        return -(picked * asked[1:]).sum() / (asked.sum() * tokens.shape[0])

    return loss


def graph_of(variant: Variant, d: int, layers: int) -> tuple[nnx.GraphDef, nnx.State]:
    return small_model(
        vocab=VOCAB,
        d=d,
        layers=layers,
        heads=variant.heads,
        kv_heads=variant.kv_heads,
        mask=variant.mask,
        linear=variant.linear,
        implementation=variant.implementation,
        remat=jax.checkpoint_policies.nothing_saveable if variant.remat else None,
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model: its graph and parameters, the loss of every step, and how often it answers right."""

    graph: nnx.GraphDef
    parameters: nnx.State
    losses: np.ndarray
    seconds: float
    accuracy: float
    by_distance: dict[int, float]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.parameters))


def train(
    task: str,
    variant: Variant,
    *,
    steps: int,
    length: int,
    d: int,
    layers: int,
    batch: int,
    seed: int,
    rate: float = 3e-3,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Trained:
    """Train one model by Adam (warm-up, cosine decay, gradients clipped at norm 1) and test it on new examples."""
    start = time.perf_counter()
    graph, shapes = graph_of(variant, d, layers)
    parameters = first_parameters(shapes, seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), max(2, steps), rate / 30)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    data = examples(task, steps * batch, length, seed)
    tokens = data.tokens.reshape(steps, batch, -1)
    loss = loss_of(graph, data.asked[0])

    def step(carry, tokens):
        parameters, state = carry
        value, gradients = jax.value_and_grad(loss)(parameters, tokens)
        updates, state = optimizer.update(gradients, state, parameters)
        return (optax.apply_updates(parameters, updates), state), value

    chunk = jax.jit(functools.partial(jax.lax.scan, step))
    carry, losses = (parameters, jax.jit(optimizer.init)(parameters)), []
    for first in range(0, steps, CHUNK):
        carry, values = chunk(carry, tokens[first : first + CHUNK])
        losses.append(np.asarray(values))
        progress(min(1.0, (first + CHUNK) / steps))
    accuracy, by_distance = test(graph, carry[0], examples(task, 512, length, seed + 1_000_003))
    return Trained(graph, carry[0], np.concatenate(losses), time.perf_counter() - start, accuracy, by_distance)


def test(graph: nnx.GraphDef, parameters: nnx.State, data: Examples) -> tuple[float, dict[int, float]]:
    """The share of answers that are the model's first choice: of all, and by distance."""
    predict = jax.jit(lambda parameters, tokens: nnx.merge(graph, parameters)(tokens).argmax(-1))
    chosen = np.asarray(predict(parameters, data.tokens[:, :-1]))
    asked, distance = data.asked[:, 1:], data.distance[:, 1:]
    right = chosen == data.tokens[:, 1:]
    near = sorted({int(n) for n in distance[asked]})
    return float(right[asked].mean()), {n: float(right[asked & (distance == n)].mean()) for n in near}
