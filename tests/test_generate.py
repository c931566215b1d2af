"""experiments.generate on a tiny Hugging Face folder and in the gold world, from the command line."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import generate
from experiments.common import main, open_model
from experiments.tasks import map_rows
from rto_jax import gold, programs
from rto_jax.data import Lengths
from rto_jax.sharding import make_mesh
from rto_jax.types import Sequences
from tests.test_text import write_model

QUESTIONS = ("sun or tree?", "one <b>river</b>", "3 or 4?")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one tokenizer; the second has other weights."""
    base = tmp_path_factory.mktemp("models")
    first, second = write_model(base / "first"), write_model(base / "second")
    file = second / "model.safetensors"
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(1)
    save_file({name: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32) for name, x in load_file(file).items()}, file)
    return str(first), str(second)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return str(file)


def answers(models, method, **fields):
    config = dict(model=models[0], method=method, prompt=QUESTIONS, lengths=Lengths(24, 6), batch_size=8)
    return generate.run(generate.GenerateConfig(**config | fields))


@pytest.fixture
def written(monkeypatch):
    """The rows that were written, as arrays."""
    seen, real = [], generate.records_of
    monkeypatch.setattr(generate, "records_of", lambda seqs, *rest: seen.append(seqs) or real(seqs, *rest))
    return seen


def log_ratios(models, seqs: Sequences) -> np.ndarray:
    """Σ log π_second/π_first of each answer."""
    mesh, stage, sums = make_mesh(generate.MeshConfig()), generate.GenerateConfig(model=models[0]).stage, []
    for source in models:
        model = open_model(source, stage, "--model")
        run, params = programs.response_logps(model.config, mesh), model.load(mesh)
        sums.append(map_rows(lambda batch, run=run, params=params: run(params, batch), seqs, 8, mesh).sum(1))
    return sums[1] - sums[0]


def test_greedy_is_what_one_beam_finds_and_what_is_written(models, data, tmp_path, capsys):
    """From the command line, with prompts from a file; the same as from --prompt and as --method beam --beams 1."""
    flags = ["--model", models[0], "--data", data, "--lengths.prompt", "24", "--lengths.response", "6", "--batch-size", "8"]
    main(generate.PRESETS, generate.run, generate.__doc__, ["--preset", "smollm2", "--method", "greedy", *flags, "--out", str(tmp_path / "out")])
    written = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    printed = capsys.readouterr().out
    assert [row["prompt"] for row in written] == list(QUESTIONS)
    assert all(f"{row['prompt']}\n  -> {row['answer']}" in printed for row in written)
    assert written[0].keys() == {"prompt", "answer", "score", "tokens", "ended"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["config"]["method"] == "greedy" and "git" in config
    beam = answers(models, "beam", beams=1)
    assert [row | {"score": 0} for row in beam] == [row | {"score": 0} for row in written]
    assert [row["score"] for row in beam] == pytest.approx([row["score"] for row in written], abs=1e-4)


def test_scores_are_what_answers_were_chosen_by(models, written):
    tuned = {
        "guided-beam": dict(model=models[1], reference=models[0], top_k=40, beams=2),
        "chunk-beam": dict(guide=models[1], reference=models[0], chunk=3, n=2, beams=2, temperature=0.3),
    }
    for method, fields in tuned.items():
        found = answers(models, method, beta=0.5, **fields)
        assert [row["score"] for row in found] == pytest.approx(0.5 * log_ratios(models, written[-1]), abs=1e-3), method


def test_best_of_n_by_a_python_function(models, monkeypatch):
    """The more characters the better; the function sees the texts."""
    seen = []
    monkeypatch.setattr("tests.test_generate.long", lambda prompt, answer: seen.append(prompt) or len(answer), raising=False)
    found = answers(models, "best-of-n", score="tests.test_generate:long", n=3)
    assert [row["score"] for row in found] == [len(row["answer"]) for row in found]
    assert len(seen) == 8 * 3 and "sun or tree?" in seen[0]


def test_proxy_tuning_with_alpha_0_is_the_base_and_with_1_emulates_the_guide(models):
    """The base is the pair's reference here, so at 1 what is left is the guide alone."""
    plain = [answers((source, ""), "greedy") for source in models]
    for alpha in (0.0, 1.0):
        found = answers(models, "proxy", reference=models[0], guide=models[1], alpha=alpha, temperature=0.0)
        assert [row["answer"] for row in found] == [row["answer"] for row in plain[int(alpha)]]
    assert plain[0] != plain[1]


def test_the_gold_world(capsys):
    config = dataclasses.replace(generate.PRESETS["gold"][1], model="gold", prompt=("x0 x3 x7 x1", "x1 x1 x2 x5"))
    found = generate.run(config)
    assert all(set(row["answer"].split()) <= set(gold.TOKEN_NAMES[: gold.OUTPUTS]) for row in found)
    assert [row["tokens"] for row in found] == [len(row["answer"].split()) for row in found]
    assert "x0 x3 x7 x1\n  -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "beam", "--n", "8"], "--n 8 has no effect: --method beam does not take it"),
        (["--method", "guided-beam"], "--method guided-beam needs --reference"),
        (["--method", "best-of-n", "--reference", "a", "--reward-model", "b"], "and one of them only"),
        (["--method", "proxy", "--guide", "a"], "--method proxy needs --reference"),
        (["--method", "beam", "--beams", "0"], "beams must be at least 1, not 0"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--prompt", "x0 x1", "--model", "gold"], "4 of the words x0 x1"),
        (["--prompt", "x0", "--data", "here"], "--prompt and --data"),
        (["--model", "runs/nowhere"], "--model runs/nowhere holds no model"),
        (["--method", "best-of-n", "--model", "gold", "--score", "nowhere:f"], "--score nowhere:f is not MODULE:FUNCTION"),
        (["--out", "tests"], "--out tests exists already"),
    ],
)
def test_bad_flags(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(generate.PRESETS, generate.run, generate.__doc__, flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and error.count("\n") == 1
