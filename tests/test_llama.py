"""Llama's configuration, table of names, and reading of checkpoints, sound and hostile, without torch."""

import dataclasses
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxattn import llama, rope
from jaxattn.llama import LLAMA_3_2_1B, LlamaConfig, Safetensors

TINY = LlamaConfig(
    vocab_size=7, d_model=8, d_mlp=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, rope=rope.RopeConfig(6)
)
PUBLISHED = dict(
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    head_dim=64,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=8192,
    max_position_embeddings=131072,
    mlp_bias=False,
    model_type="llama",
    num_attention_heads=32,
    num_hidden_layers=16,
    num_key_value_heads=8,
    rms_norm_eps=1e-05,
    rope_scaling=dict(
        factor=32.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    vocab_size=128256,
)


def tensors_of(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    table = llama.model_table(config)
    return {name: rng.normal(size=llama.shape_of(axes, config)).astype(dtype) for name, (_, axes) in table.items()}


def test_the_published_config_is_read_in_both_of_its_shapes():
    old = LlamaConfig.from_hf(PUBLISHED)
    rules = PUBLISHED["rope_scaling"] | {"rope_theta": 500000.0}
    rest = {k: v for k, v in PUBLISHED.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new = LlamaConfig.from_hf(rest | {"rope_parameters": rules, "dtype": "bfloat16"})
    assert old == new == dataclasses.replace(LLAMA_3_2_1B, eos_ids=(128001, 128008, 128009))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive whole number"),
        ({"hidden_size": "2048"}, "hidden_size='2048' must be a positive whole number"),
        ({"num_hidden_layers": [16], "head_dim": 64.0}, r"num_hidden_layers=\[16\] .*; head_dim=64.0 must be"),
        ({"num_key_value_heads": "8", "vocab_size": True}, "vocab_size=True .*; num_key_value_heads='8' must be"),
        ({"max_position_embeddings": []}, r"max_position_embeddings=\[\] must be"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a whole number"),
        ({"rope_theta": "5e5"}, "must be positive numbers: rope_theta='5e5'"),
        ({"rope_theta": float("nan")}, "must be positive numbers: rope_theta=nan"),
        ({"rope_scaling": [1]}, r"must be an object, not \[1\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": [8]}}, r"must be positive numbers: factor=\[8\]"),
        ({"tie_word_embeddings": "false", "mlp_bias": 0}, "embeddings='false' must be true or false; mlp_bias=0 must"),
        ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "frequencies that are not finite"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "frequencies that are not finite"),
        ({"num_key_value_heads": 5}, "n_heads=32 must be a multiple of n_kv_heads=5"),
        ({"partial_rotary_factor": 0.5}, "ignores partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "magic"}}, "'magic'"),
    ],
)
def test_a_config_that_cannot_be_followed_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        LlamaConfig.from_hf(PUBLISHED | change)


def test_conversion_puts_every_weight_where_the_einsum_wants_it():
    x = np.random.default_rng(1).normal(size=(3, 8))
    weight = np.random.default_rng(2).normal(size=(24, 8))
    kernel = llama.convert(weight, "(N H) D -> D N H", TINY)
    np.testing.assert_allclose(np.einsum("td,dnh->tnh", x, kernel), (x @ weight.T).reshape(3, 4, 6))
    context, out = np.random.default_rng(3).normal(size=(3, 4, 6)), np.random.default_rng(4).normal(size=(8, 24))
    kernel = llama.convert(out, "D (N H) -> N H D", TINY)
    np.testing.assert_allclose(np.einsum("tnh,nhd->td", context, kernel), context.reshape(3, 24) @ out.T)


def test_conversion_and_its_inverse_keep_every_bit():
    for name, (_, axes) in llama.model_table(dataclasses.replace(TINY, attention_bias=True, mlp_bias=True)).items():
        array = np.arange(np.prod(llama.shape_of(axes, TINY))).reshape(llama.shape_of(axes, TINY))
        there = llama.convert(array, axes, TINY)
        np.testing.assert_array_equal(llama.convert(there, axes, TINY, inverse=True), array, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_holds_the_checkpoint_s_weights_stacked_by_layer(tied):
    config = dataclasses.replace(TINY, tied_embeddings=tied, attention_bias=True, mlp_bias=True)
    tensors = tensors_of(config)
    model = llama.load(config, tensors)
    np.testing.assert_array_equal(
        model.blocks.attention.wk[1],
        tensors["model.layers.1.self_attn.k_proj.weight"].reshape(2, 6, 8).transpose(2, 0, 1),
    )
    np.testing.assert_array_equal(model.blocks.mlp.bd[0], tensors["model.layers.0.mlp.down_proj.bias"])
    np.testing.assert_array_equal(model.norm.scale[...], tensors["model.norm.weight"])
    assert (model.unembedding is None) == tied


def test_missing_extra_and_misshaped_tensors_are_listed_together():
    tensors = tensors_of(TINY)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((24, 8), np.float32)
    tensors["surprise"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="do not fit") as error:
        llama.load(TINY, tensors)
    for line in (
        "missing: model.norm.weight (8,)",
        "extra: surprise (3,)",
        "misshaped: model.layers.0.self_attn.k_proj.weight (24, 8), should be (12, 8)",
    ):
        assert line in str(error.value)


def test_nan_weights_are_refused_by_name():
    tensors = tensors_of(TINY, ml_dtypes.bfloat16)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 weights of 96"):
        llama.load(TINY, tensors)


def test_weights_must_be_finite_in_their_own_dtype_and_in_that_of_the_parameters():
    tensors = tensors_of(TINY, np.float64)
    tensors["model.norm.weight"][3] = 1e300
    llama.check_checkpoint(TINY, tensors)
    words = r"norm\.weight has 1 weights of 8 that are NaN or infinite in float32, though finite in float64"
    with pytest.raises(ValueError, match=words):
        llama.load(TINY, tensors, param_dtype=np.float32)
    tensors, prefix = tensors_of(TINY), "model.layers.0.self_attn."
    tensors[prefix + "k_proj.weight"][2, 3] = -1e5
    words = r"0\.self_attn\.k_proj\.weight has 1 weights of 96 .* in float16, though finite in float32"
    with pytest.raises(ValueError, match=words):
        llama.load(TINY, tensors, param_dtype="float16")
    with pytest.raises(ValueError, match=words):
        llama.load_attention(TINY, tensors, prefix=prefix, param_dtype="float16")
    assert llama.load_attention(TINY, tensors, prefix=prefix, param_dtype=ml_dtypes.bfloat16).wk.dtype == "bfloat16"


def test_more_layers_than_tensors_are_refused_before_their_names_are_made():
    with pytest.raises(ValueError, match="1000000000000 layers, the checkpoint only 20 tensors"):
        llama.check_checkpoint(dataclasses.replace(TINY, n_layers=10**12), tensors_of(TINY))


def test_a_tied_head_that_is_not_the_embedding_is_refused():
    tensors = tensors_of(TINY)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    for use in (llama.load, llama.check_checkpoint):
        with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
            use(TINY, tensors)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is no JSON|must hold)"):
        LlamaConfig.from_folder(tmp_path)


def test_names_that_say_nothing_new_are_let_be():
    tensors = tensors_of(TINY) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert llama.load(TINY, tensors).unembedding is None


def write_sharded(folder, tensors):
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_safetensors_are_read_bit_for_bit(tmp_path, dtype, sharded):
    tensors = tensors_of(TINY, dtype)
    if sharded:
        write_sharded(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    read = Safetensors(tmp_path)
    assert set(read) == set(tensors)
    assert len(read) == len(tensors)
    for name, array in tensors.items():
        assert read[name].dtype == dtype
        assert read[name].tobytes() == array.tobytes()
        assert read.shape(name) == array.shape


def header(content, length=None):
    text = json.dumps(content).encode() if isinstance(content, dict) else content
    return struct.pack("<Q", len(text) if length is None else length) + text


HOSTILE = {
    "empty": b"",
    "truncated header": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})[:20],
    "truncated data": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 4,
    "header longer than the file": header({}, length=2**40),
    "shape larger than the data": header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}) + b"\0" * 8,
    "offsets outside": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}) + b"\0" * 8,
    "unknown dtype": header({"a": {"dtype": "F77", "shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 8,
    "header longer than any number": header({}, length=2**64 - 1),
    "offsets that overlap": header(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    )
    + b"\0" * 8,
    "a name twice": header(b'{"a": %s, "a": %s}' % (2 * (b'{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}',)))
    + b"\0" * 8,
    "no json": header(b"not json"),
    "wrong magic": b"PK\x03\x04" + b"\0" * 64,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_file_gives_one_error_that_names_it(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"model\.safetensors is no sound safetensors file"):
        Safetensors(tmp_path)


def test_the_names_of_a_header_are_compared_a_few_times_each():
    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Name.compared += 1
            return str.__eq__(self, other)

    pairs = [(Name(i), None) for i in [*range(300), 7]]
    with pytest.raises(ValueError, match=r"twice: \['7'\]"):
        llama._each_once(pairs)
    assert Name.compared < 10 * len(pairs)


def test_an_index_can_lead_neither_out_of_the_folder_nor_into_nothing(tmp_path):
    tensors = tensors_of(TINY)
    index = write_sharded(tmp_path, tensors)
    path = tmp_path / "model.safetensors.index.json"
    outside = tmp_path.parent / "outside.safetensors"
    save_file(tensors, outside)
    for target in ("../outside.safetensors", str(outside), "model-1.bin"):
        changed = {"weight_map": index["weight_map"] | {"model.norm.weight": target}}
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"no \.safetensors beside it"):
            Safetensors(tmp_path)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"more": "model-3.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"missing: \['model-3\.safetensors'\]"):
        Safetensors(tmp_path)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"more": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"disagree about where these tensors are: \['more'\]"):
        Safetensors(tmp_path)
    path.write_text(json.dumps(index))
    held = {name: tensors[name] for name, file in index["weight_map"].items() if file == "model-1.safetensors"}
    twice = next(name for name, file in index["weight_map"].items() if file == "model-2.safetensors")
    save_file(held | {twice: tensors[twice]}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=rf"disagree about where these tensors are: \['{twice}'\]"):
        Safetensors(tmp_path)
    for text in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            Safetensors(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither"):
        Safetensors(tmp_path)
