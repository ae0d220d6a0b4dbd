"""Conversion of every checkpoint form into ours: bit for bit, one tensor at a time, and nothing where it
fails."""

import dataclasses
import json
import re
import resource
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from jaxattn import llama, rope  # noqa: E402
from oracle import __main__ as command  # noqa: E402
from oracle import checkpoint, parity  # noqa: E402

SQUARE = dataclasses.replace(checkpoint.TINY, head_dim=8)  # Meta's form has no head_dim of its own
UNUSUAL = dataclasses.replace(checkpoint.TINY, tied=False, attention_bias=True, mlp_bias=True, rope="default")


def write_meta(folder, source, shards, *, output=None, vocabulary_parallel=True):
    """A checkpoint in Meta's form, made from Hugging Face's: rows permuted, tensors split as model
    parallelism does."""
    config, tensors = llama.LlamaConfig.from_folder(source), llama.Safetensors(source)
    by_inputs, whole = ("attention.wo", "feed_forward.w2"), ("norm.weight",)
    parts = [{"rope.freqs": np.ones(4, np.float32)} for _ in range(shards)]
    names = {theirs: name for name, theirs in checkpoint._META.items()}
    names |= {
        f"model.layers.{i}.{theirs}": f"layers.{i}.{name}"
        for i in range(config.n_layers)
        for name, theirs in checkpoint._META_BLOCK.items()
    }
    arrays = {names[name]: tensors[name] for name in tensors}
    if output is not None:
        arrays["output.weight"] = output(arrays["tok_embeddings.weight"])
    for name, array in arrays.items():
        if name.endswith(("wq.weight", "wk.weight")):
            heads = array.reshape(-1, config.head_dim, config.d_model)
            array = rope.to_interleaved(heads, axis=1).reshape(array.shape)
        axis = 1 if any(x in name for x in by_inputs) or (name.startswith("tok") and not vocabulary_parallel) else 0
        pieces = [array] * shards if name.endswith(whole) else np.split(array, shards, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    folder.mkdir()
    for i, part in enumerate(parts):
        checkpoint.write_pickle(folder / f"consolidated.{i:02}.pth", part)
    params = dict(
        dim=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_eps,
        rope_theta=config.rope.theta,
        use_scaled_rope=True,
    )
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def back(folder):
    """What was written, brought back to Hugging Face's names and axes."""
    config, ours = llama.LlamaConfig.from_folder(folder), llama.Safetensors(folder)
    table = llama.model_table(config)
    assert set(ours) == {path for path, _ in table.values()}
    return {name: llama.convert(ours[path], axes, config, inverse=True) for name, (path, axes) in table.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("shapes", [checkpoint.TINY, UNUSUAL], ids=["H*N != D", "untied with biases"])
def test_a_round_trip_keeps_every_bit(tmp_path, shapes, form, dtype):
    source = checkpoint.make(tmp_path / "in", shapes=shapes, form=form, dtype=dtype)
    assert command.main(["convert", str(source), str(tmp_path / "out")]) == 0
    expected = parity.checkpoint_tensors(source)
    written = back(tmp_path / "out")
    assert set(written) == set(expected)
    for name, array in expected.items():
        assert written[name].dtype == array.dtype == dtype
        assert written[name].tobytes() == array.tobytes(), name


def test_a_converted_checkpoint_makes_the_same_model(tmp_path):
    source = checkpoint.make(tmp_path / "in", shapes=UNUSUAL, dtype="float32")
    parity.convert(source, tmp_path / "out")
    models = [llama.load(llama.LlamaConfig.from_folder(f), llama.Safetensors(f)) for f in (source, tmp_path / "out")]
    for one, other in ((m.blocks.attention.wo, n.blocks.attention.wo) for m, n in [models]):
        np.testing.assert_array_equal(one[...], other[...])
    np.testing.assert_array_equal(models[0].unembedding[...], models[1].unembedding[...])
    np.testing.assert_array_equal(models[0].blocks.mlp.bu[...], models[1].blocks.mlp.bu[...])


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("vocabulary_parallel", [True, False])
def test_meta_s_form_gives_hugging_face_s_tensors(tmp_path, shards, vocabulary_parallel):
    source = checkpoint.make(tmp_path / "hf", shapes=SQUARE)
    meta = write_meta(tmp_path / "meta", source, shards, vocabulary_parallel=vocabulary_parallel, output=np.array)
    expected, read = llama.Safetensors(source), checkpoint.Meta(meta)
    assert set(read) == set(expected)
    for name, array in expected.items():
        assert read[name].tobytes() == array.tobytes(), name
        assert read.shape(name) == array.shape, name
    theirs, ours = llama.LlamaConfig.from_hf(read.config), llama.LlamaConfig.from_folder(source)
    assert theirs == ours
    parity.convert(meta, tmp_path / "out")
    assert back(tmp_path / "out")["model.norm.weight"].tobytes() == expected["model.norm.weight"].tobytes()


def test_meta_s_output_that_is_not_the_embedding_is_kept(tmp_path):
    source = checkpoint.make(tmp_path / "hf", shapes=SQUARE)
    meta = checkpoint.Meta(write_meta(tmp_path / "meta", source, 1, output=lambda embedding: embedding + 1))
    assert meta.config["tie_word_embeddings"] is False
    assert not np.array_equal(meta["lm_head.weight"], meta["model.embed_tokens.weight"])


@pytest.mark.parametrize("form", ["safetensors", "two of Meta's"])
def test_converting_holds_one_copy_of_the_largest_tensor_and_a_piece(tmp_path, form):
    shapes = dataclasses.replace(checkpoint.TINY, d_model=512, heads=8, kv_heads=8, head_dim=64, mlp=8192)
    source = checkpoint.make(tmp_path / "in", shapes=shapes, dtype="float32")
    if form == "two of Meta's":
        source = write_meta(tmp_path / "meta", source, 2)
    largest, piece = 4 * 512 * 8192, 4 * llama._PIECE
    tracemalloc.start()
    parity.convert(source, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 6 * largest
    assert peak < 1.02 * largest + piece


def spoil_missing_shard(folder):
    next(folder.glob("model-00002*.safetensors")).unlink()


def spoil_truncated_shard(folder):
    path = next(folder.glob("model-00002*.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])


def spoil_nan(folder):
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, np.nan))


def spoil_dtype(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(32, np.int8)}))


def spoil_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(33, ml_dtypes.bfloat16)}))


def spoil_config(folder):
    (folder / "config.json").write_text("{")


def spoil_float8(folder):
    """One that NumPy has no dtype for."""
    tensors = {name: (array.dtype.name, array) for name, array in llama.Safetensors(folder).items()}
    tensors["model.norm.weight"] = ("float8", np.zeros(32, np.int8))
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        kind = dict(llama.DTYPES, float8="F8_E4M3")[dtype]
        header[name] = dict(dtype=kind, shape=array.shape, data_offsets=(end, end + array.nbytes))
        end += array.nbytes
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    text, data = json.dumps(header).encode(), b"".join(array.tobytes() for _, array in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def spoil_head(folder):
    rewrite(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"][::-1].copy()})
    )


def spoil_layers(folder):
    change_config(folder, num_hidden_layers=10**9)


def spoil_nesting(folder):
    (folder / "config.json").write_text("[" * 100_000)


def spoil_index(folder):
    """transformers follows it, and finds the same tensors there."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    inside = index["weight_map"]["model.norm.weight"]
    outside = folder.parent / f"outside-{inside}"
    outside.write_bytes((folder / inside).read_bytes())
    moved = {name: f"../{outside.name}" if file == inside else file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index | {"weight_map": moved}))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    from safetensors.numpy import save_file

    tensors = dict(llama.Safetensors(folder))
    change(tensors)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


SPOILED = {
    spoil_missing_shard: "names shards that are missing",
    spoil_truncated_shard: "no sound safetensors file",
    spoil_nan: "model.norm.weight has 1 weights of 32 that are NaN",
    spoil_dtype: "model.norm.weight has dtype I8",
    spoil_float8: "model.norm.weight has dtype F8_E4M3",
    spoil_head: "ties the embeddings, but lm_head.weight is not model.embed_tokens.weight",
    spoil_layers: "the configuration has 1000000000 layers, the checkpoint only 20 tensors",
    spoil_nesting: "config.json is no JSON",
    spoil_shape: "misshaped: model.norm.weight (33,), should be (32,)",
    spoil_config: "config.json is no JSON",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_an_unsound_checkpoint_gives_one_error_and_leaves_nothing(tmp_path, capsys, spoil):
    source = checkpoint.make(tmp_path / "in", shapes=checkpoint.TINY, form="sharded")
    spoil(source)
    capsys.readouterr()
    assert command.main(["convert", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert SPOILED[spoil] in error
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_to_its_end_leaves_nothing(tmp_path, capsys):
    source = checkpoint.make(tmp_path / "in", shapes=checkpoint.TINY)
    layer = ["extract", "--checkpoint", str(source), "--out", str(tmp_path / "layer.pt")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the system's own error, in the middle of the file
    try:
        statuses = [command.main(["convert", str(source), str(tmp_path / "new" / "out")]), command.main(layer)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert statuses == [2, 2]
    assert len(re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("there", [False, True])
def test_an_error_while_writing_the_configuration_leaves_no_file(tmp_path, monkeypatch, capsys, there):
    source, out, write = checkpoint.make(tmp_path / "in", shapes=checkpoint.TINY), tmp_path / "out", Path.write_text
    if there:
        out.mkdir()

    def full(path, *args, **options):
        if path.name == "config.json":
            path.write_bytes(b"{")
            raise OSError("disk full")
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert command.main(["convert", str(source), str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: disk full"
    assert out.exists() == there
    assert list(tmp_path.rglob("out/*")) == []
    monkeypatch.undo()
    assert command.main(["convert", str(source), str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}


def test_what_is_there_already_is_not_overwritten(tmp_path, capsys):
    source = checkpoint.make(tmp_path / "in", shapes=checkpoint.TINY)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert command.main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "consolidated.00.pth").unlink(), "without gaps"),
        (lambda folder: (folder / "params.json").write_text('{"dim": 32}'), "does not give dim, n_heads and n_layers"),
        (lambda folder: change_params(folder, n_heads=0), "must give positive numbers, .* n_heads=0"),
        (lambda folder: change_params(folder, n_heads=5), "dim a multiple of 2 n_heads, .* dim=32, n_heads=5"),
        (lambda folder: change_params(folder, dim="32", norm_eps=[1]), r"dim='32', norm_eps=\[1\]"),
        (
            lambda folder: change_tensor(folder, "layers.0.attention.wq.weight"),
            r"layers\.0\.attention\.wq\.weight has a wrong number of axes: \[\(512,\)",
        ),
        (lambda folder: change_params(folder, use_scaled_rope="false"), "must .* true or false; .*rope='false'"),
        (
            lambda folder: change_tensor(folder, "layers.0.attention.wk.weight", lambda x: x[:-1]),
            r"attention\.wk\.weight has 14 rows, no multiple of dim / n_heads = 8",
        ),
        (
            lambda folder: change_tensor(folder, "layers.0.attention.wo.weight", lambda x: x[:-1], "*01.pth"),
            r"attention\.wo\.weight has other shapes in other shards: \[\(32, 16\), \(31, 16\)\]",
        ),
        (
            lambda folder: change_tensor(folder, "norm.weight", lambda x: -x, "*01.pth"),
            r"are not Meta's: norm\.weight has other values in other shards",
        ),
        (
            lambda folder: change_tensor(folder, "layers.1.attention.wv.weight", lambda x: x.astype("f4"), "*01.pth"),
            r"hold layers\.1\.attention\.wv\.weight in several dtypes: bfloat16, float32",
        ),
        (lambda folder: (folder / "consolidated.01.pth").write_bytes(b"x"), "cannot be read"),
        (lambda folder: checkpoint.write_pickle(folder / "consolidated.01.pth", {"a": np.ones(1)}), "different names"),
    ],
)
def test_an_unsound_checkpoint_of_meta_s_is_named(tmp_path, capsys, spoil, words):
    folder = write_meta(tmp_path / "meta", checkpoint.make(tmp_path / "hf", shapes=SQUARE), 2)
    spoil(folder)
    assert command.main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def change_params(folder, **changes):
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(folder, name, change=np.ravel, shards="*.pth"):
    for path in folder.glob(shards):
        tensors = checkpoint.read_pickle(path)
        checkpoint.write_pickle(path, {**tensors, name: change(tensors[name])})


@pytest.fixture(scope="module")
def in_both_forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    source = checkpoint.make(folder / "hf", shapes=dataclasses.replace(SQUARE, layers=1), dtype="float32")
    return source, write_meta(folder / "meta", source, 2, output=np.array)


def test_meta_s_form_gives_hugging_face_s_model(in_both_forms):
    theirs, ours = (checkpoint.load_model(folder, "auto") for folder in in_both_forms)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.config._attn_implementation == "eager"


def test_every_command_reads_meta_s_form(in_both_forms, tmp_path, capsys):
    meta = str(in_both_forms[1])
    assert command.main(["diff", "--checkpoint", meta, "--tokens", "20"]) == 0
    assert "every stage agrees" in capsys.readouterr().out
    assert command.main(["generate", "--checkpoint", meta, "--new-tokens", "3"]) == 0
    files = [tmp_path / name for name in ("hf.pt", "meta.pt")]
    for folder, file in zip(in_both_forms, files, strict=True):
        assert command.main(["extract", "--checkpoint", str(folder), "--out", str(file)]) == 0
    one, other = map(checkpoint.read_pickle, files)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def spoil_lacking(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))


def spoil_heads(folder):
    change_config(folder, num_attention_heads=0)


def test_code_that_a_configuration_names_is_not_run(tmp_path, capsys):
    source = checkpoint.make(tmp_path / "in", shapes=checkpoint.TINY)
    (source / "theirs.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    change_config(source, model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"})
    with pytest.raises(ValueError, match="contains custom code"):
        checkpoint.load_model(source)
    assert command.main(["diff", "--checkpoint", str(source)]) == 2
    assert "model_type='theirs'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_converted_checkpoint_is_not_taken_for_hugging_face_s(tmp_path, capsys):
    parity.convert(checkpoint.make(tmp_path / "in", shapes=checkpoint.TINY), tmp_path / "out")
    for arguments in (
        ["diff", "--checkpoint", str(tmp_path / "out")],
        ["convert", str(tmp_path / "out"), str(tmp_path / "x")],
    ):
        assert command.main(arguments) == 2
        assert "holds jaxattn's own names" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


UNSOUND = (
    spoil_truncated_shard, spoil_missing_shard, spoil_config, spoil_heads, spoil_lacking, spoil_nan, spoil_dtype,
    spoil_float8, spoil_index,
)  # fmt: skip


@pytest.mark.parametrize("spoil", UNSOUND)
@pytest.mark.parametrize("name", ["parity", "generate", "diff", "extract"])
def test_every_command_gives_one_error_that_says_what_is_wrong_with_a_checkpoint(tmp_path, capsys, name, spoil):
    source = checkpoint.make(tmp_path / "in", shapes=checkpoint.TINY, form="sharded")
    spoil(source)
    arguments = {"parity": [], "extract": ["extract", "--out", str(tmp_path / "layer.pt")]}.get(name, [name])
    capsys.readouterr()
    assert command.main([*arguments, "--checkpoint", str(source)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(line.startswith("  missing: ") for line in error.splitlines()[1:])
    assert not (tmp_path / "layer.pt").exists()
