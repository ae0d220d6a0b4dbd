"""Hugging Face's own attention layer with every stage captured: what jaxattn's layer must equal.

Three runs of the same module on the same inputs make a case: in float64 (what is right), in the dtype under
test (what plain torch achieves), and with every term in absolute value (how large rounding errors may be).

Design fact: nothing of the layer is rewritten here. Projections are seen by forward hooks, rotated queries
and keys by registering an attention function with transformers that calls its eager one. Only the float64
softmax is ours: transformers' eager attention computes the softmax in float32 whatever the inputs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from oracle import attention
from oracle.attention import Target, to_numpy, to_torch

STAGES = (
    "query",
    "key",
    "value",
    "rotated_query",
    "rotated_key",
    "log_sum_exp",
    "context",
    "output",
)
_CAPTURE = "jaxattn_oracle_capture"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class Second:
    """The stages of a layer in the dtype under test, computed by torch on another device than the CPU."""

    device: str
    stages: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's inputs and, for each stage, what it should be and how near a result must come.

    x: [B, T, D] in the dtype under test. positions: int [B, T]. mask: boolean [B, 1, T, T]. inv_freq:
    float32 [R / 2]. weights: Hugging Face's names -> arrays in the dtype under test. targets: stage ->
    `Target`, heads as [B, T, N, H]. second: what torch gives on a second device, where it was asked for.
    """

    x: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    weights: dict[str, np.ndarray]
    targets: dict[str, Target]
    plain_output: np.ndarray
    inv_freq: np.ndarray
    attention_scaling: float
    scale: float
    second: Second | None = None


def layer_case(
    model, x: np.ndarray, dtype: str, *, layer: int = 0, positions=None, mask=None, device: str | None = None
) -> Case:
    """Run one attention layer of a Hugging Face model on x, three times, and keep every stage.

    Args:
      model: a causal language model of transformers whose layers have `self_attn` (Llama; StableLM for
      partial RoPE). x: [B, T, D], the attention layer's input; rounded to `dtype` before anything is run.
      dtype: "float32", "bfloat16", "float16" or "float64". layer: which layer. positions: int [T] or [B, T];
      None counts from 0. mask: boolean [B|1, 1, T, T]; None is causal. It is passed explicitly: the eager
      layer without one is not causal. device: of torch's ("cuda"), on which the layer is run once more.

    Returns: a `Case`. What is right, and how near a result must come, is computed on the CPU.

    >>> from oracle import checkpoint
    >>> x = np.random.default_rng(0).normal(size=(1, 6, 32))
    >>> layer_case(checkpoint.random_model(checkpoint.TINY), x, "float32").targets["key"].value.shape
    (1, 6, 2, 16)
    """
    rotary = model.model.rotary_emb
    return _case(model.model.layers[layer].self_attn, rotary, rotary, run_stages, x, dtype, positions, mask, device)


def file_case(
    tensors: dict[str, np.ndarray], x: np.ndarray, dtype: str, *, positions=None, mask=None, device: str | None = None
) -> Case:
    """As `layer_case`, for the tensors of a layer file and without transformers: the layer is written out in
    torch.

    Args: tensors: of `layer_weights`, all dimensions of a head rotated (H = 2 * len(inv_freq)). Others as
    there.

    >>> from oracle import checkpoint
    >>> tensors = layer_weights(checkpoint.random_model(checkpoint.TINY))
    >>> file_case(tensors, np.ones((1, 3, 32)), "float32").targets["output"].value.shape
    (1, 3, 32)
    """
    module = WrittenOut(tensors)
    return _case(module, module.tables, module, WrittenOut.stages, x, dtype, positions, mask, device)


def _case(module, rotary, frequencies, run, x, dtype: str, positions, mask, device: str | None) -> Case:
    B, T, _ = x.shape
    x = to_torch(np.asarray(x, np.float64)).to(_DTYPES[dtype])
    positions = np.broadcast_to(np.arange(T) if positions is None else positions, (B, T)).copy()
    mask = np.tril(np.ones((T, T), bool))[None, None] if mask is None else np.asarray(mask)
    # The float64 module holds the weights that the dtype under test can hold.
    tested = copy.deepcopy(module).to(_DTYPES[dtype]).eval()
    exact = copy.deepcopy(tested).double()
    right = target = run(exact, rotary, x.double(), positions, mask)
    if dtype == "float64":
        # As `attention.accuracy_bound` does: float64's own error is seen in float32 and scaled.
        coarse, coarse_x = copy.deepcopy(tested).float(), x.float()
        target = run(copy.deepcopy(coarse).double(), rotary, coarse_x.double(), positions, mask)
        ratio = attention.unit_roundoff(np.float64) / attention.unit_roundoff(np.float32)
    else:
        coarse, coarse_x, ratio = tested, x, 1.0
    near = run(coarse, rotary, coarse_x, positions, mask)
    second = None
    if device is not None:
        there = copy.deepcopy(tested).to(device)
        second = Second(device, run(there, rotary, x.to(device), positions, mask))
    size = _absolute_stages(exact, rotary, x.double(), positions, mask, right)
    unit = np.dtype(to_numpy(x).dtype)
    targets = {}
    for stage in STAGES:
        plain_rmse = ratio * attention.rmse(near[stage], target[stage])
        targets[stage] = Target(right[stage], plain_rmse, attention.allowed(plain_rmse, size[stage], unit))
    return Case(
        x=to_numpy(x),
        positions=positions,
        mask=mask,
        weights={name: to_numpy(value) for name, value in tested.state_dict().items()},
        targets=targets,
        plain_output=near["output"],
        inv_freq=to_numpy(frequencies.inv_freq).astype(np.float64),
        attention_scaling=float(frequencies.attention_scaling),
        scale=float(module.scaling),
        second=second,
    )


class WrittenOut(torch.nn.Module):
    """Llama's attention layer in plain torch, from the tensors of a layer file.

    Args: tensors: Hugging Face's names -> arrays, with `inv_freq` and `attention_scaling`.

    Raises: ValueError where the tensors are not those of a layer, listing what is missing, or do not fit each
    other.
    """

    def __init__(self, tensors: dict[str, np.ndarray]):
        super().__init__()
        names = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "inv_freq", "attention_scaling"]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"the layer file lacks {', '.join(missing)}; it has {sorted(tensors)}")
        shapes = {name: np.shape(tensors[name]) for name in names}
        if not _is_layer(*shapes.values()):
            raise ValueError(
                "the layer file's shapes must be q_proj [N H, D], k_proj and v_proj [K H, D], o_proj [D, N H], "
                f"inv_freq [H / 2], attention_scaling []; they are {shapes}"
            )
        self.inv_freq = torch.from_numpy(np.asarray(tensors["inv_freq"], np.float32))
        self.attention_scaling = float(tensors["attention_scaling"])
        self.head_dim = 2 * len(self.inv_freq)
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = tensors["q_proj.weight"].shape[0] // tensors["k_proj.weight"].shape[0]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight, bias = tensors[name + ".weight"], tensors.get(name + ".bias")
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = torch.nn.Parameter(to_torch(weight), requires_grad=False)
            if bias is not None:
                linear.bias = torch.nn.Parameter(to_torch(bias), requires_grad=False)
            setattr(self, name, linear)

    def tables(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, T, H] in x's dtype, computed in float32."""
        angles = positions[..., None].float() * self.inv_freq.to(positions.device)
        angles = torch.cat([angles, angles], -1)
        return tuple((f(angles) * self.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin))

    @torch.no_grad()
    def stages(self, rotary, x: torch.Tensor, positions: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """What `run_stages` gives for Hugging Face's module."""
        query, key, value = (
            f(x).view(*x.shape[:2], -1, self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (table[:, :, None] for table in rotary(x, torch.from_numpy(positions).to(x.device)))

        def rotate(y):
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat([-b, a], -1) * sin

        rotated_query, rotated_key = rotate(query), rotate(key)
        keys, values = (y.repeat_interleave(self.num_key_value_groups, 2) for y in (rotated_key, value))
        logits = torch.einsum("btnh,bsnh->bnts", rotated_query, keys) * self.scaling
        logits = logits.masked_fill(~torch.from_numpy(np.array(mask)).to(x.device), torch.finfo(x.dtype).min)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = torch.softmax(logits, -1, dtype=wide).to(x.dtype)
        context = torch.einsum("bnts,bsnh->btnh", weights, values)
        stages = {
            "query": query,
            "key": key,
            "value": value,
            "rotated_query": rotated_query,
            "rotated_key": rotated_key,
            "log_sum_exp": torch.logsumexp(logits.to(wide), -1).transpose(1, 2),
            "context": context,
            "output": self.o_proj(context.flatten(2)),
        }
        return {name: to_numpy(y) for name, y in stages.items()}


def _is_layer(query, key, value, output, inv_freq, attention_scaling) -> bool:
    """Whether these shapes are those of one attention layer."""
    if [len(shape) for shape in (query, key, inv_freq)] != [2, 2, 1] or 0 in (*query, *key, *inv_freq):
        return False
    (rows, D), (kv_rows, _), H = query, key, 2 * inv_freq[0]
    fits = rows % kv_rows == 0 and kv_rows % H == 0
    return fits and (key, value, output, attention_scaling) == ((kv_rows, D), (kv_rows, D), (D, rows), ())


def run_stages(
    module, rotary, x: torch.Tensor, positions: np.ndarray, mask: np.ndarray, kind: str | None = None
) -> dict[str, np.ndarray]:
    """Run a Hugging Face attention module once and return what its hooks saw, heads as [B, T, N, H].

    Args: module: a `self_attn`. rotary: the model's rotary embedding. x: [B, T, D] in the module's dtype.
      positions: int [B, T]. mask: boolean [B|1, 1, T, T], True where attention is allowed. kind: an
      attention of transformers' ("sdpa") to use as it is, unseen; None is the eager one, with its stages.

    >>> from oracle import checkpoint
    >>> model = checkpoint.random_model(checkpoint.TINY)
    >>> x, mask = torch.ones(1, 3, 32), np.tril(np.ones((1, 1, 3, 3), bool))
    >>> stages = run_stages(model.model.layers[0].self_attn, model.model.rotary_emb, x, np.arange(3)[None], mask)
    >>> stages["log_sum_exp"].shape
    (1, 3, 4)
    """
    seen: dict[str, np.ndarray] = {}
    heads = (*x.shape[:2], -1, module.head_dim)
    names = {"query": module.q_proj, "key": module.k_proj, "value": module.v_proj}
    handles = [
        projection.register_forward_hook(lambda _m, _i, y, name=name: seen.update({name: to_numpy(y.view(heads))}))
        for name, projection in names.items()
    ]
    allowed = torch.from_numpy(np.array(np.broadcast_to(mask, (x.shape[0], 1, *mask.shape[2:]))))
    additive = torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min).to(x.device)
    with torch.no_grad(), _capturing(module, seen, kind):
        tables = rotary(x, torch.from_numpy(positions).to(x.device))
        try:
            output, _ = module(hidden_states=x, position_embeddings=tables, attention_mask=additive)
        finally:
            for handle in handles:
                handle.remove()
    return {**seen, "output": to_numpy(output)}


def logits(model, rows: list[np.ndarray]) -> list[np.ndarray]:
    """The logits [T, V], float64, of each row of tokens alone: padded ones give NaN in transformers' float64 softmax.

    Args: model: a causal language model of transformers, on any device. rows: int [T] each.

    >>> from oracle import checkpoint
    >>> logits(checkpoint.random_model(checkpoint.TINY), [np.arange(5)])[0].shape
    (5, 64)
    """
    with torch.no_grad():
        tokens = [torch.from_numpy(np.asarray(row, np.int64))[None].to(model.device) for row in rows]
        return [to_numpy(model(row).logits[0].double()) for row in tokens]


def greedy(model, tokens: np.ndarray, new_tokens: int, real: np.ndarray | None = None) -> np.ndarray:
    """Greedy continuations by transformers' own `generate` with its KV cache: int [B, new_tokens].

    The checkpoint's own generation settings (repetition penalty, length, end tokens, ...) are left out: they are
    not greedy.

    Args: model: as in `logits`. tokens: int [B, T]. real: boolean [B, T], False for padding on the left.

    >>> from oracle import checkpoint
    >>> greedy(checkpoint.random_model(checkpoint.TINY), np.arange(5)[None], 3).shape
    (1, 3)
    """
    from transformers import GenerationConfig

    options = dict(max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
    kept, model.generation_config = model.generation_config, GenerationConfig()
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    attended = torch.ones_like(ids) if real is None else torch.from_numpy(real.astype(np.int64))
    try:
        done = model.generate(ids, attention_mask=attended, generation_config=GenerationConfig(**options))
    finally:
        model.generation_config = kept
    return done[:, ids.shape[1] :].numpy()


def attention_input(model, tokens: np.ndarray, *, layer: int = 0) -> np.ndarray:
    """What a model's attention layer is given for these tokens: embedded, through the layers before,
    normalised.

    Args: model: a causal language model of transformers. tokens: int [B, T]. layer: which layer.
    Returns: [B, T, D] in the model's dtype.

    >>> from oracle import checkpoint
    >>> attention_input(checkpoint.random_model(checkpoint.TINY), np.arange(5)[None]).shape
    (1, 5, 32)
    """
    caught = {}

    class Enough(Exception):
        pass

    def catch(_module, _args, kwargs):
        caught["x"] = kwargs["hidden_states"]
        raise Enough

    handle = model.model.layers[layer].self_attn.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad(), contextlib.suppress(Enough):
        try:
            model.model(input_ids=torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False)
        finally:
            handle.remove()
    return to_numpy(caught["x"])


def hugging_face_is_sound(model, x: np.ndarray, *, layer: int = 0) -> list[str]:
    """Whether the oracle itself can be trusted on x: what is wrong with it, nothing where it is sound.

    Checked in float32: with the explicit causal mask a change of the last token changes no earlier output,
    and the eager and the sdpa attention of transformers agree to 1e-5 of the output's scale.

    Args: model, x [B, T, D], layer: as `layer_case`.
    Returns: one sentence per problem.

    >>> from oracle import checkpoint
    >>> hugging_face_is_sound(checkpoint.random_model(checkpoint.TINY), np.ones((1, 5, 32)))
    []
    """
    module = copy.deepcopy(model.model.layers[layer].self_attn).float().eval()
    B, T, _ = x.shape
    mask, positions = np.tril(np.ones((T, T), bool))[None, None], np.broadcast_to(np.arange(T), (B, T)).copy()
    x = torch.from_numpy(np.asarray(x, np.float32))
    changed = x.clone()
    changed[:, -1] += 1.0

    def output(x, kind=None):
        return run_stages(module, model.model.rotary_emb, x, positions, mask, kind)["output"]

    eager, problems = output(x), []
    if not np.array_equal(eager[:, :-1], output(changed)[:, :-1]):
        problems.append("Hugging Face's layer is not causal under the explicit causal mask")
    if np.array_equal(eager[:, -1], output(changed)[:, -1]):
        problems.append("a change of the last token does not change the last output")
    difference = np.abs(eager - output(x, "sdpa")).max()
    if not difference <= 1e-5 * np.abs(eager).max():
        problems.append(f"Hugging Face's eager and sdpa attention differ by {difference:.3g}")
    return problems


def layer_weights(model, layer: int = 0) -> dict[str, np.ndarray]:
    """An attention layer's weights under Hugging Face's names, with `inv_freq` and `attention_scaling`.

    >>> from oracle import checkpoint
    >>> sorted(layer_weights(checkpoint.random_model(checkpoint.TINY)))
    ['attention_scaling', 'inv_freq', 'k_proj.weight', 'o_proj.weight', 'q_proj.weight', 'v_proj.weight']
    """
    state = model.model.layers[layer].self_attn.state_dict()
    rotary = model.model.rotary_emb
    return {name: to_numpy(value) for name, value in state.items()} | {
        "inv_freq": to_numpy(rotary.inv_freq),
        "attention_scaling": np.float32(rotary.attention_scaling),
    }


def peakedness(stages: dict[str, np.ndarray], mask: np.ndarray) -> float:
    """Median over rows (all heads and queries) of the largest attention probability.

    Args: stages: of `run_stages`. mask: boolean [B|1, 1, T, T].

    >>> flat = np.zeros((1, 4, 1, 2))
    >>> peakedness({"rotated_query": flat, "rotated_key": flat, "log_sum_exp": np.full((1, 4, 1), np.log(4))},
    ...            np.ones((1, 1, 4, 4), bool))
    0.25
    """
    q, k = (np.asarray(stages[name], np.float64) for name in ("rotated_query", "rotated_key"))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits_BNTS = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    largest = np.where(mask, logits_BNTS, -np.inf).max(-1) - np.asarray(stages["log_sum_exp"]).swapaxes(1, 2)
    return float(np.median(np.exp(largest)))


@contextlib.contextmanager
def _capturing(module, seen: dict[str, np.ndarray], kind: str | None) -> Iterator[None]:
    """Route the module's attention through a function that keeps what it is given and what it gives."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

    def capture(module, query, key, value, attention_mask, scaling, dropout=0.0, **_others):
        key_states = repeat_kv(key, module.num_key_value_groups)
        logits = query @ key_states.transpose(2, 3) * scaling + attention_mask
        if query.dtype == torch.float64:
            weights = torch.softmax(logits, -1)
            context = (weights @ repeat_kv(value, module.num_key_value_groups)).transpose(1, 2).contiguous()
        else:
            context, weights = eager_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout
            )
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = torch.logsumexp(logits.to(wide), -1)
        stages = {"rotated_query": query, "rotated_key": key, "context": context.transpose(1, 2), "log_sum_exp": lse}
        seen.update({name: to_numpy(value.transpose(1, 2)) for name, value in stages.items()})
        return context, weights

    ALL_ATTENTION_FUNCTIONS.register(_CAPTURE, capture)
    before = module.config._attn_implementation
    module.config._attn_implementation = _CAPTURE if kind is None else kind
    try:
        yield
    finally:
        module.config._attn_implementation = before


def _absolute_stages(module, rotary, x, positions, mask, right) -> dict[str, np.ndarray]:
    """Each stage's formula with every term in absolute value, given exact earlier stages where it is not
    linear.

    Rotated queries and keys are sums over x and the projection's weights, the context is a sum over the
    values and theirs. The logits are products: |q| |k| for their own rounding, and for that of q and k,
    independent from one dimension to the next, the root of the sum of squares of (|x| |wq|) k and q (|x|
    |wk|).
    """
    H = module.head_dim

    def project(projection, y):
        with torch.no_grad():
            z = y @ projection.weight.abs().T
            return z if projection.bias is None else z + projection.bias.abs()

    def heads(y):
        return to_numpy(y.view(*y.shape[:2], -1, H))

    projections = {"query": module.q_proj, "key": module.k_proj, "value": module.v_proj}
    size = {name: heads(project(projection, x.abs())) for name, projection in projections.items()}
    cos, sin = (np.abs(to_numpy(table))[:, :, None] for table in rotary(x, torch.from_numpy(positions)))
    R = cos.shape[-1]
    for name in ("query", "key"):
        turned = size[name].copy()
        swapped = np.concatenate([turned[..., R // 2 : R], turned[..., : R // 2]], -1)
        turned[..., :R] = turned[..., :R] * cos + swapped * sin
        size["rotated_" + name] = turned
    repeat = module.num_key_value_groups
    exact_q, exact_k = right["rotated_query"], np.repeat(right["rotated_key"], repeat, 2)
    logits_BNTS = module.scaling * np.einsum("btnh,bsnh->bnts", exact_q, exact_k)
    p_BNTS = np.where(mask, np.exp(logits_BNTS - right["log_sum_exp"].swapaxes(1, 2)[..., None]), 0)
    size_q, size_k = size["rotated_query"], np.repeat(size["rotated_key"], repeat, 2)
    own_BNTS = np.einsum("btnh,bsnh->bnts", np.abs(exact_q), np.abs(exact_k))
    inputs_BNTS = np.einsum("btnh,bsnh->bnts", size_q**2, exact_k**2)
    inputs_BNTS += np.einsum("btnh,bsnh->bnts", exact_q**2, size_k**2)
    lse_BNT = abs(module.scaling) * (p_BNTS * (own_BNTS + np.sqrt(inputs_BNTS))).sum(-1)
    size["log_sum_exp"] = np.abs(right["log_sum_exp"]) + lse_BNT.swapaxes(1, 2)
    size["context"] = np.einsum("bnts,bsnh->btnh", p_BNTS, np.repeat(size["value"], repeat, 2))
    own, inputs = (torch.from_numpy(y).reshape(*x.shape[:2], -1) for y in (np.abs(right["context"]), size["context"]))
    with torch.no_grad():
        inputs = torch.sqrt(inputs**2 @ module.o_proj.weight.T**2)
    size["output"] = to_numpy(project(module.o_proj, own) + inputs)
    return size
