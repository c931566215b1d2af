"""The stages on text: a tiny Hugging Face Llama folder and small files of preferences, from the command line."""

import dataclasses
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from experiments import quickstart, reward_model, rto, sft, tasks
from experiments.common import main

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
SPECIAL = ("<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")


@pytest.fixture(autouse=True)
def nothing_said():
    """A process says a line once, and an earlier file of tests may have said the same."""
    tasks.say.cache_clear()


def write_model(folder: Path, template: str = TEMPLATE) -> Path:
    """A random Llama of one layer with a byte-level tokenizer, as save_pretrained lays them out."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": template}))
    vocab, width, heads, mlp = 264, 16, 2, 32
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": width,
        "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": mlp,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
        "max_position_embeddings": 128,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.1 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    layer = {f"self_attn.{n}_proj": draw(width, width) for n in "qkvo"}
    layer |= {"mlp.gate_proj": draw(mlp, width), "mlp.up_proj": draw(mlp, width), "mlp.down_proj": draw(width, mlp)}
    layer |= {n: np.ones(width, np.float32) for n in ("input_layernorm", "post_attention_layernorm")}
    tensors = {f"model.layers.0.{name}.weight": x for name, x in layer.items()}
    tensors |= {"model.embed_tokens.weight": draw(vocab, width), "model.norm.weight": np.ones(width, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def records(n: int, seed: int) -> list[dict]:
    """The preferred answer says yes."""
    rng = random.Random(seed)
    words = ["sun", "tree", "river", "stone", "bird"]
    made = []
    for i in range(n):
        prompt = f"{rng.choice(words)} or {rng.choice(words)} {i}?"
        made.append({"prompt": prompt, "chosen": f"yes {rng.choice(words)}", "rejected": f"no {rng.choice(words)}"})
    return made


def write_data(folder: Path) -> Path:
    folder.mkdir()
    for split, n in (("train", 64), ("test", 16), ("test_hard", 16)):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records(n, len(split)))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RTO_JAX_CACHE", str(tmp_path / "cache"))


FLAGS = [
    "--lengths.prompt", "40", "--lengths.response", "12", "--batch-size", "16", "--micro-batches", "2", "--steps", "3",
]  # fmt: skip


def command(module, *argv: str):
    return main(module.PRESETS, module.run, module.__doc__, ["--preset", "smollm2", *argv])


def test_the_chain_on_text_and_its_page(tmp_path, capsys):
    """All five stages from a Hugging Face folder, in one study; the page shows the texts, escaped."""
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    config = quickstart.PRESETS["smollm2"][1]
    common = dict(lengths=dataclasses.replace(config.sft.lengths, prompt=40, response=12), batch_size=16, eval_size=16)
    stages = {
        "sft": dataclasses.replace(config.sft, model=str(model), steps=3, **common),
        "reward_model": dataclasses.replace(config.reward_model, steps=3, **common),
        "dpo": dataclasses.replace(config.dpo, steps=3, **common),
        "ppo": dataclasses.replace(config.ppo, iterations=2, **(common | {"batch_size": 32})),
        "rto": config.rto,
    }
    page = quickstart.run(dataclasses.replace(config, out=str(tmp_path / "study"), data=str(data), **stages))
    printed, text = capsys.readouterr().out, page.read_text()
    assert "train: 64 pairs" in printed
    assert "test_hard" in text and "&lt;|" in text and "<|" not in text
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert {"SFT", "DPO", "PPO", "RTO", "reward model"} <= results["figures"].keys()
    assert 0 <= results["figures"]["reward model"][0]["test_hard"]["accuracy"] <= 1
    assert results["figures"]["RTO"][0]["n"] == 16
    samples = json.loads((tmp_path / "study" / "seed0" / "rto" / "samples.json").read_text())
    assert set(samples[0]["texts"]) == {"SFT", "DPO", "RTO"} and samples[0]["prompt"].rstrip("?")


def failing(capsys, module, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        command(module, *argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", ["train.jsonl:3", "JSON"]),
        ('{"prompt": "a", "chosen": "b"}', ["train.jsonl:3"]),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', ["train.jsonl:3", "empty"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', ["train.jsonl:3"]),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, capsys, line, words):
    model = write_model(tmp_path / "model")
    lines = [json.dumps(r) for r in records(40, 1)]
    lines[2] = line
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    argv = ["--model", str(model), "--data", str(tmp_path / "train.jsonl"), *FLAGS]
    error = failing(capsys, sft, *argv, "--out", str(tmp_path / "out"))
    assert all(word in error for word in words), error
    command(sft, *argv, "--out", str(tmp_path / "skipped"), "--skip-bad-records")
    assert "39" in capsys.readouterr().out


def test_missing_empty_and_torn_data(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    argv = ["--model", str(model), *FLAGS, "--out", str(tmp_path / "out")]
    assert "--data" in failing(capsys, sft, *argv)
    assert "nowhere" in failing(capsys, sft, *argv, "--data", str(tmp_path / "nowhere"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in failing(capsys, sft, *argv, "--data", str(tmp_path / "empty.jsonl"))
    whole = gzip.compress("".join(json.dumps(r) + "\n" for r in records(40, 1)).encode())
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "torn.jsonl.gz" in failing(capsys, sft, *argv, "--data", str(tmp_path / "torn.jsonl.gz"))
    assert not (tmp_path / "out" / "checkpoints").exists() or not list((tmp_path / "out" / "checkpoints").iterdir())


def test_prompts_longer_than_the_limit(tmp_path, capsys):
    """Cut by default, and counted; refused where the limit leaves no room, or where that was asked for."""
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    argv = ["--model", str(model), "--data", str(data), *FLAGS]
    error = failing(capsys, sft, *argv, "--lengths.prompt", "3", "--out", str(tmp_path / "a"))
    assert "prompt" in error and "3" in error
    error = failing(
        capsys, sft, *argv, "--lengths.prompt", "12", "--lengths.on-long-prompt", "error", "--out", str(tmp_path / "b")
    )
    assert "train.jsonl.gz:" in error and "12" in error
    command(sft, *argv, "--lengths.prompt", "12", "--out", str(tmp_path / "c"))
    assert "prompts cut to 12 tokens" in capsys.readouterr().out


def test_models_with_other_tokenizers_do_not_meet(tmp_path, capsys):
    """A DPO model and a reward model with another chat template than the policy's."""
    data = write_data(tmp_path / "data")
    for name, template in (("one", TEMPLATE), ("two", TEMPLATE.replace("<|end|>", "<|end|> "))):
        model = write_model(tmp_path / name, template)
        command(sft, "--model", str(model), "--data", str(data), *FLAGS, "--out", str(tmp_path / f"sft-{name}"))
    command(
        reward_model, "--init", str(tmp_path / "sft-two"), "--data", str(data), *FLAGS, "--out", str(tmp_path / "rm-two")
    )
    capsys.readouterr()
    common = ["--data", str(data), *FLAGS[:6], "--batch-size", "32", "--micro-batches", "1"]
    error = failing(
        capsys, rto, *common, "--sft", str(tmp_path / "sft-one"), "--reward-model", str(tmp_path / "rm-two"),
        "--dpo", str(tmp_path / "sft-one"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert "--reward-model" in error and "tokenizer" in error
    error = failing(
        capsys, rto, *common, "--sft", str(tmp_path / "sft-two"), "--reward-model", str(tmp_path / "rm-two"),
        "--dpo", str(tmp_path / "sft-one"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert "--dpo" in error and "tokenizer" in error
