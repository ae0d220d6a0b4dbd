"""`python -m oracle`: prove that jaxattn's layers equal torch's, or name the first stage that differs.

Without a subcommand it prints the parity table and then plants faults to show that the table can fail. The
exit status is 0 only where every row passes and every fault is caught.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # Not the parsers' defaults: those of a subcommand would take the place of what was said before its name.
    args = _parser().parse_args(arguments, argparse.Namespace(checkpoint=None, layer=0, tokens=256))
    try:
        return args.run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    common, length = (argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS) for _ in range(2))
    common.add_argument(
        "--checkpoint",
        metavar="PATH_OR_HUB_ID",
        help="a Llama checkpoint: a folder (Hugging Face's or Meta's form) or hub id; without it one is made from a "
        "seed, with Llama-3.2-1B's shapes",
    )
    common.add_argument("--layer", type=int, help="which attention layer (default 0)")
    length.add_argument("--tokens", type=_positive, help="length of the comparison (default 256)")
    parser = argparse.ArgumentParser(
        prog="python -m oracle", description=__doc__.splitlines()[0], parents=[common, length]
    )
    parser.add_argument("--layer-file", metavar="FILE", help="compare the layer in a file of `extract` instead")
    parser.add_argument("--json", metavar="FILE", help="also write rows, margins and versions as JSON")
    parser.set_defaults(run=run_parity)
    commands = parser.add_subparsers(metavar="COMMAND")
    extract = commands.add_parser("extract", parents=[common], help="save one attention layer as a torch dict")
    extract.add_argument("--out", metavar="FILE", required=True, help="where to write, as attn_layer_0.pt")
    extract.set_defaults(run=run_extract)
    convert = commands.add_parser("convert", help="write a checkpoint as safetensors in jaxattn's names")
    convert.add_argument(
        "source", metavar="IN", help="a folder: safetensors, .bin, or Meta's consolidated.*.pth; or a hub id"
    )
    convert.add_argument("target", metavar="OUT", help="a new or an empty folder")
    convert.set_defaults(run=run_convert)
    generate = commands.add_parser("generate", parents=[common], help="continue a prompt greedily, beside torch")
    generate.add_argument("--prompt", help="text, for checkpoints with a tokenizer; random tokens without it")
    generate.add_argument("--new-tokens", type=_positive, default=64, help="how many to generate (default 64)")
    generate.add_argument("--implementation", default="naive", help="of jaxattn's layers (default naive)")
    generate.set_defaults(run=run_generate)
    diff = commands.add_parser("diff", parents=[common, length], help="name the first stage that differs, and why")
    diff.add_argument("--ours", metavar="DUMP.npz", help="stages of other code; without it those of jaxattn's layer")
    diff.add_argument("--save", metavar="FILE.npz", help="write the layer's input and torch's stages, to compare with")
    diff.add_argument("--implementation", default="naive", help="of jaxattn's layer (default naive)")
    diff.set_defaults(run=run_diff)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def run_extract(args) -> int:
    """Save one attention layer's weights, frequencies and scaling, and print their shapes."""
    from oracle import checkpoint
    from oracle import llama as reference

    _quiet()
    with _checkpoint(args) as folder:
        model = checkpoint.load_model(folder, dtype="auto")
        _check_layer(args.layer, model.config.num_hidden_layers)
        tensors = reference.layer_weights(model, args.layer)
        checkpoint.write_pickle(args.out, tensors)
        for name, array in tensors.items():
            print(f"{name:<18} {'x'.join(map(str, array.shape)) or 'scalar':>10}  {array.dtype}")
        config = model.config
        print(
            f"(d_model={config.hidden_size}, H={config.num_attention_heads}, "
            f"H_kv={config.num_key_value_heads}, d_head={config.head_dim})"
        )
    print(f"wrote {args.out}")
    return 0


def run_convert(args) -> int:
    """Convert a checkpoint; nothing is written where it is not sound."""
    from oracle import checkpoint, parity

    start = time.perf_counter()
    written = parity.convert(checkpoint.find(args.source), args.target)
    print(f"wrote {written}, {written.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s")
    return 0


def run_generate(args) -> int:
    """Greedy generation by jaxattn and by Hugging Face, float32, token for token; status 1 where they
    differ."""
    import jax.numpy as jnp

    from jaxattn import llama, nn
    from oracle import checkpoint, parity
    from oracle import llama as reference

    _full_float32()
    _quiet()
    with _checkpoint(args) as folder:
        hf, config = checkpoint.load_model(folder), parity.checkpoint_config(folder)
        tokenizer = None
        if args.prompt is None:
            ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 16))
        else:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # as in `load_model`; tokenizers' own has no class but this
                raise ValueError(
                    f"--prompt needs a tokenizer, and transformers gets none from {folder}, so mend that or leave "
                    f"--prompt out: {checkpoint.first_line(error)}"
                ) from error
            ids = np.array([tokenizer(args.prompt)["input_ids"]], np.int64)
            if not ids.size:
                raise ValueError(f"--prompt {args.prompt!r} has no tokens")
        model = llama.load(
            config,
            parity.checkpoint_tensors(folder),
            implementation=parity.implementation(args.implementation),
            param_dtype=jnp.float32,
        )
    start = time.perf_counter()
    ours = np.asarray(nn.generate(model, jnp.asarray(ids), args.new_tokens))[0].tolist()
    middle = time.perf_counter()
    theirs = reference.greedy(hf, ids, args.new_tokens)[0].tolist()
    end = time.perf_counter()
    show = tokenizer.decode if tokenizer else lambda tokens: " ".join(map(str, tokens))
    print(f"jaxattn ({middle - start:.1f} s, compilation included): {show(ours)}")
    print(f"torch   ({end - middle:.1f} s): {show(theirs)}")
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    print(f"{same} of {len(ours)} tokens equal before the first that differs")
    return 0 if same == len(ours) else 1


def run_diff(args) -> int:
    """The first stage that differs from torch, and the usual mistake that explains it; status 1 where one
    differs."""
    from oracle import checkpoint, diff, parity

    _full_float32()
    _quiet()
    with _checkpoint(args) as folder:
        model = checkpoint.load_model(folder)
        _check_layer(args.layer, model.config.num_hidden_layers)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, args.tokens))
        subject = parity.llama_subject(folder, model, ids, name="llama", layer=args.layer)
    case = subject.case("float32")
    if args.save:
        diff.write_dump(args.save, case)
        print(f"wrote {args.save}: x, positions and torch's stages")
    if args.ours:
        ours = diff.read_dump(args.ours, case)
    else:
        ours = parity.our_stages(subject, case, parity.implementation(args.implementation))
    diagnosis = diff.diagnose(case, ours, theta=subject.config.rope.theta)
    print(f"compared: {', '.join(diagnosis.compared)}\n{diagnosis}")
    return 0 if diagnosis.stage is None else 1


def run_parity(args) -> int:
    """The parity table, the planted faults, and the verdict."""
    from oracle import checkpoint, faults, parity

    start = time.perf_counter()
    if args.json:
        checkpoint.check_writable(args.json)
    _full_float32()
    device, where = _second_device()
    print(
        f"{_versions()}, {where}\nfloat32 is multiplied in full, TF32 off on both sides; "
        "tolerance: RMSE at most 2x plain torch's + u x RMS(|terms|)\n"
    )
    rows, problems = [], []
    print(parity.HEADER)
    if args.layer_file:
        subject = parity.file_subject(args.layer_file, tokens=args.tokens, device=device)
        rows += _compare(subject, ("float32", "bfloat16"), ("naive", "blockwise"))
        return _finish(args, rows, [], problems, start)
    _quiet()
    with _checkpoint(args) as folder:
        subjects, cases = [], {}
        for subject, dtypes, names in _subjects(args, folder, device, problems):
            cases[subject.name] = {dtype: subject.case(dtype) for dtype in dtypes}
            rows += _compare(subject, dtypes, names, cases[subject.name])
            subjects.append(subject)
        # Few tokens for the checkpoint that is made here: the tiny one below generates 64.
        new_tokens = 64 if args.checkpoint else 8
        whole = parity.implementation("blockwise")
        found = parity.compare_model(folder, "llama, whole", "float32", whole, new_tokens=new_tokens, device=device)
        print("\n".join(map(str, found)), flush=True)
        rows += found
    with _tiny() as tiny, _tiny(tiniest=True) as tiniest:
        for model, name, dtype, tokens in (
            (tiny, "naive", "float32", 24),
            (tiny, "blockwise", "float32", 24),
            (tiny, "naive", "bfloat16", 24),
            (tiny, "blockwise", "bfloat16", 24),
            (tiniest, "loops", "float32", 4),
            (tiniest, "triton", "float32", 4),
        ):
            label = f"{'tiny' if model is tiny else 'tiniest'} llama, whole"
            one = parity.implementation(name)
            found = parity.compare_model(model, label, dtype, one, tokens=tokens, device=device)
            print("\n".join(map(str, found)), flush=True)
            rows += found
    print(
        f"\nPlanted faults, float32; margin = error / allowed error, at least {faults.LEAST_MARGIN:g}\n{faults.HEADER}"
    )
    caught = []
    for fault in faults.FAULTS:
        subject = next(subject for subject in subjects if fault.applies(subject))
        for name in fault.implementations:
            implementation = parity.implementation(name)
            caught.append(faults.catch(fault, subject, cases[subject.name]["float32"], implementation))
            print(caught[-1], flush=True)
    return _finish(args, rows, caught, problems, start)


def _subjects(args, folder, device: str | None, problems: list[str]):
    """What is compared: (subject, dtypes, implementations), the checkpoint's own layer first.

    The others see to it that every fault applies to one of them, whatever the checkpoint is.
    """
    from oracle import checkpoint, parity
    from oracle import llama as reference

    model = checkpoint.load_model(folder)
    _check_layer(args.layer, model.config.num_hidden_layers)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, args.tokens))
    names = ("naive", "blockwise") + (("triton",) if parity.kernels_run_here() else ())
    options = dict(layer=args.layer, device=device)
    subject = parity.llama_subject(folder, model, ids, name="llama", **options)
    problems += reference.hugging_face_is_sound(model, subject.x, layer=args.layer)
    yield subject, ("float32", "bfloat16"), names
    later = parity.llama_subject(folder, model, ids, name="llama from 1000", first_position=1000, **options)
    yield later, ("float32",), names
    with _tiny() as tiny:
        model = checkpoint.load_model(tiny)
        ids = np.random.default_rng(0).integers(0, checkpoint.TINY.vocabulary, (1, parity.BLOCK + 16))
        short, short_later = (
            parity.llama_subject(tiny, model, ids[:, :12], name=name, first_position=first, device=device)
            for name, first in (("tiny llama", 0), ("tiny llama from 1000", 1000))
        )
        long = parity.llama_subject(tiny, model, ids, name=f"tiny llama, {ids.size} tokens", device=device)
    yield short, ("float32", "bfloat16"), ("loops", "triton")
    yield short_later, ("float32",), ("loops", "triton")
    yield long, ("float32",), ("naive", "blockwise")
    yield parity.partial_subject(device=device), ("float32",), ("naive", "blockwise")


def _compare(subject, dtypes, names, cases=None) -> list:
    from oracle import parity

    rows = []
    for dtype in dtypes:
        case = cases[dtype] if cases else subject.case(dtype)
        found = parity.compare_devices(subject, case, dtype)
        print(*found, sep="\n", end="\n" if found else "", flush=True)
        rows += found
        for name in names:
            found = parity.compare(subject, case, dtype, parity.implementation(name))
            print("\n".join(map(str, found)), flush=True)
            rows += found
    return rows


def _finite(content):
    """JSON's content with words for the numbers that JSON has not."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return "not finite" if isinstance(content, float) and not math.isfinite(content) else content


def _finish(args, rows, caught, problems, start: float) -> int:
    from oracle import checkpoint

    wrong = [row for row in rows if not row.verdict]
    missed = [item for item in caught if not item]
    for problem in problems:
        print(f"the oracle itself is not sound: {problem}")
    print(
        f"\n{len(rows) - len(wrong)} of {len(rows)} rows pass, "
        f"{len(caught) - len(missed)} of {len(caught)} faults caught, {time.perf_counter() - start:.0f} s"
    )
    if args.json:
        content = {
            "command": sys.argv,
            "versions": _versions(),
            "torch_on": _second_device()[1],
            "rows": [dataclasses.asdict(row) | {"passes": bool(row.verdict)} for row in rows],
            "faults": [
                {
                    "fault": item.fault.name,
                    "subject": item.subject,
                    "implementation": item.implementation,
                    "margin": "raised" if item.raised else item.margin,
                    "first_stage": item.stage,
                    "named": item.named,
                    "caught": bool(item),
                }
                for item in caught
            ],
            "problems": problems,
        }
        with checkpoint.whole_file(args.json) as file:
            file.write(json.dumps(_finite(content), indent=1, allow_nan=False).encode() + b"\n")
        print(f"wrote {args.json}")
    return 1 if wrong or missed or problems else 0


@contextlib.contextmanager
def _tiny(tiniest: bool = False):
    from oracle import checkpoint

    shapes = checkpoint.TINIEST if tiniest else checkpoint.TINY
    with tempfile.TemporaryDirectory(prefix="jaxattn-oracle-") as folder:
        yield checkpoint.make(folder, shapes=shapes, form="sharded")


class _checkpoint:
    """The folder of --checkpoint, or one made from a seed in a temporary folder that goes away afterwards."""

    def __init__(self, args):
        self.name = args.checkpoint
        self.temporary = None

    def __enter__(self) -> Path:
        from oracle import checkpoint, parity

        if self.name:
            folder = checkpoint.find(self.name)
            parity.check(folder)
            return folder
        self.temporary = tempfile.TemporaryDirectory(prefix="jaxattn-oracle-")
        return checkpoint.make(self.temporary.name)

    def __exit__(self, *_):
        if self.temporary:
            self.temporary.cleanup()


def _check_layer(layer: int, layers: int) -> None:
    if not 0 <= layer < layers:
        raise ValueError(f"--layer {layer} must be from 0 to {layers - 1}: the checkpoint has {layers} layers")


def _full_float32() -> None:
    """TF32 off in torch, whatever was set before; jaxattn's own products ask for full float32 each."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _second_device() -> tuple[str | None, str]:
    import jax
    import torch

    from oracle import parity

    return parity.second_device(torch.cuda.is_available(), jax.default_backend())


def _quiet() -> None:
    """transformers' progress bars and advice would stand between the rows."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _versions() -> str:
    import importlib.metadata

    import jax

    found = []
    for name in ("jax", "flax", "torch", "transformers", "numpy"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"{', '.join(found)}; Python {platform.python_version()}; jax on {jax.devices()[0].device_kind}"


if __name__ == "__main__":
    sys.exit(main())
