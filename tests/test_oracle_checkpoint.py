"""Made checkpoints, and pickles that are broken or hostile."""

import dataclasses
import fnmatch
import io
import json
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from jaxattn import llama  # noqa: E402
from oracle import checkpoint, parity  # noqa: E402
from oracle import llama as reference  # noqa: E402
from oracle.attention import to_numpy  # noqa: E402

NARROW = checkpoint.Shapes(layers=1, vocabulary=256, mlp=16)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The attention shapes of Llama-3.2-1B, with a small MLP and vocabulary."""
    return checkpoint.make(tmp_path_factory.mktemp("narrow"), shapes=NARROW)


def test_default_shapes_are_those_of_llama_3_2_1b():
    config = llama.LlamaConfig.from_hf(checkpoint.hf_config().to_dict())
    published = dataclasses.replace(llama.LLAMA_3_2_1B, vocab_size=2048, n_layers=2)
    assert dataclasses.replace(config, dtype="bfloat16") == published


def test_attention_is_as_peaked_as_a_trained_model_s(narrow):
    model = checkpoint.load_model(narrow)
    ids = np.random.default_rng(0).integers(0, 256, (1, 256))
    case = reference.layer_case(model, reference.attention_input(model, ids), "float32")
    assert reference.peakedness({name: t.value for name, t in case.targets.items()}, case.mask) >= 0.3


def test_the_same_seed_makes_the_same_file_and_another_seed_another(tmp_path):
    files = [
        checkpoint.make(tmp_path / str(i), shapes=checkpoint.TINY, seed=seed) / "model.safetensors"
        for i, seed in enumerate((3, 3, 4))
    ]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_every_form_is_read_bit_for_bit(tmp_path, form, dtype):
    checkpoint.make(tmp_path, shapes=checkpoint.TINY, form=form, dtype=dtype)
    names = {path.name for path in tmp_path.iterdir()}
    assert ("pytorch_model.bin" in names) == (form == "bin")
    assert ("model.safetensors.index.json" in names) == (form == "sharded")
    tensors = parity.checkpoint_tensors(tmp_path)
    state = checkpoint.random_model(checkpoint.TINY).to(getattr(torch, dtype)).state_dict()
    del state["lm_head.weight"]
    assert set(tensors) == set(state)
    for name, value in state.items():
        assert tensors[name].tobytes() == to_numpy(value).tobytes()
        assert tensors[name].dtype == dtype
    config = llama.LlamaConfig.from_folder(tmp_path)
    assert llama.load(config, tensors).n_layers == 2


def test_a_pickle_with_code_is_refused_and_nothing_is_run(tmp_path):
    path, witness = tmp_path / "pytorch_model.bin", tmp_path / "run"

    class Touch:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    torch.save({"a": Touch()}, path)
    with pytest.raises(ValueError, match="nothing in it was run"):
        checkpoint.read_pickle(path)
    path.write_bytes(pickle.dumps(Touch()))
    with pytest.raises(ValueError, match="nothing in it was run"):
        checkpoint.read_pickle(path)
    (tmp_path / "params.json").write_text('{"dim": 32, "n_heads": 4, "n_layers": 1}')
    torch.save({"a": Touch()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(
        ValueError, match=r"00\.pth cannot .* nothing in it was run: .*Unsupported global: GLOBAL io\.open\)"
    ):
        checkpoint.Meta(tmp_path)
    assert not witness.exists()


def test_an_index_of_pickles_leads_neither_out_of_the_folder_nor_to_what_is_missing(tmp_path):
    checkpoint.make(tmp_path, shapes=checkpoint.TINY, form="bin")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-1.bin")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")  # other weights than the model's
    index = tmp_path / "pytorch_model.bin.index.json"
    for file, error, words in (
        ("../pytorch_model-1.bin", ValueError, r"no \.bin beside it"),
        ("pytorch_model-2.bin", FileNotFoundError, "shards that are missing"),
    ):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        with pytest.raises(error, match=words):
            parity.checkpoint_tensors(tmp_path)
    names = set(checkpoint.read_pickle(tmp_path / "pytorch_model-1.bin"))
    for said in (names - {"model.norm.weight"}, names | {"model.more.weight"}):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(said, "pytorch_model-1.bin")}))
        with pytest.raises(ValueError, match=r"disagree about where .*\['model\.(norm|more)\.weight'\]"):
            parity.checkpoint_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model-1.bin")}))
    assert set(parity.checkpoint_tensors(tmp_path)) == names
    index.unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights: none of"):
        parity.checkpoint_tensors(tmp_path)


def test_beside_an_index_of_others_the_single_pickle_is_read_as_transformers_does(tmp_path):
    single, name = (
        checkpoint.make(tmp_path, shapes=checkpoint.TINY, form="bin") / "pytorch_model.bin",
        "model.norm.weight",
    )
    tensors = dict(checkpoint.read_pickle(single))
    checkpoint.write_pickle(tmp_path / "pytorch_model-1.bin", {**tensors, name: -tensors[name]})
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    theirs = to_numpy(checkpoint.load_model(tmp_path, "auto").model.norm.weight)
    np.testing.assert_array_equal(parity.checkpoint_tensors(tmp_path)[name], theirs)


def test_a_tensor_larger_than_its_file_is_refused_before_it_is_made(tmp_path):
    torch.save({"a": torch.ones(2), "b": torch.zeros(1).expand(2**50)}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"x\.pt cannot be read .*: b: .*needs 4503599627370496 bytes, and the file holds 4"
    ):
        checkpoint.read_pickle(tmp_path / "x.pt")


def test_tensors_in_another_order_are_copied_one_at_a_time_when_asked_for(tmp_path, monkeypatch):
    square = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": square.T, "b": square.T + 1}, tmp_path / "x.pt")
    copied = []
    monkeypatch.setattr(checkpoint, "to_numpy", lambda tensor: copied.append(tensor.numel()) or to_numpy(tensor))
    tensors = checkpoint.read_pickle(tmp_path / "x.pt")
    assert {name: tensors.shape(name) for name in tensors} == {"a": (4, 3), "b": (4, 3)}
    assert sum(copied) == 0
    np.testing.assert_array_equal(tensors["b"], square.numpy().T + 1)
    assert sum(copied) == 12


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"hello",
    "pop of an empty stack": lambda content: b"\x80\x02.",
    "memo of an empty stack": lambda content: b"\x80\x02q\x00.",
    "sparse": lambda content: sparse(),
}


def sparse():
    file = io.BytesIO()
    torch.save({"a": torch.ones(2, 2).to_sparse()}, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_pickle_gives_one_error_that_names_it(tmp_path, damage):
    path = tmp_path / "pytorch_model.bin"
    checkpoint.write_pickle(path, {"a": np.ones(1000)})
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        checkpoint.read_pickle(path)


def test_a_pickle_of_something_else_is_named(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        checkpoint.read_pickle(tmp_path / "list.pt")
    torch.save({"a": torch.ones(1), "b": "text"}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match="'b'"):
        checkpoint.read_pickle(tmp_path / "mixed.pt")


def test_what_is_neither_folder_nor_hub_id_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither config.json nor params.json".replace(".", r"\.")):
        checkpoint.find(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        checkpoint.find(tmp_path / "nowhere" / "at" / "all")


def hub(monkeypatch, tmp_path, files):
    """A hub that has this repository: `snapshot_download`'s part that is used. Returns what it was asked for."""
    import huggingface_hub

    def download(repo, *, allow_patterns, ignore_patterns):
        assert repo == "meta-llama/tiny"
        asked = [f for f in files if any(fnmatch.fnmatch(f, p) for p in allow_patterns)]
        for file in (f for f in asked if not any(fnmatch.fnmatch(f, p) for p in ignore_patterns)):
            (tmp_path / file).touch()
        fetched.append(allow_patterns)
        return str(tmp_path)

    fetched = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched


@pytest.mark.parametrize(
    ("weights", "tries"),
    [
        (["model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"], 1),
        (["pytorch_model-00001-of-00001.bin", "consolidated.00.pth"], 2),
        (["consolidated.00.pth"], 3),
    ],
)
def test_the_first_form_that_a_hub_s_repository_has_is_fetched_alone(monkeypatch, tmp_path, weights, tries):
    about = "params.json" if tries == 3 else "config.json"
    fetched = hub(monkeypatch, tmp_path, [about, "original/params.json", *weights])
    assert checkpoint.find("meta-llama/tiny") == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {about, weights[0]}
    assert len(fetched) == tries


def test_a_hub_that_gives_nothing_or_no_checkpoint_is_an_error_with_its_reason(monkeypatch, tmp_path):
    import huggingface_hub

    hub(monkeypatch, tmp_path, ["config.json", "flax_model.msgpack"])
    with pytest.raises(FileNotFoundError, match=r"the hub's meta-llama/tiny holds no Llama checkpoint: it needs"):
        checkpoint.find("meta-llama/tiny")
    monkeypatch.undo()

    def offline(*_args, **_options):
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"not give it: ConnectionError: Name or service not known\. For gated"):
        checkpoint.find("meta-llama/tiny")


def test_wrong_options_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8'"):
        checkpoint.make(tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()
