"""Every implementation that is measured, behind one interface: `build(problem)` gives a function of arrays.

Design fact: an adapter says nothing about timing. A JAX adapter's function is traced and compiled by the
child process, a torch adapter's is called as it is; both take (query, key, value) in [B, T, N, H] layout and
return [B, T, N, H], so that all start from the same bytes. Importing a framework is left to `build`: the
parent process reads this table without importing jax or torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import numpy as np

from bench import cases
from bench.cases import Problem


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One implementation.

    label: what tables call it. framework: "jax" or "torch". build: problem -> function of arrays.
    refuses: problem -> the reason why it is not started, or None; what a library itself refuses, it says
    itself, in the child process. score_bytes: bytes alive at the peak for each of the B*N*T*S scores, by
    (device, dtype); what is absent is not predicted. extra_queries: further arrays of the query's size
    alive then.
    tiled: memory grows with T + S, so no length is too long; None where nobody knows. layer: takes hidden states
    and weights, and times projections, RoPE and attention. arrange: the inputs as the function takes them.
    needs: the module that it imports, where a run may well be without it.
    """

    name: str
    label: str
    framework: str
    build: Callable[[Problem], Callable]
    refuses: Callable[[Problem], str | None] = lambda problem: None
    score_bytes: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    extra_queries: float = 0.0
    tiled: bool | None = False
    layer: bool = False
    arrange: Callable[[Problem, dict[str, np.ndarray]], tuple] = lambda problem, arrays: tuple(arrays.values())
    needs: str | None = None

    def predicted_bytes(self, problem: Problem) -> int | None:
        """Bytes of inputs, outputs and scores at the peak of a forward call; None where not known.

        peak = score_bytes * B*N*T*S + bytes of (q, k, v, out) + extra_queries * bytes of q. A backward pass
        keeps the probabilities and makes their gradient: never less than the forward.
        """
        if self.tiled:
            return problem.arrays_bytes()
        per_score = self.score_bytes.get((problem.device, problem.dtype))
        if per_score is None:
            return None
        itemsize = cases.DTYPE_BYTES[problem.dtype]
        scores = problem.scores_bytes() // itemsize
        query_bytes = problem.batch * problem.queries * problem.heads * problem.head_dim * itemsize
        return int(per_score * scores + problem.arrays_bytes() + self.extra_queries * query_bytes)


def _jax_allowed(problem: Problem):
    """The mask as a boolean [T, S] computed inside the compiled function, or None for "full"."""
    import jax.numpy as jnp

    if problem.mask == "full":
        return None
    T, S = problem.queries, problem.keys
    primitives = cases.by_index(jnp.arange(T)[:, None], jnp.arange(S)[None, :], T, S)
    return cases.evaluate(problem.mask, primitives)


def _jaxattn_mask(problem: Problem):
    from jaxattn import masks

    def documents(n: int):
        lengths = (problem.queries, problem.keys)
        return masks.SegmentIds(*(np.arange(length) * n // length for length in lengths))

    primitives = {
        "full": masks.Full(),
        "causal": masks.Causal(),
        "window": masks.Window,
        "documents": documents,
    }
    return cases.evaluate(problem.mask, primitives)


def _jaxattn(implementation: str) -> Callable[[Problem], Callable]:
    def build(problem: Problem) -> Callable:
        from jaxattn import dot_product_attention

        mask = _jaxattn_mask(problem)

        def attend(query, key, value):
            return dot_product_attention(query, key, value, mask=mask, implementation=implementation)

        return attend

    return build


def _like_jax_nn(function: Callable, problem: Problem, *, windows: bool = True, **options) -> Callable:
    """Call a function that has `jax.nn.dot_product_attention`'s arguments with the problem's mask.

    `is_causal` and (`windows`) `local_window_size` where they say it all, since kernels skip tiles by them;
    else a boolean mask.
    """
    terms = cases.conjunction(problem.mask)
    known = {"causal", "window"} if windows else {"causal"}

    def attend(query, key, value):
        if terms is None or terms.keys() - known:
            return function(query, key, value, mask=_jax_allowed(problem)[None, None], **options)
        said = {"is_causal": True} if "causal" in terms else {}
        if "window" in terms:
            said["local_window_size"] = terms["window"]
        return function(query, key, value, **said, **options)

    return attend


def _jax_nn(implementation: str) -> Callable[[Problem], Callable]:
    def build(problem: Problem) -> Callable:
        import jax

        return _like_jax_nn(jax.nn.dot_product_attention, problem, implementation=implementation)

    return build


def _pallas_ops(problem: Problem) -> Callable:
    """`jax.experimental.pallas.ops.gpu.attention.mha`: keys repeated to N heads, as it has no GQA."""
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention

    terms = cases.conjunction(problem.mask)
    groups = problem.heads // problem.kv_heads
    segments = None
    if "documents" in terms:
        ids = np.arange(problem.keys) * terms["documents"][0] // problem.keys
        segments = np.broadcast_to(ids, (problem.batch, problem.keys))

    def attend(query, key, value):
        key, value = (jnp.repeat(array, groups, axis=2) for array in (key, value))
        ids = None if segments is None else jnp.asarray(segments)
        return attention.mha(query, key, value, ids, sm_scale=problem.head_dim**-0.5, causal="causal" in terms)

    return attend


def _tokamax(implementation: str) -> Callable[[Problem], Callable]:
    def build(problem: Problem) -> Callable:
        import tokamax

        return _like_jax_nn(tokamax.dot_product_attention, problem, implementation=implementation)

    return build


def _torch_allowed(problem: Problem):
    """The mask as a boolean [T, S] tensor made once, outside what is timed; None for "full"."""
    import torch

    if problem.mask == "full":
        return None
    rows = cases.allowed_rows(problem.mask, np.arange(problem.queries), problem.queries, problem.keys)
    return torch.from_numpy(np.array(rows)).to(problem.device)


def _heads_first(*arrays):
    """[B, T, N, H] -> [B, N, T, H] as views: torch's axis order without a copy."""
    return (array.transpose(1, 2) for array in arrays)


def _torch_eager(problem: Problem) -> Callable:
    """What Hugging Face's eager attention does: keys repeated, logits, softmax in float32, product."""
    import torch

    allowed = _torch_allowed(problem)
    groups, scale = problem.heads // problem.kv_heads, problem.head_dim**-0.5

    def attend(query, key, value):
        query, key, value = _heads_first(query, key, value)
        key, value = (array.repeat_interleave(groups, dim=1) for array in (key, value))
        weights = (query @ key.transpose(2, 3)) * scale
        if allowed is not None:
            weights = weights.masked_fill(~allowed, -torch.inf)
        weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous()

    return attend


def _torch_sdpa(backend: str) -> Callable[[Problem], Callable]:
    def build(problem: Problem) -> Callable:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        causal = problem.mask == "causal"
        allowed = None if causal else _torch_allowed(problem)

        def attend(query, key, value):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                out = torch.nn.functional.scaled_dot_product_attention(
                    *_heads_first(query, key, value),
                    attn_mask=allowed,
                    is_causal=causal,
                    enable_gqa=problem.heads != problem.kv_heads,
                )
            return out.transpose(1, 2)

        return attend

    return build


def _torch_flex(problem: Problem) -> Callable:
    """FlexAttention through torch.compile, its block mask made once, outside what is timed."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, S = problem.queries, problem.keys

    def mask_mod(b, h, t, s):
        return cases.evaluate(problem.mask, cases.by_index(t, s, T, S))

    block_mask = None
    if problem.mask != "full":
        block_mask = create_block_mask(mask_mod, B=None, H=None, Q_LEN=T, KV_LEN=S, device=problem.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query, key, value):
        out = compiled(
            *_heads_first(query, key, value),
            block_mask=block_mask,
            enable_gqa=problem.heads != problem.kv_heads,
        )
        return out.transpose(1, 2)

    return attend


def _jaxattn_layer(problem: Problem) -> Callable:
    """`jaxattn.nn.Attention` as Llama's, jitted whole, RoPE tables included; it chooses its implementation."""
    import jax
    from flax import nnx

    from jaxattn import llama, nn

    rope = dataclasses.replace(llama.LLAMA_3_2_1B.rope, head_dim=problem.head_dim, rotary_dim=None)
    layer = nnx.eval_shape(
        lambda: nn.Attention(
            problem.width(),
            problem.heads,
            n_kv_heads=problem.kv_heads,
            head_dim=problem.head_dim,
            rope=rope,
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(layer)
    structure = jax.tree.structure(state)

    def attend(hidden, wk, wo, wq, wv):
        return nnx.merge(graph, jax.tree.unflatten(structure, [wk, wo, wq, wv]))(hidden)

    return attend


def _jaxattn_layer_arrays(problem: Problem, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Hidden states and weights in the order and axes of `nn.Attention`'s state (wk, wo, wq, wv)."""
    D, H = problem.width(), problem.head_dim
    into = {name: arrays[f"{name}_proj.weight"].T.reshape(D, -1, H) for name in "qkv"}
    out = arrays["o_proj.weight"].T.reshape(-1, H, D)
    return tuple(np.ascontiguousarray(x) for x in (arrays["hidden"], into["k"], out, into["q"], into["v"]))


def _hf_layer(attention: str) -> Callable[[Problem], Callable]:
    """Hugging Face's `LlamaAttention`; its RoPE tables and mask are made once, as its model does."""

    def build(problem: Problem) -> Callable:
        import torch
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

        from oracle import checkpoint

        config = checkpoint.hf_config(layer_shapes(problem))
        config._attn_implementation = attention
        T, dtype = problem.queries, getattr(torch, problem.dtype)
        with torch.device("meta"):
            module = LlamaAttention(config, layer_idx=0).eval()
        positions = torch.arange(T, device=problem.device)[None]
        rotary = LlamaRotaryEmbedding(config).to(problem.device)
        tables = rotary(torch.zeros(1, T, 1, dtype=dtype, device=problem.device), positions)
        mask = None  # SDPA is causal without one; the eager layer is not
        if attention == "eager":
            mask = torch.zeros(1, 1, T, T, dtype=dtype, device=problem.device)
            mask.masked_fill_(~_torch_allowed(problem), torch.finfo(dtype).min)

        def attend(hidden, *weights):
            named = dict(zip(problem.weight_shapes(), weights, strict=True))
            arguments = {"position_embeddings": tables, "attention_mask": mask}
            return torch.func.functional_call(module, named, (hidden,), arguments)[0]

        return attend

    return build


def layer_shapes(problem: Problem):
    """`oracle.checkpoint.Shapes` of the smallest model that has the problem's attention layer."""
    from oracle import checkpoint

    return checkpoint.Shapes(
        layers=1,
        vocabulary=8,
        d_model=problem.width(),
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        mlp=8,
    )


def _layer_refuses(problem: Problem) -> str | None:
    if problem.direction != "forward":
        return "layers are measured forward only"
    if problem.mask != "causal" or problem.queries != problem.keys:
        return f"layers are measured causal and with T = S, not {problem.mask!r}, T={problem.queries}"
    return None


def _cuda_only(what: str) -> Callable[[Problem], str | None]:
    def refuses(problem: Problem) -> str | None:
        return None if problem.device == "cuda" else f"{what} runs on CUDA only; this run is on {problem.device}"

    return refuses


def _pallas_ops_refuses(problem: Problem) -> str | None:
    terms = cases.conjunction(problem.mask)
    if terms is None or "window" in terms:
        return f"it has no argument for {problem.mask!r}: causal and segments only"
    if "documents" in terms and problem.queries != problem.keys:
        return "its segments need as many queries as keys"
    return _cuda_only("this Pallas kernel")(problem)


def _triton_refuses(problem: Problem) -> str | None:
    if problem.device == "cuda":
        return None
    return f"the kernel runs natively on CUDA only; on {problem.device} it could only be interpreted, not timed"


# Scores alive at the peak, in bytes, as tests compare with measured peaks on a CPU in float32: ours keeps two
# copies, jax.nn three, eager torch two, SDPA's math two and a boolean. On CUDA with two-byte inputs, from the
# operations: float32 logits and two-byte weights (XLA), two-byte logits and float32 weights (eager),
# everything in float32 (math).
_HALVES = (("cuda", "bfloat16"), ("cuda", "float16"))
_NAIVE_SCORES = {("cpu", "float32"): 8.0} | dict.fromkeys(_HALVES, 6.0)
_JAX_NN_SCORES = {("cpu", "float32"): 12.0} | dict.fromkeys(_HALVES, 6.0)
_EAGER_SCORES = {("cpu", "float32"): 8.0} | dict.fromkeys(_HALVES, 6.0)
_MATH_SCORES = {("cpu", "float32"): 9.0} | dict.fromkeys(_HALVES, 9.0)

ADAPTERS = {
    adapter.name: adapter
    for adapter in (
        Adapter("jaxattn-naive", "jaxattn naive", "jax", _jaxattn("naive"), score_bytes=_NAIVE_SCORES),
        Adapter("jaxattn-blockwise", "jaxattn blockwise", "jax", _jaxattn("blockwise"), tiled=True),
        Adapter("jaxattn-triton", "jaxattn triton", "jax", _jaxattn("triton"), _triton_refuses, tiled=True),
        Adapter("jax-nn-xla", "jax.nn xla", "jax", _jax_nn("xla"), score_bytes=_JAX_NN_SCORES),
        Adapter("jax-nn-cudnn", "jax.nn cudnn", "jax", _jax_nn("cudnn"), _cuda_only("cuDNN"), tiled=True),
        Adapter("pallas-ops", "jax pallas.ops.gpu", "jax", _pallas_ops, _pallas_ops_refuses, tiled=True),
        Adapter(
            "tokamax-triton", "tokamax triton", "jax", _tokamax("triton"), _cuda_only("it"), tiled=True, needs="tokamax"
        ),
        Adapter(
            "tokamax-mosaic", "tokamax mosaic", "jax", _tokamax("mosaic"), _cuda_only("it"), tiled=True, needs="tokamax"
        ),
        Adapter(
            "tokamax-cudnn", "tokamax cudnn", "jax", _tokamax("cudnn"), _cuda_only("cuDNN"), tiled=True, needs="tokamax"
        ),
        Adapter("tokamax-xla", "tokamax xla", "jax", _tokamax("xla"), needs="tokamax"),
        Adapter(
            "tokamax-xla-chunked", "tokamax xla chunked", "jax", _tokamax("xla_chunked"), tiled=True, needs="tokamax"
        ),
        Adapter("torch-eager", "torch eager", "torch", _torch_eager, score_bytes=_EAGER_SCORES, extra_queries=2),
        Adapter(
            "torch-sdpa-math",
            "torch SDPA math",
            "torch",
            _torch_sdpa("MATH"),
            score_bytes=_MATH_SCORES,
            extra_queries=4,
        ),
        Adapter("torch-sdpa-flash", "torch SDPA flash", "torch", _torch_sdpa("FLASH_ATTENTION"), tiled=True),
        Adapter(
            "torch-sdpa-efficient",
            "torch SDPA efficient",
            "torch",
            _torch_sdpa("EFFICIENT_ATTENTION"),
            _cuda_only("the memory-efficient backend"),
            tiled=True,
        ),
        Adapter(
            "torch-sdpa-cudnn",
            "torch SDPA cuDNN",
            "torch",
            _torch_sdpa("CUDNN_ATTENTION"),
            _cuda_only("cuDNN"),
            tiled=True,
        ),
        Adapter("torch-flex", "torch FlexAttention", "torch", _torch_flex, tiled=True),
        Adapter(
            "jaxattn-layer",
            "jaxattn layer",
            "jax",
            _jaxattn_layer,
            _layer_refuses,
            tiled=True,
            layer=True,
            arrange=_jaxattn_layer_arrays,
        ),
        Adapter(
            "hf-eager-layer",
            "HF eager layer",
            "torch",
            _hf_layer("eager"),
            _layer_refuses,
            score_bytes=_EAGER_SCORES,
            extra_queries=2,
            layer=True,
        ),
        Adapter("hf-sdpa-layer", "HF sdpa layer", "torch", _hf_layer("sdpa"), _layer_refuses, tiled=True, layer=True),
    )
}


def find(name: str) -> Adapter:
    """The adapter of a name, or of a user's own function, written `module:function`.

    A user's function is called as `jax.nn.dot_product_attention` is (query, key, value and `is_causal=True`
    or a boolean `mask` where the case has one) with JAX arrays; `torch:module:function` gets torch tensors.

    Raises: ValueError that lists the names, for an unknown one.
    """
    if name in ADAPTERS:
        return ADAPTERS[name]
    parts = name.split(":")
    framework = parts.pop(0) if parts[0] == "torch" and len(parts) == 3 else "jax"
    if len(parts) != 2:
        raise ValueError(
            f"unknown implementation {name!r}; known: {', '.join(ADAPTERS)}; "
            "or your own function as module:function (JAX) or torch:module:function"
        )

    def build(problem: Problem) -> Callable:
        module, attribute = parts
        function = getattr(importlib.import_module(module), attribute)
        if framework == "jax":
            return _like_jax_nn(function, problem, windows=False)
        causal = problem.mask == "causal"
        allowed = None if causal else _torch_allowed(problem)
        if causal:
            return lambda query, key, value: function(query, key, value, is_causal=True)
        if allowed is None:
            return function
        return lambda query, key, value: function(query, key, value, mask=allowed)

    return Adapter(name, name, framework, build, tiled=None)
