"""Llama checkpoints without torch: the configuration, the table of names, and loading.

Hugging Face folders (`config.json` in both of its shapes, safetensors in one file or sharded) are read here;
a mapping from Hugging Face's names to arrays is the meeting point with every other format, which
`oracle.checkpoint` reads.

Design fact: one table says which tensor becomes which parameter, as axes: "(N H) D -> D N H". Expected
shapes, checks, conversion and its inverse all follow from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jaxattn import nn, rope

_ATTENTION = {
    "q_proj.weight": ("wq", "(N H) D -> D N H"),
    "k_proj.weight": ("wk", "(K H) D -> D K H"),
    "v_proj.weight": ("wv", "(K H) D -> D K H"),
    "o_proj.weight": ("wo", "D (N H) -> N H D"),
}
_ATTENTION_BIAS = {
    "q_proj.bias": ("bq", "(N H) -> N H"),
    "k_proj.bias": ("bk", "(K H) -> K H"),
    "v_proj.bias": ("bv", "(K H) -> K H"),
    "o_proj.bias": ("bo", "D -> D"),
}
_BLOCK = {
    "input_layernorm.weight": ("attention_norm.scale", "D -> D"),
    "post_attention_layernorm.weight": ("mlp_norm.scale", "D -> D"),
    "mlp.gate_proj.weight": ("mlp.wg", "F D -> D F"),
    "mlp.up_proj.weight": ("mlp.wu", "F D -> D F"),
    "mlp.down_proj.weight": ("mlp.wd", "D F -> F D"),
}
_MLP_BIAS = {
    "mlp.gate_proj.bias": ("mlp.bg", "F -> F"),
    "mlp.up_proj.bias": ("mlp.bu", "F -> F"),
    "mlp.down_proj.bias": ("mlp.bd", "D -> D"),
}
_MODEL = {
    "model.embed_tokens.weight": ("embedding", "V D -> V D"),
    "model.norm.weight": ("norm.scale", "D -> D"),
}
_UNTIED = {"lm_head.weight": ("unembedding", "V D -> V D")}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MORE_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
# Entries of a tensor that are looked at, or brought into another order, at a time.
_PIECE = 1 << 20
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes and rules of a Llama model, in this library's letters.

    Args:
      vocab_size: V. d_model: D. d_mlp: F. n_layers: number of blocks.
      n_heads: N. n_kv_heads: K. head_dim: H; H * N may differ from D.
      rope: rotation of queries and keys. rms_eps: added to the mean square in RMSNorm.
      max_length: positions the model was made for.
      tied_embeddings: the output projection is the embedding. attention_bias, mlp_bias: biases on all
      projections. eos_ids: tokens that end a generation. dtype: of the stored weights.

    Raises: ValueError where N is no multiple of K.
    """

    vocab_size: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: rope.RopeConfig
    rms_eps: float = 1e-5
    max_length: int = 131072
    tied_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")

    @classmethod
    def from_hf(cls, config: Mapping) -> LlamaConfig:
        """From a parsed `config.json` of Hugging Face, old shape (`rope_theta`, `rope_scaling`) or new
        (`rope_parameters`).

        Raises: ValueError for another model type or activation, a missing size, an entry that is no number, or
        neither true nor false, where one should be, a partial rotary factor (which transformers' Llama ignores),
        or an unknown RoPE rule.

        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=1)
        >>> LlamaConfig.from_hf(sizes | {"num_attention_heads": 2, "rope_theta": 5e5}).head_dim
        4
        """
        kind, activation = config.get("model_type", "llama"), config.get("hidden_act", "silu")
        if kind != "llama" or activation != "silu":
            raise ValueError(f"model_type={kind!r}, hidden_act={activation!r} must be 'llama' and 'silu'")
        missing = [name for name in _SIZES if config.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        _check_numbers(config)
        V, D, F, layers, N = (config[name] for name in _SIZES)
        rotation = rope.from_hf(config)
        if rotation.rotary_dim != rotation.head_dim:
            raise ValueError(
                f"the config rotates {rotation.rotary_dim} of {rotation.head_dim} dimensions, but transformers' "
                f"Llama ignores partial_rotary_factor; remove it, or build an nn.Attention with this RopeConfig"
            )
        eos = config.get("eos_token_id")
        return cls(
            vocab_size=V,
            d_model=D,
            d_mlp=F,
            n_layers=layers,
            n_heads=N,
            n_kv_heads=config.get("num_key_value_heads") or N,
            head_dim=config.get("head_dim") or D // N,
            rope=rotation,
            rms_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_length=config.get("max_position_embeddings") or 2048,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> LlamaConfig:
        """From the `config.json` in a folder.

        Raises: FileNotFoundError where there is none; ValueError where it is no JSON object, and as
        `from_hf`.
        """
        return cls.from_hf(_read_json(Path(folder) / "config.json"))

    def size(self, letter: str) -> int:
        """The length of an axis by its letter: V, D, F, N, K or H."""
        sizes = dict(
            V=self.vocab_size,
            D=self.d_model,
            F=self.d_mlp,
            N=self.n_heads,
            K=self.n_kv_heads,
            H=self.head_dim,
        )
        return sizes[letter]


def attention_table(config: LlamaConfig) -> dict[str, tuple[str, str]]:
    """Hugging Face's names in one attention layer -> (parameter of `nn.Attention`, axes "theirs -> ours").

    >>> attention_table(LLAMA_3_2_1B)["k_proj.weight"]
    ('wk', '(K H) D -> D K H')
    """
    return _ATTENTION | (_ATTENTION_BIAS if config.attention_bias else {})


def block_table(config: LlamaConfig) -> dict[str, tuple[str, str]]:
    """Hugging Face's names in one block -> (parameter of `nn.Block`, axes "theirs -> ours").

    >>> block_table(LLAMA_3_2_1B)["self_attn.k_proj.weight"]
    ('attention.wk', '(K H) D -> D K H')
    """
    attention = attention_table(config).items()
    inside = {f"self_attn.{name}": (f"attention.{ours}", axes) for name, (ours, axes) in attention}
    return inside | _BLOCK | (_MLP_BIAS if config.mlp_bias else {})


def model_table(config: LlamaConfig) -> dict[str, tuple[str, str]]:
    """Hugging Face's names in the whole model -> (parameter of `nn.Transformer`, axes). Parameters of block
    i are named "blocks.i.attention.wq" and so on, and lie at index i of the stacked array.

    >>> model_table(LLAMA_3_2_1B)["model.layers.15.mlp.gate_proj.weight"]
    ('blocks.15.mlp.wg', 'F D -> D F')
    """
    table = _MODEL | ({} if config.tied_embeddings else _UNTIED)
    for i in range(config.n_layers):
        block = block_table(config).items()
        table |= {f"model.layers.{i}.{name}": (f"blocks.{i}.{ours}", axes) for name, (ours, axes) in block}
    return table


def model_names(config: LlamaConfig, tensors: Mapping[str, Any]) -> list[str]:
    """The names of a checkpoint that belong to the model: all but those that carry no information.

    Left out are `lm_head.weight` where the embeddings are tied (it is the embedding again) and the
    `inv_freq` buffers of old checkpoints (the configuration says them).
    """
    return [
        name
        for name in tensors
        if not (config.tied_embeddings and name in _UNTIED) and not name.endswith("rotary_emb.inv_freq")
    ]


def load_attention(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    prefix: str = "",
    freqs: rope.Frequencies | None = None,
    implementation: Any = None,
    dtype: Any = None,
    param_dtype: Any = None,
) -> nn.Attention:
    """One attention layer with a checkpoint's weights.

    Args:
      config: sizes, biases, RoPE.
      tensors: Hugging Face's names -> arrays ("q_proj.weight" [N*H, D], ...), perhaps among many others.
      prefix: stands before each name, as "model.layers.0.self_attn.".
      freqs: frequencies to use instead of those of `config.rope`.
      implementation, dtype: as in `nn.Attention`. param_dtype: of the parameters; None keeps each tensor's.

    Returns: an `nn.Attention`.
    Raises: ValueError that lists every missing, extra (under the prefix) or misshaped tensor; for NaN or infinite
    weights, and those that are infinite in param_dtype.

    >>> rows = {"q_proj": 2048, "k_proj": 512, "v_proj": 512, "o_proj": 2048}
    >>> tensors = {f"{name}.weight": np.zeros((n, 2048), np.float32) for name, n in rows.items()}
    >>> layer = load_attention(LLAMA_3_2_1B, tensors)
    >>> layer.wk.shape
    (2048, 8, 64)
    """
    table = attention_table(config)
    inside = [name for name in model_names(config, tensors) if name.startswith(prefix)]
    check_tensors({prefix + name: axes for name, (_, axes) in table.items()}, tensors, config, inside)
    layer = nnx.eval_shape(
        lambda: nn.Attention(
            config.d_model,
            config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            rope=config.rope if freqs is None else freqs,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            implementation=implementation,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
    )
    for name, (parameter, axes) in table.items():
        array = tensors[prefix + name]
        array = _cast(prefix + name, array, array.dtype if param_dtype is None else param_dtype)
        setattr(layer, parameter, nnx.Param(jnp.asarray(convert(array, axes, config))))
    return layer


def build(
    config: LlamaConfig,
    *,
    freqs: rope.Frequencies | None = None,
    implementation: Any = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: Any = None,
    rngs: nnx.Rngs,
) -> nn.Transformer:
    """A Llama model with initial weights.

    Args: config: sizes and rules. The others as in `nn.Attention` and `nn.Transformer`; freqs instead of
    those of
      `config.rope`.

    >>> model = nnx.eval_shape(lambda: build(LLAMA_3_2_1B, rngs=nnx.Rngs(0)))
    >>> model.blocks.attention.wq.shape
    (16, 2048, 32, 64)
    """
    common = dict(dtype=dtype, param_dtype=param_dtype)

    def block(rngs):
        attention = nn.Attention(
            config.d_model,
            config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            rope=config.rope if freqs is None else freqs,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            implementation=implementation,
            rngs=rngs,
            **common,
        )
        mlp = nn.GatedMLP(config.d_model, config.d_mlp, bias=config.mlp_bias, rngs=rngs, **common)
        norms = [nn.RMSNorm(config.d_model, eps=config.rms_eps, rngs=rngs, **common) for _ in range(2)]
        return nn.Block(attention, mlp, *norms)

    return nn.Transformer(
        config.vocab_size,
        config.d_model,
        config.n_layers,
        block,
        tied=config.tied_embeddings,
        eps=config.rms_eps,
        remat=remat,
        rngs=rngs,
        **common,
    )


def load(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    freqs: rope.Frequencies | None = None,
    implementation: Any = None,
    dtype: Any = None,
    param_dtype: Any = None,
) -> nn.Transformer:
    """A Llama model with a checkpoint's weights.

    Args:
      config: sizes and rules. tensors: Hugging Face's names -> arrays, read one at a time, such as
      `Safetensors`. param_dtype: of the parameters; None keeps that of the embedding. The others as in
      `build`.

    Returns: an `nn.Transformer`.
    Raises: ValueError that lists every missing, extra or misshaped tensor, for NaN or infinite weights, for those
    that are infinite in param_dtype, and where the embeddings are said to be tied and `lm_head.weight` is another.

    Example: `load(LlamaConfig.from_folder(folder), Safetensors(folder))`.
    """
    ours = "embedding" in tensors
    table = _checked_table(config, tensors, ours)
    if param_dtype is None:
        param_dtype = tensors["embedding" if ours else "model.embed_tokens.weight"].dtype
    model = nnx.eval_shape(
        lambda: build(
            config,
            freqs=freqs,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
        )
    )
    stacks: dict[str, np.ndarray] = {}
    for name, (path, axes) in table.items():
        array = _cast(name, tensors[path if ours else name], param_dtype)
        array = array if ours else convert(array, axes, config)
        outer, index, inner = _split_path(path)
        if index is None:
            stacks[outer] = array
        else:
            stack = stacks.setdefault(inner, np.empty((config.n_layers, *array.shape), array.dtype))
            stack[index] = array
    while stacks:
        path, array = stacks.popitem()
        *parents, last = path.split(".")
        owner = model
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, nnx.Param(jnp.asarray(array)))
    return model


def _split_path(path: str) -> tuple[str, int | None, str]:
    """ "blocks.3.mlp.wg" -> ("blocks", 3, "blocks.mlp.wg"), others -> (path, None, path)."""
    parts = path.split(".")
    if len(parts) > 1 and parts[1].isdigit():
        return parts[0], int(parts[1]), ".".join([parts[0], *parts[2:]])
    return path, None, path


def _sound(name: str, array: np.ndarray, where: str = "") -> np.ndarray:
    """The array, or an error that names it: another dtype, NaN, infinities. Looked at in pieces, to copy
    little."""
    if array.dtype.name not in DTYPES:
        raise ValueError(f"{name} has dtype {array.dtype}; weights must be one of {', '.join(DTYPES)}")
    flat, wrong = array.reshape(-1), 0
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        wrong += piece.size - int(np.isfinite(piece).sum())
    if wrong:
        raise ValueError(f"{name} has {wrong} weights of {array.size} that are NaN or infinite{where}")
    return array


def _cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """A sound array in the dtype that JAX makes of this one, or an error that names it where that cannot hold it."""
    array, dtype = _sound(name, array), jax.dtypes.canonicalize_dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        return _sound(name, array.astype(dtype), f" in {dtype}, though finite in {array.dtype}")


def convert(array: np.ndarray, axes: str, config: LlamaConfig, *, inverse: bool = False) -> np.ndarray:
    """Bring a tensor from Hugging Face's axes to ours, or back.

    Args: array: their tensor (with `inverse`: ours). axes: such as "(N H) D -> D N H". config: the axes'
    lengths.
    Returns: a view or copy with the same values and dtype.

    >>> convert(np.zeros((512, 2048)), "(K H) D -> D K H", LLAMA_3_2_1B).shape
    (2048, 8, 64)
    """
    theirs, ours = (side.split() for side in axes.split("->"))
    split = [letter.strip("()") for letter in theirs]
    order = [split.index(letter) for letter in ours]
    if inverse:
        return array.transpose(np.argsort(order)).reshape(shape_of(axes, config))
    return array.reshape([config.size(letter) for letter in split]).transpose(order)


def shape_of(axes: str, config: LlamaConfig) -> tuple[int, ...]:
    """The shape of Hugging Face's tensor: the left side of `axes`.

    >>> shape_of("(K H) D -> D K H", LLAMA_3_2_1B)
    (512, 2048)
    """
    shape, inside = [], False
    for letter in axes.split("->")[0].split():
        size = config.size(letter.strip("()"))
        if inside:
            shape[-1] *= size
        else:
            shape.append(size)
        inside = (inside or letter.startswith("(")) and not letter.endswith(")")
    return tuple(shape)


def check_tensors(
    expected: Mapping[str, str], tensors: Mapping[str, Any], config: LlamaConfig, names: Iterable[str] | None = None
) -> None:
    """Compare names and shapes with what a model needs.

    Args: expected: name -> axes. tensors: name -> array, as in `load`. names: those of it to look at;
    None is all.
    Raises: ValueError that lists every missing, extra and misshaped tensor.

    >>> check_tensors({"a": "D -> D"}, {"a": np.zeros(3), "b": np.zeros(1)}, LLAMA_3_2_1B)
    Traceback (most recent call last):
    ValueError: the tensors do not fit the configuration:
      extra: b (1,)
      misshaped: a (3,), should be (2048,)
    """
    shapes = {name: shape_of(axes, config) for name, axes in expected.items()}
    found = {name: _shape(tensors, name) for name in (tensors if names is None else names)}
    problems = [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in found]
    problems += [f"extra: {name} {shape}" for name, shape in found.items() if name not in shapes]
    for name, shape in shapes.items():
        if found.get(name, shape) != shape:
            problems.append(f"misshaped: {name} {found[name]}, should be {shape}")
    if problems:
        raise ValueError("the tensors do not fit the configuration:\n  " + "\n  ".join(problems))


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A tensor's shape; readers of files, as `Safetensors`, tell it without the tensor."""
    known = getattr(tensors, "shape", None)
    return tuple(np.shape(tensors[name])) if known is None else known(name)


def save_converted(folder: str | Path, config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write a checkpoint in our names and axes, `model.safetensors`, one tensor at a time.

    Every bit of every weight is kept; "model.layers.3.self_attn.q_proj.weight" [N H, D] becomes
    "blocks.3.attention.wq" [D, N, H]. The file appears when it is whole: an error leaves none.

    Args: folder: where; made where it is missing. config, tensors: as for `load`, in Hugging Face's names.
    Returns: the file's path.
    Raises: as `load`.
    """
    table = _checked_table(config, tensors)
    header, offset = {}, 0
    for name, (path, axes) in table.items():
        dtype, size = _sound_size(name, tensors[name])
        shape = shape_of(axes.split("->")[1], config)
        header[path] = dict(dtype=DTYPES[dtype], shape=shape, data_offsets=(offset, offset + size))
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, partial = folder / "model.safetensors", folder / f".model.safetensors.{os.getpid()}"
    try:
        with partial.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, (_, axes) in table.items():
                _write(file, convert(tensors[name], axes, config))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def check_checkpoint(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Everything that `load` looks at, without making a model: names, shapes, dtypes, NaN; one tensor at a time.

    Args: config, tensors: as for `load`, in Hugging Face's names.
    Raises: as `load`.
    """
    for name in _checked_table(config, tensors):
        _sound_size(name, tensors[name])


def _checked_table(
    config: LlamaConfig, tensors: Mapping[str, np.ndarray], ours: bool = False
) -> dict[str, tuple[str, str]]:
    """`model_table`, where the tensors (with `ours`: in our names) have its names and shapes."""
    if config.n_layers > len(tensors):  # before a table of them is made: the number is a file's claim
        raise ValueError(f"the configuration has {config.n_layers} layers, the checkpoint only {len(tensors)} tensors")
    table = model_table(config)
    if ours:
        check_tensors({path: axes.split("->")[1] for path, axes in table.values()}, tensors, config)
        return table
    check_tensors({name: axes for name, (_, axes) in table.items()}, tensors, config, model_names(config, tensors))
    head, embedding = (next(iter(names)) for names in (_UNTIED, _MODEL))
    if config.tied_embeddings and head in tensors and _digest(tensors[head]) != _digest(tensors[embedding]):
        raise ValueError(
            f"the configuration ties the embeddings, but {head} is not {embedding}: "
            f"set tie_word_embeddings to false, or take {head} out"
        )
    return table


def _digest(array: np.ndarray) -> tuple:
    """Equal for arrays with the same bits: two large ones need not be held at once to be compared."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return array.shape, array.dtype, hashlib.blake2b(content).digest()


def _sound_size(name: str, array: np.ndarray) -> tuple[str, int]:
    """The dtype's name and the bytes of a sound array, which is not kept."""
    return _sound(name, array).dtype.name, array.nbytes


def _write(file, array: np.ndarray) -> None:
    """The entries of an array in order, a piece at a time, so that an array in another order is not copied whole."""
    rows = max(1, _PIECE * len(array) // max(1, array.size))
    for start in range(0, len(array), rows):
        file.write(np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8).data)


class Safetensors(Mapping[str, np.ndarray]):
    """The tensors of a Hugging Face folder, read one at a time: `model.safetensors`, or shards with an index.

    Every header is read and checked when this is made; a tensor's data only when it is asked for. bfloat16 is
    ml_dtypes' dtype.

    Args: folder: holds `model.safetensors` or `model.safetensors.index.json`.

    Raises:
      FileNotFoundError: where there is neither, or a shard is missing.
      ValueError: for a broken or lying header, a tensor that is named twice, an index that does not match the
        shards, or a shard outside of the folder. When it is asked for: for a tensor of another dtype.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            self._file_of = dict.fromkeys(_tensor_names(single), single)
        elif index.is_file():
            self._file_of = read_index(index, ".safetensors", _tensor_names)
        else:
            raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}")

    def __getitem__(self, name: str) -> np.ndarray:
        with safe_open(self._file_of[name], "np") as file:
            dtype = file.get_slice(name).get_dtype()
            if dtype not in DTYPES.values():  # some of which NumPy has no name for
                raise ValueError(f"{name} has dtype {dtype}; weights must be one of {', '.join(DTYPES)}")
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        with safe_open(self._file_of[name], "np") as file:
            return tuple(file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
        with path.open("rb") as file:
            json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_each_once)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}") from error
    return names


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    if twice:
        raise ValueError(f"its header names these twice: {twice[:10]}")
    return dict(pairs)


def read_index(path: Path, suffix: str, names_in: Callable[[Path], Iterable[str]]) -> dict[str, Path]:
    """The file of each tensor by an index file (`weight_map`), each beside it, named *suffix, there, and as it says.

    Args: path: of the index. suffix: of the shards' names. names_in: the names of the tensors that a shard holds.
    Raises: ValueError for an index that is none, names other files, or disagrees with what the shards hold;
    FileNotFoundError for missing ones.
    """
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(x, str) for x in files.values()):
        raise ValueError(f"{path} has no weight_map of tensor names to file names")
    outside = sorted({x for x in files.values() if Path(x).name != x or not x.endswith(suffix)})
    if outside:
        raise ValueError(f"{path} names files that are no {suffix} beside it: {outside}")
    missing = sorted({x for x in files.values() if not (path.parent / x).is_file()})
    if missing:
        raise FileNotFoundError(f"{path} names shards that are missing: {missing}")
    held = {(name, x) for x in sorted(set(files.values())) for name in names_in(path.parent / x)}
    wrong = sorted({name for name, _ in held ^ files.items()})
    if wrong:
        raise ValueError(f"{path} and its shards disagree about where these tensors are: {wrong[:10]}")
    return {name: path.parent / x for name, x in files.items()}


def _check_numbers(config: Mapping) -> None:
    """Raise a ValueError that lists the entries of a `config.json` that are not what they must be."""
    wrong = [
        f"{name}={config[name]!r} must be a positive whole number"
        for name in (*_SIZES, *_MORE_SIZES)
        if config.get(name) is not None and not (type(config[name]) is int and config[name] > 0)
    ]
    wrong += [
        f"{name}={config[name]!r} must be true or false"
        for name in _SWITCHES
        if not isinstance(config.get(name), bool | None)
    ]
    eps = config.get("rms_norm_eps", 0)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        wrong.append(f"rms_norm_eps={eps!r} must be a number from 0 to 1")
    eos = config.get("eos_token_id")
    if not all(type(x) is int for x in (eos if isinstance(eos, list) else [] if eos is None else [eos])):
        wrong.append(f"eos_token_id={eos!r} must be a whole number or a list of them")
    if wrong:
        raise ValueError(f"config.json: {'; '.join(wrong)}")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no text, no JSON, numbers of thousands of digits; too deep
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


LLAMA_3_2_1B = LlamaConfig(
    vocab_size=128256,
    d_model=2048,
    d_mlp=8192,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    head_dim=64,
    rope=rope.RopeConfig(64, theta=500000.0, scaling=rope.Llama3(32.0, 1.0, 4.0, 8192)),
)
