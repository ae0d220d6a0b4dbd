"""Checkpoints: made from a seed with transformers, found by path or hub id, read from PyTorch's pickles.

No weights are shipped. `make` writes a Llama checkpoint with the shapes of Llama-3.2-1B's attention, through
transformers itself, so that the tests read what `save_pretrained` writes.

Design fact: the random weights are scaled so that attention is as peaked as a trained model's (median over
rows of the largest probability at least 0.3 at 256 tokens). Under flat attention the context is a mean of
the values whatever the positions, and a wrong RoPE passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch

from oracle.attention import to_numpy, to_torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Asked of the hub in turn, until the weights are there: many repositories hold the same ones in several forms.
_HUB_FILES = (
    ("*.json", "model*.safetensors", "tokenizer.model"),
    ("pytorch_model*.bin",),
    ("consolidated.*.pth",),
)
_HUB_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "consolidated.*.pth")
_META = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_META_BLOCK = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
# Whose rows Meta keeps in another order.
_ROTATED = ("q_proj.weight", "k_proj.weight")
# What of params.json is used: sizes that must be there, and numbers that have defaults.
_META_SIZES = ("dim", "n_heads", "n_layers")
_META_NUMBERS = (
    "n_kv_heads",
    "norm_eps",
    "max_seq_len",
    "rope_theta",
    "rope_scaling_factor",
    "rope_high_freq_factor",
)
# Each head's logits have about this standard deviation; 256 independent logits of it give a median largest
# probability near 0.5.
_LOGIT_STD = 5.0


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of a made checkpoint; the defaults are Llama-3.2-1B's but for the cut layers and vocabulary."""

    layers: int = 2
    vocabulary: int = 2048
    d_model: int = 2048
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    mlp: int = 8192
    rope: Literal["llama3", "default"] = "llama3"
    tied: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False


TINY = Shapes(layers=2, vocabulary=64, d_model=32, heads=4, kv_heads=2, head_dim=16, mlp=48)
# For implementations that compute one score, or interpret one instruction, at a time.
TINIEST = Shapes(layers=1, vocabulary=32, d_model=16, heads=2, kv_heads=1, head_dim=16, mlp=16)


def hf_config(shapes: Shapes = Shapes()):
    """The `transformers.LlamaConfig` of Llama-3.2-1B with these sizes.

    >>> hf_config().num_key_value_heads
    8
    """
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if shapes.rope == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.d_model,
        intermediate_size=shapes.mlp,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=shapes.tied,
        attention_bias=shapes.attention_bias,
        mlp_bias=shapes.mlp_bias,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )


def make(
    folder: str | Path,
    *,
    seed: int = 0,
    shapes: Shapes = Shapes(),
    dtype: str = "bfloat16",
    form: Literal["safetensors", "sharded", "bin"] = "safetensors",
) -> Path:
    """Write a Llama checkpoint with random, peaked weights, as `transformers` saves it.

    Args:
      folder: where to write; made where it is missing.
      seed: of torch's generator; the same seed gives the same file.
      shapes: sizes; the attention shapes are Llama-3.2-1B's by default (248 MB in bfloat16 with 2 layers).
      dtype: of the stored weights, "float32", "bfloat16" or "float16".
      form: one safetensors file, several with an index, or a PyTorch pickle (`pytorch_model.bin`).

    Returns: the folder.
    Raises: ValueError for an unknown dtype or form, before anything is written.

    >>> import tempfile
    >>> folder = make(tempfile.mkdtemp(), shapes=TINY)
    >>> sorted(path.name for path in folder.iterdir())[-1]
    'model.safetensors'
    """
    if dtype not in _DTYPES or form not in ("safetensors", "sharded", "bin"):
        raise ValueError(f"dtype={dtype!r} must be one of {sorted(_DTYPES)}, form={form!r} safetensors, sharded or bin")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(shapes, seed).to(_DTYPES[dtype])
    if form == "bin":
        model.config.save_pretrained(folder)
        state = {k: v for k, v in model.state_dict().items() if not (shapes.tied and k == "lm_head.weight")}
        torch.save(state, folder / "pytorch_model.bin")
    else:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size=size // 3 if form == "sharded" else "100GB")
    return folder


def random_model(shapes: Shapes = Shapes(), seed: int = 0):
    """A `LlamaForCausalLM` with random weights, float32, in eval mode, eager attention.

    Projections keep the activations' variance, but for q and k, whose scale makes the logits' standard
    deviation about 5; norms and biases vary, so that leaving one out shows.

    >>> random_model(TINY).config.num_hidden_layers
    2
    """
    from transformers import LlamaForCausalLM

    config = hf_config(shapes)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    # Rebuilt on the CPU: its frequencies are computed when it is made.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("norm.weight"):
                parameter.mul_(0.2).add_(1.0)
            elif name.endswith("bias"):
                parameter.mul_(0.1)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.mul_(0.05)
            else:
                parameter.mul_(parameter.shape[1] ** -0.5)
                if "q_proj" in name or "k_proj" in name:
                    parameter.mul_(_LOGIT_STD**0.5)
    model.tie_weights()
    return model


def find(checkpoint: str | Path) -> Path:
    """The local folder of a checkpoint: the path itself, or a hub id fetched by huggingface_hub.

    Args: checkpoint: a folder, or an id like "meta-llama/Llama-3.2-1B-Instruct".
    Of the forms in which a repository may hold its weights (safetensors, .bin, Meta's) only the first is
    fetched; nothing outside of its top folder.

    Returns: a folder with config.json or, in Meta's form, params.json.
    Raises: FileNotFoundError where it is neither a checkpoint folder nor an id that the hub gives, with the
    reason, or where the hub's repository holds no checkpoint.

    >>> import tempfile
    >>> find(make(tempfile.mkdtemp(), shapes=TINY)).is_dir()
    True
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        if (folder / "config.json").is_file() or (folder / "params.json").is_file():
            return folder
        raise FileNotFoundError(f"{folder} holds neither config.json nor params.json: it is no checkpoint folder")
    parts = str(checkpoint).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", ".."):
        raise FileNotFoundError(f"{checkpoint} is neither a folder nor a hub id of the form OWNER/NAME")
    from huggingface_hub import snapshot_download

    for patterns in _HUB_FILES:
        try:
            folder = Path(snapshot_download(str(checkpoint), allow_patterns=list(patterns), ignore_patterns=["*/*"]))
        except Exception as error:  # huggingface_hub, httpx and the operating system each have errors of their own
            raise FileNotFoundError(
                f"{checkpoint} is no local folder, and the hub did not give it: {first_line(error)}. For gated models "
                f"accept the licence on the model's page and run `hf auth login` first."
            ) from error
        described = (folder / "config.json").is_file() or (folder / "params.json").is_file()
        if described and any(file.match(pattern) for file in folder.iterdir() for pattern in _HUB_WEIGHTS):
            return folder
    raise FileNotFoundError(
        f"the hub's {checkpoint} holds no Llama checkpoint: it needs config.json with {_HUB_WEIGHTS[0]} or "
        f"{_HUB_WEIGHTS[1]}, or params.json with {_HUB_WEIGHTS[2]}"
    )


def load_model(checkpoint: str | Path, dtype: str = "float32", attention: str = "eager"):
    """Hugging Face's own model of a checkpoint, in eval mode; of Meta's form too, its tensors renamed.

    Args: checkpoint: folder or hub id. dtype: of weights and activations, "auto" for the stored one.
    attention: "eager", "sdpa".
    Returns: a transformers causal language model. Raises: FileNotFoundError as `find`; ValueError where files
    are broken or tensors missing.

    >>> import tempfile
    >>> load_model(make(tempfile.mkdtemp(), shapes=TINY)).dtype
    torch.float32
    """
    from transformers import AutoModelForCausalLM

    folder, dtypes = find(checkpoint), _DTYPES | {"float64": torch.float64, "auto": "auto"}
    if is_meta(folder):
        return _load_meta(folder, dtypes[dtype], attention)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtypes[dtype],
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and torch each have errors of their own for broken files
        raise ValueError(f"transformers cannot load {folder}: {first_line(error)}") from error
    # transformers would go on with random numbers.
    lacking = sorted(map(str, info["missing_keys"])) + sorted(str(names[0]) for names in info["mismatched_keys"])
    if lacking:
        raise ValueError(f"{folder} lacks these tensors, or has others of their shapes: {', '.join(lacking[:10])}")
    return model.eval()


def is_meta(folder: str | Path) -> bool:
    """Whether a checkpoint folder is in Meta's form: `params.json` without a `config.json`."""
    folder = Path(folder)
    return not (folder / "config.json").is_file() and (folder / "params.json").is_file()


def _load_meta(folder: Path, dtype: torch.dtype | str, attention: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = Meta(folder)
    if not {"model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"} <= set(tensors):
        raise ValueError(f"{folder} lacks tok_embeddings.weight or layers.0.feed_forward.w1.weight")
    config = LlamaConfig.from_dict(tensors.config)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    state = {name: to_torch(tensors[name]) for name in tensors}
    found = {name: tuple(x.shape) for name, x in state.items()}
    wrong = sorted({name for name, _ in expected.items() ^ found.items()})
    if wrong:
        raise ValueError(f"{folder} lacks these tensors, or has others of their shapes: {', '.join(wrong[:10])}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # Rebuilt on the CPU: its frequencies are computed when it is made.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return (model if dtype == "auto" else model.to(dtype)).eval()


def first_line(error: Exception) -> str:
    """The first line of an error's text with its type, which says the most where there is no text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Pickle(Mapping[str, np.ndarray]):
    """The tensors of PyTorch pickles by name, each made an array when it is asked for; bfloat16 as ml_dtypes'."""

    def __init__(self, tensors: dict[str, torch.Tensor | int | float]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return to_numpy(tensor) if isinstance(tensor, torch.Tensor) else np.float64(tensor)

    @classmethod
    def joined(cls, pickles: Iterable[Pickle]) -> Pickle:
        """Several as one, where no two have a name in common."""
        return cls({name: tensor for pickle in pickles for name, tensor in pickle._tensors.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without the tensor."""
        tensor = self._tensors[name]
        return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_pickle(path: str | Path) -> Pickle:
    """The tensors of a PyTorch pickle (`.bin`, `.pt`, `.pth`), with weights_only=True: no code in it is run.

    Args: path: a file that holds a dict of tensors; plain numbers in it become 0-dimensional float64 arrays.
    Returns: name -> array, memory-mapped where torch can.
    Raises: ValueError for a file that is broken, that holds anything but names with plain tensors, or code.

    >>> import tempfile
    >>> folder = make(tempfile.mkdtemp(), shapes=TINY, form="bin")
    >>> read_pickle(folder / "pytorch_model.bin")["model.norm.weight"].shape
    (32,)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a stream of wrong opcodes raises whatever the reader of pickles stumbles over
        forbidden = re.search(r"Unsupported (?:global|class|operand)[^\n.]*[\w.]+", str(error))
        reason = f"it holds more than tensors ({forbidden[0]})" if forbidden else first_line(error)
        raise ValueError(f"{path} cannot be read as a dict of tensors, and nothing in it was run: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must hold a dict of names and tensors")
    wrong = [
        repr(k) for k, v in content.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor | int | float)
    ]
    if wrong:
        raise ValueError(f"{path} must hold names with tensors; these entries are none: {', '.join(wrong[:10])}")
    for name, tensor in content.items():
        try:
            if isinstance(tensor, torch.Tensor):
                _check_plain(tensor)
        except (RuntimeError, TypeError, NotImplementedError) as error:  # what sparse and quantised ones raise
            raise ValueError(
                f"{path} cannot be read as a dict of plain tensors: {name}: {first_line(error)}"
            ) from error
    return Pickle(content)


def _check_plain(tensor: torch.Tensor) -> None:
    """Raise a TypeError or RuntimeError where `to_numpy` could not make an array of a tensor, or not in its size.

    A pickle says shape and strides of each: a stride of 0 makes a tensor of any size from one number.
    """
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_neg() or tensor.is_conj():
        raise TypeError(f"it is {tensor.layout} on {tensor.device}, not an array of numbers in memory")
    size, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if size > held:
        raise TypeError(f"its shape {tuple(tensor.shape)} needs {size} bytes, and the file holds {held}")
    to_numpy(tensor.new_empty(0))  # has NumPy the dtype?


class Meta(Mapping[str, np.ndarray]):
    """A checkpoint as Meta publishes it (`consolidated.NN.pth` and `params.json`), under Hugging Face's
    names.

    Shards are joined, and the rows of q and k, which Meta keeps for interleaved RoPE, are permuted for the
    half-split layout. `config` is the `config.json` that Hugging Face would have: `params.json` does not say
    the factor of Llama 3's RoPE scaling, which is 32 for the 3.2 models (dim at most 3072) and 8 for the
    others, unless `rope_scaling_factor` stands in it.

    Args: folder: of the checkpoint.

    Raises: FileNotFoundError for missing shards; ValueError for broken files, as `read_pickle`.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            params = json.loads((folder / "params.json").read_text())
            D, N, layers = (params[name] for name in _META_SIZES)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / 'params.json'} does not give dim, n_heads and n_layers: {error!r}") from error
        wrong = [f"{name}={params[name]!r}" for name in _META_SIZES if not _is_positive(params[name], int)]
        wrong += [
            f"{name}={params[name]!r}"
            for name in _META_NUMBERS
            if params.get(name) is not None and not _is_positive(params[name], int, float)
        ]
        if not isinstance(params.get("use_scaled_rope"), bool | None):
            wrong.append(f"use_scaled_rope={params['use_scaled_rope']!r}")
        if wrong or D % (2 * N):
            raise ValueError(
                f"{folder / 'params.json'} must give positive numbers, dim a multiple of 2 n_heads, and "
                f"use_scaled_rope true or false; it gives {', '.join(wrong) or f'dim={D}, n_heads={N}'}"
            )
        paths = sorted(folder.glob("consolidated.*.pth"))
        expected = [f"consolidated.{i:02}.pth" for i in range(len(paths))]
        if not paths or [path.name for path in paths] != expected:
            raise FileNotFoundError(
                f"{folder} must hold consolidated.00.pth and so on without gaps; it holds {[p.name for p in paths]}"
            )
        self._shards = [read_pickle(path) for path in paths]
        names = [set(shard) - {"rope.freqs"} for shard in self._shards]
        if any(other != names[0] for other in names):
            different = sorted(set.union(*names) - set.intersection(*names))
            raise ValueError(f"the shards of {folder} hold different names: {different[:10]}")
        self._head_dim, self._d_model = D // N, D
        self._theirs = {_from_meta(name): name for name in names[0]}
        problems = ((name, self._problem(name)) for name in self._theirs)
        wrong = [f"{self._theirs[name]} has {problem}" for name, problem in problems if problem]
        if wrong:
            raise ValueError(f"the tensors of {folder} are not Meta's: {', '.join(wrong[:10])}")
        head, embedding, gate = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"
        if {embedding, head} <= self._theirs.keys() and _digest(self[head]) == _digest(self[embedding]):
            del self._theirs[head]
        self.config = {
            "model_type": "llama",
            "vocab_size": self.shape(embedding)[0] if embedding in self._theirs else params.get("vocab_size"),
            "hidden_size": D,
            "intermediate_size": self.shape(gate)[0] if gate in self._theirs else 0,
            "num_hidden_layers": layers,
            "num_attention_heads": N,
            "num_key_value_heads": params.get("n_kv_heads") or N,
            "head_dim": D // N,
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "max_position_embeddings": params.get("max_seq_len", 131072 if params.get("use_scaled_rope") else 8192),
            "tie_word_embeddings": head not in self._theirs,
            "rope_theta": params.get("rope_theta", 10000.0),
            "rope_scaling": None,
            "dtype": str(self[embedding].dtype) if embedding in self._theirs else None,
        }
        if params.get("use_scaled_rope"):
            self.config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": float(params.get("rope_scaling_factor") or (32.0 if D <= 3072 else 8.0)),
                "low_freq_factor": 1.0,
                "high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
                "original_max_position_embeddings": 8192,
            }

    def __getitem__(self, name: str) -> np.ndarray:
        theirs, axis = self._theirs[name], self._axis(name)
        parts = [shard[theirs] for shard in (self._shards[:1] if axis is None else self._shards)]
        dtypes = sorted({str(part.dtype) for part in parts})
        if len(dtypes) > 1:
            raise ValueError(f"the shards hold {theirs} in several dtypes: {', '.join(dtypes)}")
        array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
        if name.endswith(_ROTATED):
            (rows, columns), H = array.shape, self._head_dim
            heads = array.reshape(rows // H, H // 2, 2, columns)  # rows (2i, 2i + 1) of a head become (i, i + H / 2)
            array = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(array.shape)
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """A joined tensor's shape, from those of its parts."""
        part, axis = self._shards[0].shape(self._theirs[name]), self._axis(name)
        return tuple(size * len(self._shards) if i == axis else size for i, size in enumerate(part))

    def _axis(self, name: str) -> int | None:
        """The axis that Meta's model parallelism split: the inputs of wo and w2, the outputs of the others; None
        for what every shard holds whole, and for names that Meta does not give."""
        if name == self._theirs[name] or name.endswith("norm.weight"):
            return None
        if name.endswith("embed_tokens.weight"):  # by vocabulary in Llama 3, by width before
            return 0 if self._shards[0].shape(self._theirs[name])[1] == self._d_model else 1
        return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0

    def _problem(self, name: str) -> str:
        """What of a tensor's parts keeps them from being joined, "" for nothing and for names that Meta does not
        give, which are extra."""
        theirs, norm, H = self._theirs[name], name.endswith("norm.weight"), self._head_dim
        if name == theirs:
            return ""
        shapes = [shard.shape(theirs) for shard in self._shards]
        if any(len(shape) != (1 if norm else 2) for shape in shapes):
            return f"a wrong number of axes: {shapes}"
        if len(set(shapes)) > 1:
            return f"other shapes in other shards: {shapes}"
        if norm and len({_digest(shard[theirs]) for shard in self._shards}) > 1:
            return "other values in other shards, which should each hold it whole"
        if name.endswith(_ROTATED) and self.shape(name)[0] % H:
            return f"{self.shape(name)[0]} rows, no multiple of dim / n_heads = {H}"
        return ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)


def _digest(array: np.ndarray) -> tuple:
    """Equal for arrays with the same bits: two large ones need not be held at once to be compared."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return array.shape, array.dtype, hashlib.blake2b(content).digest()


def _is_positive(value, *kinds: type) -> bool:
    return type(value) in kinds and 0 < value < math.inf


def _from_meta(name: str) -> str:
    """Meta's name of a tensor -> Hugging Face's; an unknown name stays, to be reported as extra."""
    if name in _META:
        return _META[name]
    parts = name.split(".", 2)
    inside = _META_BLOCK.get(parts[2]) if len(parts) == 3 and parts[0] == "layers" else None
    return name if inside is None else f"model.layers.{parts[1]}.{inside}"


def write_pickle(path: str | Path, tensors: dict[str, np.ndarray]) -> None:
    """Write name -> array as a torch dict that `torch.load(..., weights_only=True)` reads; whole, or not at all.

    >>> import ml_dtypes, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x.pt"
    >>> write_pickle(path, {"a": np.ones(2, ml_dtypes.bfloat16)}); read_pickle(path)["a"].dtype
    dtype(bfloat16)
    """
    with whole_file(path) as file:
        torch.save({name: to_torch(np.asarray(array)) for name, array in tensors.items()}, file)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when it is whole; an error leaves what was there before.

    Raises: OSError where it cannot be written; what is no file (a folder, a device) is left as it is.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x"
    >>> with whole_file(path) as file: n = file.write(b"whole")
    >>> path.read_bytes()
    b'whole'
    """
    path = Path(path).resolve()  # a link stays one
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise PermissionError(f"{path} cannot be written: it is {'read-only' if path.is_file() else 'no plain file'}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("xb") as file:
            yield file
        partial.replace(path)
    except RuntimeError as error:  # what torch makes of an OSError
        raise OSError(f"{path} cannot be written: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise the OSError that `whole_file` would, before what takes minutes; what is there stays as it is.

    >>> check_writable("/")
    Traceback (most recent call last):
    PermissionError: / cannot be written: it is no plain file
    """

    class Unused(Exception):
        pass

    with contextlib.suppress(Unused), whole_file(path):
        raise Unused
