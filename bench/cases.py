"""What is measured: shapes, masks, lengths and the inputs themselves, as data.

Design fact: a mask is written once, as text ("causal & window(1024, 0)"), and evaluated with whatever
primitives a framework brings: NumPy rows for the reference, a jaxattn mask object, a torch `mask_mod`.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping

import numpy as np

from bench.results import KEY

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Logits of unit-normal inputs have standard deviation 1: nearly flat attention, which hides mistakes.
QUERY_SCALE = 3.0
LAYER_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One question: which implementations, at which shape, over which lengths.

    A length is the number of keys S; there are as many queries, unless `queries` says otherwise (decoding).
    always: the tiled implementation is measured at every length, even where time has run out.
    not_on_cpu: (implementation, reason) of those that on a CPU are measured only where asked for by name.
    """

    name: str
    title: str
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    quick_lengths: tuple[int, ...]
    implementations: tuple[str, ...]
    batch: int = 1
    queries: int | None = None
    masks: tuple[str, ...] = ("causal",)
    dtype_cpu: str = "float32"
    dtype_gpu: str = "bfloat16"
    always: bool = False
    not_on_cpu: tuple[tuple[str, str], ...] = ()

    def dtype(self, device: str) -> str:
        return self.dtype_gpu if device == "cuda" else self.dtype_cpu


@dataclasses.dataclass(frozen=True)
class Problem:
    """One measurement: one implementation on one shape. Everything a child process needs to build it.

    layer: a whole attention layer of Llama (projections, RoPE, attention) on hidden states of width N * H.
    """

    case: str
    implementation: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str
    dtype: str
    device: str
    direction: str = "forward"
    seed: int = 0
    threads: int = 1
    cold: bool = False
    layer: bool = False

    def width(self) -> int:
        return self.heads * self.head_dim

    def shape_BTNH(self) -> tuple[int, int, int, int]:
        return self.batch, self.queries, self.heads, self.head_dim

    def shape_BSKH(self) -> tuple[int, int, int, int]:
        return self.batch, self.keys, self.kv_heads, self.head_dim

    def key(self) -> tuple:
        """What makes two rows the same measurement (for --resume and compare)."""
        return tuple(getattr(self, name) for name in KEY)

    def arrays_bytes(self) -> int:
        """Bytes of query, key, value and output (and of their gradients where these are computed).

        A layer adds its weights and hidden states.
        """
        queries, keys = math.prod(self.shape_BTNH()), math.prod(self.shape_BSKH())
        if self.layer:
            weights = sum(math.prod(shape) for shape in self.weight_shapes().values())
            return (4 * queries + 2 * keys + weights) * DTYPE_BYTES[self.dtype]
        forward = (2 * queries + 2 * keys) * DTYPE_BYTES[self.dtype]
        return forward if self.direction == "forward" else 2 * forward

    def output_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what one call gives: the output, then the gradients of query, key and value where asked for."""
        if self.layer:
            return [(self.batch, self.queries, self.width())]
        gradients = [] if self.direction == "forward" else [self.shape_BTNH(), self.shape_BSKH(), self.shape_BSKH()]
        return [self.shape_BTNH(), *gradients]

    def scores_bytes(self) -> int:
        """Bytes of one [B, N, T, S] array in the problem's dtype."""
        return self.batch * self.heads * self.queries * self.keys * DTYPE_BYTES[self.dtype]

    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """A layer's projections under Hugging Face's names, [out, in]."""
        D, keys = self.width(), self.kv_heads * self.head_dim
        return {
            "q_proj.weight": (D, D),
            "k_proj.weight": (keys, D),
            "v_proj.weight": (keys, D),
            "o_proj.weight": (D, D),
        }

    def flops(self) -> float:
        """Floating-point operations of attention: 4 * H for each (query, key) pair the mask allows.

        The two matrix products, a multiply-add counted as 2; causal counts exactly half of T * S;
        the backward pass adds 2.5 times the forward (five products where the forward has two).
        A layer adds 2 for each weight and token.
        """
        forward = 4.0 * self.head_dim * self.batch * self.heads * pairs(self.mask, self.queries, self.keys)
        if self.layer:
            weights = sum(math.prod(shape) for shape in self.weight_shapes().values())
            forward += 2.0 * weights * self.batch * self.queries
        return forward if self.direction == "forward" else 3.5 * forward


# Order is the order of rows, legends and tables.
OURS = ("jaxattn-naive", "jaxattn-blockwise", "jaxattn-triton")
JAX_PEERS = (
    "jax-nn-xla",
    "jax-nn-cudnn",
    "pallas-ops",
    "tokamax-triton",
    "tokamax-mosaic",
    "tokamax-cudnn",
    "tokamax-xla",
    "tokamax-xla-chunked",
)
TORCH_PEERS = (
    "torch-eager",
    "torch-sdpa-math",
    "torch-sdpa-flash",
    "torch-sdpa-efficient",
    "torch-sdpa-cudnn",
    "torch-flex",
)
LAYERS = ("jaxattn-layer", "hf-eager-layer", "hf-sdpa-layer")
EVERY = OURS + JAX_PEERS + TORCH_PEERS

_STANDARD_AND_FLASH = ("jaxattn-naive", "jaxattn-blockwise", "jaxattn-triton", "torch-sdpa-math", "torch-sdpa-flash")

CASES = {
    case.name: case
    for case in (
        Case(
            name="llama-3.2-1b",
            title="Llama-3.2-1B attention",
            heads=32,
            kv_heads=8,
            head_dim=64,
            lengths=(1024, 4096, 16384),
            quick_lengths=(256, 1024),
            implementations=EVERY + LAYERS,
            always=True,
            not_on_cpu=(("torch-flex", "time: compiling it on a CPU takes some 20 s of five minutes, at each length"),),
        ),
        Case(
            name="llama-2-7b",
            title="LLaMA-2-7B attention",
            heads=32,
            kv_heads=32,
            head_dim=128,
            lengths=(512, 1024, 2048, 4096),
            quick_lengths=(256, 512),
            implementations=EVERY,
            dtype_gpu="float16",
        ),
        Case(
            name="speedup",
            title="Standard against flash, full attention, 32 heads of 128",
            heads=32,
            kv_heads=32,
            head_dim=128,
            lengths=(512, 1024, 2048, 4096, 8192),
            quick_lengths=(256, 512),
            implementations=_STANDARD_AND_FLASH,
            masks=("full",),
            dtype_gpu="float16",
        ),
        Case(
            name="window-64",
            title="Standard against a sliding window of 64",
            heads=8,
            kv_heads=8,
            head_dim=64,
            lengths=(128, 256, 512, 1024, 2048),
            quick_lengths=(128, 512),
            implementations=EVERY,
            masks=("causal", "causal & window(63, 0)"),
        ),
        Case(
            name="mqa",
            title="Multi-query attention, 32 query heads on one key head",
            heads=32,
            kv_heads=1,
            head_dim=64,
            lengths=(1024, 4096),
            quick_lengths=(256, 512),
            implementations=EVERY,
        ),
        Case(
            name="decode",
            title="Decoding one token against a KV cache, batch 8",
            heads=32,
            kv_heads=8,
            head_dim=64,
            batch=8,
            queries=1,
            lengths=(1024, 4096, 16384),
            quick_lengths=(512, 1024),
            implementations=EVERY,
            masks=("full",),
        ),
        Case(
            name="windows",
            title="Sliding windows of several widths",
            heads=32,
            kv_heads=8,
            head_dim=64,
            lengths=(2048, 4096, 8192),
            quick_lengths=(512,),
            implementations=EVERY,
            masks=("causal & window(127, 0)", "causal & window(1023, 0)", "causal & window(4095, 0)"),
        ),
        Case(
            name="packed",
            title="Packed documents: eight in each sequence",
            heads=32,
            kv_heads=8,
            head_dim=64,
            lengths=(1024, 4096, 8192),
            quick_lengths=(512,),
            implementations=EVERY,
            masks=("causal & documents(8)",),
        ),
    )
}


def evaluate(text: str, primitives: Mapping[str, object]):
    """The value of a mask expression, given what each primitive means.

    Grammar: names and calls with integer arguments, joined by `&`, `|`, `~` and parentheses. The names are
    those of `primitives`; a callable one is called with its arguments.

    Raises: ValueError that names what is not understood and what may be written.

    >>> evaluate("a & ~(b(2) | a)", {"a": 0b1100, "b": lambda n: n})
    0
    """
    joins: dict[type, Callable] = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}

    def wrong(what: str) -> ValueError:
        names = ", ".join(sorted(primitives))
        return ValueError(f"mask {text!r}: {what}; write e.g. 'causal & window(1024, 0)' with {names}, joined by & | ~")

    def integer(node: ast.expr) -> int:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, node = -1, node.operand
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return sign * node.value
        raise wrong(f"{ast.unparse(node)!r} is not an integer")

    def value(node: ast.expr):
        if isinstance(node, ast.BinOp) and type(node.op) in joins:
            return joins[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~value(node.operand)
        name = node.func if isinstance(node, ast.Call) else node
        if not isinstance(name, ast.Name) or name.id not in primitives:
            raise wrong(f"{ast.unparse(node)!r} is not known")
        primitive = primitives[name.id]
        if isinstance(node, ast.Call) != callable(primitive) or getattr(node, "keywords", None):
            raise wrong(f"{name.id!r} {'takes arguments' if callable(primitive) else 'takes no arguments'}")
        if not isinstance(node, ast.Call):
            return primitive
        try:
            return primitive(*(integer(argument) for argument in node.args))
        except TypeError:
            raise wrong(f"{ast.unparse(node)!r} has the wrong number of arguments") from None

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        raise wrong("it is not an expression") from None
    return value(tree.body)


@dataclasses.dataclass(frozen=True)
class _Terms:
    """Primitives joined by `&`, each at most once; None for any other expression."""

    found: dict[str, tuple[int, ...]] | None

    def __and__(self, other: _Terms) -> _Terms:
        if self.found is None or other.found is None or self.found.keys() & other.found.keys():
            return _Terms(None)
        return _Terms(self.found | other.found)

    def __or__(self, other: _Terms) -> _Terms:
        return _Terms(None)

    def __invert__(self) -> _Terms:
        return _Terms(None)


def conjunction(mask: str) -> dict[str, tuple[int, ...]] | None:
    """The primitives of a mask that is nothing but a conjunction, for libraries with arguments for them.

    >>> conjunction("causal & window(63, 0)"), conjunction("full"), conjunction("~causal")
    ({'causal': (), 'window': (63, 0)}, {}, None)
    """
    primitives = {
        "full": _Terms({}),
        "causal": _Terms({"causal": ()}),
        "window": lambda left, right: _Terms({"window": (left, right)}),
        "documents": lambda n: _Terms({"documents": (n,)}),
    }
    return evaluate(mask, primitives).found


def by_index(t, s, T: int, S: int) -> dict[str, object]:
    """The primitives as formulas on indices: works on NumPy arrays and on torch tensors alike.

    full: every pair. causal: s <= t. window(l, r): t - l <= s <= t + r.
    documents(n): the sequence is n documents of (nearly) equal length; a query sees its own.
    """

    def document(i, n: int, length: int):
        return i * n // length

    return {
        "full": (t >= 0) & (s >= 0),
        "causal": (s <= t) & (t >= 0),
        "window": lambda left, right: (s >= t - left) & (s <= t + right),
        "documents": lambda n: document(t, n, T) == document(s, n, S),
    }


def allowed_rows(mask: str, rows: np.ndarray, T: int, S: int) -> np.ndarray:
    """Boolean [len(rows), S]: which keys the given query rows may attend.

    >>> allowed_rows("causal", np.array([1]), 3, 3).astype(int)
    array([[1, 1, 0]])
    """
    t, s = np.asarray(rows)[:, None], np.arange(S)[None, :]
    return np.broadcast_to(evaluate(mask, by_index(t, s, T, S)), (len(rows), S))


def pairs(mask: str, T: int, S: int) -> float:
    """How many (query, key) pairs the mask allows; "causal" counts as half of T * S, the usual convention.

    >>> pairs("causal", 4, 4), pairs("full", 2, 3), pairs("causal & window(1, 0)", 4, 4)
    (8.0, 6.0, 7.0)
    """
    terms = conjunction(mask)
    if terms is None:
        step = max(1, (1 << 22) // S)
        starts = range(0, T, step)
        return float(sum(int(allowed_rows(mask, np.arange(i, min(T, i + step)), T, S).sum()) for i in starts))
    if terms.keys() == {"causal"} and T == S:
        return T * S / 2
    t = np.arange(T)
    low, high = np.zeros(T, np.int64), np.full(T, S - 1)
    if "causal" in terms:
        high = np.minimum(high, t)
    if "window" in terms:
        left, right = terms["window"]
        low, high = np.maximum(low, t - left), np.minimum(high, t + right)
    if "documents" in terms:
        (n,) = terms["documents"]
        document = t * n // T
        low, high = np.maximum(low, -(-document * S // n)), np.minimum(high, -(-(document + 1) * S // n) - 1)
    return float(np.maximum(0, high - low + 1).sum())


def inputs(problem: Problem) -> dict[str, np.ndarray]:
    """Unit-normal query (times `QUERY_SCALE`), key, value, and the output's cotangent, in float32.

    The same for every implementation of a problem: they depend on the seed and the shape only. For a layer:
    unit-normal hidden states and weights under Hugging Face's names that keep that variance, the query's
    times `QUERY_SCALE`.
    """
    rng = np.random.default_rng((problem.seed, problem.queries, problem.keys))
    if problem.layer:
        width = problem.width()
        arrays = {"hidden": rng.standard_normal((problem.batch, problem.queries, width), np.float32)}
        for name, shape in problem.weight_shapes().items():
            arrays[name] = rng.standard_normal(shape, np.float32) * np.float32(width**-0.5)
        arrays["q_proj.weight"] *= np.float32(QUERY_SCALE)
        return arrays
    query = rng.standard_normal(problem.shape_BTNH(), np.float32) * np.float32(QUERY_SCALE)
    key = rng.standard_normal(problem.shape_BSKH(), np.float32)
    value = rng.standard_normal(problem.shape_BSKH(), np.float32)
    arrays = {"query": query, "key": key, "value": value}
    if problem.direction != "forward":
        arrays["cotangent"] = rng.standard_normal(problem.shape_BTNH(), np.float32)
    return arrays


def sampled_rows(problem: Problem, count: int = 32) -> np.ndarray:
    """The query rows on which a result is judged: the first, the last, and others drawn from the seed.

    Of a (causal) layer the first `LAYER_ROWS`: nothing later changes them, so the reference needs no more.

    >>> problem = Problem("c", "i", 1, 4, 4, 1, 1, 8, "causal", "float32", "cpu")
    >>> sampled_rows(problem)
    array([0, 1, 2, 3])
    """
    if problem.layer:
        return np.arange(min(problem.queries, LAYER_ROWS))
    if problem.queries <= count:
        return np.arange(problem.queries)
    rng = np.random.default_rng((problem.seed, 1))
    middle = rng.choice(np.arange(1, problem.queries - 1), count - 2, replace=False)
    return np.sort(np.concatenate([[0], middle, [problem.queries - 1]]))


def custom(shape: str, mask: str) -> Case:
    """A user's own shape "B,T,S,N,K,H" and mask as a case.

    Raises: ValueError where the text is not six positive integers or N is no multiple of K.

    >>> custom("1,128,128,8,2,64", "causal").kv_heads
    2
    """
    try:
        B, T, S, N, K, H = (int(part) for part in shape.split(","))
    except ValueError:
        raise ValueError(f"--shape {shape!r}: six integers B,T,S,N,K,H are needed, e.g. 1,1024,1024,32,8,64") from None
    if min(B, T, S, N, K, H) < 1:
        raise ValueError(f"--shape {shape!r}: every size must be at least 1")
    if N % K:
        raise ValueError(f"--shape {shape!r}: N={N} query heads must be a multiple of K={K} key/value heads")
    allowed_rows(mask, np.array([0]), T, S)
    return Case(
        name="custom",
        title=f"B={B} T={T} S={S} N={N} K={K} H={H}",
        heads=N,
        kv_heads=K,
        head_dim=H,
        lengths=(S,),
        quick_lengths=(S,),
        implementations=EVERY,
        batch=B,
        queries=None if T == S else T,
        masks=(mask,),
        always=True,
    )
