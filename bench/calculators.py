"""What attention costs, by formula: score memory, FLOPs, the longest sequence that fits, KV cache.

Design fact: exact integers in bytes; GB (1e9) and GiB (2**30) are only how they are printed. Nothing is
measured here, and nothing is rounded before the last step.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes that attention memory depends on. weights_bytes: of the whole model at 2 bytes a number."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    weights_bytes: int


MODELS = {
    model.name: model
    for model in (
        Model("llama-2-7b", 32, 32, 32, 128, 2 * 6_738_415_616),
        Model("llama-3.2-1b", 16, 32, 8, 64, 2 * 1_235_814_400),
    )
}
# Memory as sold, in bytes.
DEVICES = {"t4": 16 * 10**9, "a100": 80 * 10**9, "h100": 80 * 10**9, "h200": 141 * 10**9}


def score_bytes(n: int, *, heads: int = 1, batch: int = 1, layers: int = 1, item_bytes: int = 2) -> int:
    """Bytes of the attention scores: batch * layers * heads * n^2 * item_bytes.

    Args: n: tokens (queries and keys alike). layers: how many keep their scores at once. item_bytes: of one score.

    >>> score_bytes(2048, heads=32)
    268435456
    """
    return batch * layers * heads * n * n * item_bytes


def multiply_adds(n: int, head_dim: int) -> int:
    """Multiply-adds of one of the two products, for one head: n^2 * head_dim.

    >>> multiply_adds(4096, 128)
    2147483648
    """
    return n * n * head_dim


def attention_flops(n: int, head_dim: int, *, heads: int = 1, causal: bool = False) -> int:
    """Floating-point operations of both products: 4 * n^2 * head_dim * heads, half of that where causal.

    >>> attention_flops(4096, 128)
    8589934592
    """
    return 4 * multiply_adds(n, head_dim) * heads // (2 if causal else 1)


def heads_times_layers(total_bytes: float, n: int, *, item_bytes: int = 2) -> float:
    """How many heads x layers of scores at length n make up `total_bytes`: total / (n^2 * item_bytes).

    >>> round(heads_times_layers(65e12, 131072))
    1892
    """
    return total_bytes / score_bytes(n, item_bytes=item_bytes)


def kv_cache_bytes(n: int, model: Model, *, kv_heads: int | None = None, batch: int = 1, item_bytes: int = 2) -> int:
    """Bytes of keys and values of n tokens: 2 * layers * kv_heads * head_dim * n * batch * item_bytes.

    Args: kv_heads: instead of the model's: its heads (MHA), 1 (MQA).

    >>> kv_cache_bytes(1, MODELS["llama-2-7b"])
    524288
    """
    K = model.kv_heads if kv_heads is None else kv_heads
    return 2 * model.layers * K * model.head_dim * n * batch * item_bytes


def longest_standard(
    device_bytes: int, model: Model, *, every_layer: bool = False, weights: bool = True, item_bytes: int = 2
) -> int:
    """The longest sequence whose scores fit: floor(sqrt(free / (layers alive * heads * item_bytes))).

    free is the device's bytes less the model's weights (`weights`). every_layer: each layer's scores are kept,
    as for a backward pass; else one layer's are alive at a time. Only scores are counted.

    >>> longest_standard(80 * 10**9, MODELS["llama-2-7b"], weights=False)
    35355
    """
    free = device_bytes - (model.weights_bytes if weights else 0)
    alive = model.layers if every_layer else 1
    return math.isqrt(max(0, free) // score_bytes(1, heads=model.heads, layers=alive, item_bytes=item_bytes))


def longest_flash(device_bytes: int, model: Model, *, weights: bool = True, item_bytes: int = 2) -> int:
    """The longest sequence whose KV cache fits: flash attention keeps no scores.

    >>> longest_flash(80 * 10**9, MODELS["llama-2-7b"])
    126882
    """
    free = device_bytes - (model.weights_bytes if weights else 0)
    return max(0, free) // kv_cache_bytes(1, model, item_bytes=item_bytes)


def flash_needed_from(device_bytes: int, model: Model, *, every_layer: bool = False, item_bytes: int = 2) -> int:
    """The length from which flash is not optional: the scores beside the weights do not fit any more.

    >>> flash_needed_from(80 * 10**9, MODELS["llama-2-7b"])
    32241
    """
    return longest_standard(device_bytes, model, every_layer=every_layer, item_bytes=item_bytes) + 1


def show_bytes(count: float) -> str:
    """Bytes in GB and GiB, or in smaller units, four digits.

    >>> show_bytes(268435456), show_bytes(65536)
    ('0.268 GB (0.25 GiB)', '64 KiB')
    """
    if count < 2**20:
        return f"{count / 2**10:g} KiB"
    if count < 2e8:
        return f"{count / 1e6:.4g} MB ({count / 2**20:.4g} MiB)"
    gigabytes = f"{count / 1e9:.1f}" if count >= 1e12 else f"{count / 1e9:.3g}"
    return f"{gigabytes} GB ({count / 2**30:.4g} GiB)"


def scores_table(arguments: argparse.Namespace) -> None:
    item_bytes = ITEM_BYTES[arguments.dtype]
    print(
        f"Scores, {arguments.batch} x {arguments.layers} layers x {arguments.heads} heads x n^2 x {item_bytes} bytes "
        f"({arguments.dtype}):"
    )
    sizes = {"heads": arguments.heads, "batch": arguments.batch, "layers": arguments.layers}
    for n in arguments.n or (2048, 8192, 32768, 131072):
        print(f"  n={n:>7}  {show_bytes(score_bytes(n, **sizes, item_bytes=item_bytes))}")


def flops_table(arguments: argparse.Namespace) -> None:
    d = arguments.head_dim
    print(f"One head of {d}: scores in float32; one product n^2 d; both products 4 n^2 d:")
    for n in arguments.n or (128, 512, 1024, 2048, 4096):
        print(
            f"  n={n:>7}  {show_bytes(score_bytes(n, item_bytes=4)):<24}"
            f"{multiply_adds(n, d) / 1e9:>10.4g} G multiply-adds{attention_flops(n, d) / 1e9:>10.4g} GFLOP"
        )


def context_table(arguments: argparse.Namespace) -> None:
    for dtype in ("float16", "float32"):
        one = score_bytes(arguments.n, item_bytes=ITEM_BYTES[dtype])
        count = heads_times_layers(arguments.terabytes * 1e12, arguments.n, item_bytes=ITEM_BYTES[dtype])
        print(
            f"{arguments.terabytes:g} TB of scores at n={arguments.n} in {dtype}: {show_bytes(one)} a head, so "
            f"{count:.0f} heads x layers, e.g. {count / 32:.0f} layers of 32 heads"
        )


def longest_table(arguments: argparse.Namespace) -> None:
    print("Standard counts scores only, flash the KV cache only; beside them the weights where it says so.")
    devices = [arguments.device_name] if arguments.device_name else list(DEVICES)
    models = [arguments.model] if arguments.model else list(MODELS)
    item_bytes = ITEM_BYTES[arguments.dtype]
    print(f"Longest sequence before memory runs out ({arguments.dtype} scores and cache, weights at 2 bytes):")
    print(
        f"  {'device':<8}{'model':<14}{'weights':>8}{'standard, all layers':>22}{'standard, one':>15}{'flash':>10}"
        f"{'flash needed from':>19}"
    )
    for device in devices:
        for name in models:
            for weights in (False, True):
                size, model = DEVICES[device], MODELS[name]
                kept = {"weights": weights, "item_bytes": item_bytes}
                every = longest_standard(size, model, every_layer=True, **kept)
                one = longest_standard(size, model, **kept)
                chosen = every if arguments.layers_alive == "all" else one
                print(
                    f"  {device:<8}{name:<14}{'yes' if weights else 'no':>8}{every:>22,}{one:>15,}"
                    f"{longest_flash(size, model, **kept):>10,}{chosen + 1:>19,}"
                )


def kv_table(arguments: argparse.Namespace) -> None:
    item_bytes = ITEM_BYTES[arguments.dtype]
    for name in [arguments.model] if arguments.model else list(MODELS):
        model = MODELS[name]
        print(f"KV cache of {name}, batch {arguments.batch}, {arguments.dtype}:")
        kinds = {"MHA": model.heads, f"its own ({model.kv_heads})": model.kv_heads, "GQA 8": 8, "MQA": 1}
        for n in arguments.n or (2048, 8192, 131072):
            cells = (
                f"{kind}: "
                f"{show_bytes(kv_cache_bytes(n, model, kv_heads=K, batch=arguments.batch, item_bytes=item_bytes))}"
                for kind, K in kinds.items()
            )
            print(f"  n={n:>7}  " + ";  ".join(cells))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench calculate",
        description="What attention costs, by formula. Without arguments: every table at its defaults.",
    )
    tables = made.add_subparsers(dest="table")

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{value} must be at least 1")
        return value

    def add(name: str, function, text: str) -> argparse.ArgumentParser:
        one = tables.add_parser(name, help=text, description=text)
        one.set_defaults(show=function)
        return one

    one = add("scores", scores_table, "bytes of the scores: batch x layers x heads x n^2 x bytes")
    one.add_argument("--n", type=positive, nargs="+")
    one.add_argument("--heads", type=positive, default=32)
    one.add_argument("--batch", type=positive, default=1)
    one.add_argument("--layers", type=positive, default=1)
    one.add_argument("--dtype", choices=list(ITEM_BYTES), default="float16")
    one = add("flops", flops_table, "one head: bytes, multiply-adds, FLOPs")
    one.add_argument("--n", type=positive, nargs="+")
    one.add_argument("--head-dim", type=positive, default=128)
    one = add("context", context_table, "how many heads x layers a claim about score memory implies")
    one.add_argument("--n", type=positive, default=131072)
    one.add_argument("--terabytes", type=float, default=65.0)
    one = add("longest", longest_table, "the longest sequence before memory runs out, standard and flash")
    one.add_argument("--device-name", choices=list(DEVICES))
    one.add_argument("--model", choices=list(MODELS))
    one.add_argument("--layers-alive", choices=("one", "all"), default="one", help="whose scores live at once")
    one.add_argument("--dtype", choices=list(ITEM_BYTES), default="float16")
    one = add("kv", kv_table, "bytes of the KV cache: MHA, GQA, MQA")
    one.add_argument("--n", type=positive, nargs="+")
    one.add_argument("--model", choices=list(MODELS))
    one.add_argument("--batch", type=positive, default=1)
    one.add_argument("--dtype", choices=list(ITEM_BYTES), default="float16")
    return made


def main(argv: list[str]) -> int:
    """Print one table, or all of them."""
    made = parser()
    if argv:
        arguments = made.parse_args(argv)
        arguments.show(arguments)
        return 0
    for index, name in enumerate(("scores", "flops", "context", "longest", "kv")):
        if index:
            print()
        arguments = made.parse_args([name])
        arguments.show(arguments)
    return 0
