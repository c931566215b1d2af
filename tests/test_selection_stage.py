"""experiments.selection: what it trains on is what the library's functions choose by the reward model's scores."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ppo, reward_model, selection, sft
from experiments.common import GoldData, main
from experiments.selection import Judge, accepted, answered, choose, labelled, make_labels
from rto_jax import gold, losses, programs
from rto_jax.checkpoint import restore_params
from rto_jax.data import Lengths
from rto_jax.metrics import MetricsLog
from rto_jax.models import SIZES, LoraConfig
from rto_jax.rng import stream
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import MeshConfig, make_mesh, put_batch
from rto_jax.types import Prompts, Sequences
from tests.test_text import write_model

TINY = dict(gold=GoldData(examples=64, pairs=64, test_pairs=32, rollouts=16), batch_size=64, eval_size=16)
chosen_of, texts_behind = jax.jit(choose, static_argnums=0), jax.jit(labelled)
TRAINED = get_args(selection.Method)[1:]
SCORES = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)


def config_of(method, **fields):
    return dataclasses.replace(selection.presets(method)["gold"][1], **TINY | fields)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Flags: an SFT run and a reward model, hardly trained."""
    base = tmp_path_factory.mktemp("selection")
    sft.run(dataclasses.replace(sft.PRESETS["gold"][1], out=str(base / "sft"), steps=2, **TINY))
    reward = reward_model.PRESETS["gold"][1]
    reward_model.run(dataclasses.replace(reward, out=str(base / "rm"), init=str(base / "sft"), steps=2, **TINY))
    return dict(sft=str(base / "sft"), reward_model=str(base / "rm"))


def test_raft_keeps_the_top_answers():
    rows = np.asarray(chosen_of(config_of("raft", keep=2), SCORES, jax.random.key(0)))
    kept = np.zeros(16, bool)
    kept[rows] = True
    assert len(rows) == 8
    np.testing.assert_array_equal(kept.reshape(4, 4), losses.top_answers(SCORES, k=2))


def test_iterative_dpo_pairs_the_best_with_the_worst():
    rows = np.asarray(chosen_of(config_of("iterative_dpo", n=4), SCORES, jax.random.key(0)))
    np.testing.assert_array_equal(rows, np.stack([SCORES.argmax(1), SCORES.argmin(1)], 1) + 4 * np.arange(4)[:, None])


def test_rso_takes_pass_after_pass_of_rejection_sampling():
    """The k accepted first, by a loop around the library's one pass; pairs of neighbours, the higher score chosen."""
    key, beta = jax.random.key(3), 0.7
    one_pass = jax.jit(functools.partial(losses.rejection_sample, beta=beta))
    left, expected = np.ones(SCORES.shape, bool), [[] for _ in SCORES]
    for number in range(4):
        kept = np.asarray(one_pass(jax.random.fold_in(key, number), SCORES, left))
        left &= ~kept
        for found, row in zip(expected, kept, strict=True):
            found.extend(row.nonzero()[0])
    indices = np.asarray(jax.jit(functools.partial(accepted, beta=beta, k=4))(key, SCORES))
    np.testing.assert_array_equal(indices, expected)
    assert (indices != np.argsort(-SCORES, 1)).any()
    rows = np.asarray(chosen_of(config_of("rso", keep=4, rejection_beta=beta), SCORES, key))
    assert (SCORES.reshape(-1)[rows[:, 0]] >= SCORES.reshape(-1)[rows[:, 1]]).all()
    neighbours = (indices + 4 * np.arange(4)[:, None]).reshape(-1, 2)
    np.testing.assert_array_equal(np.sort(rows, 1), np.sort(neighbours, 1))


def test_labels_of_the_gold_world_are_its_unused_ids():
    labels = make_labels(None, SimpleNamespace(tokenizer=None))
    prompts = Prompts(np.full((3, 4), 20, np.int32), np.ones((3, 4), bool))
    found = texts_behind(prompts, labels, np.float32([-1.0, 0.2, 2.0]))
    np.testing.assert_array_equal(found.tokens, [[20, 20, 20, 20, x] for x in (29, 30, 31)])
    assert gold.PAD < 29 and gold.VOCAB_SIZE == 32 and found.valid.all()


def test_labels_of_text_are_the_score_with_two_decimals():
    def encode_all(texts):
        return [list(text.encode()) for text in texts]

    tokenizer = SimpleNamespace(encode_all=encode_all)
    labels = make_labels(SimpleNamespace(pad_id=0), SimpleNamespace(tokenizer=tokenizer))
    prompts = Prompts(np.int32([[0, 0, 5], [7, 8, 9], [0, 1, 2]]), np.array([[0, 0, 1], [1, 1, 1], [0, 1, 1]], bool))
    found = texts_behind(prompts, labels, np.float32([0.43, -1.5, 7.0]))
    for tokens, valid, prompt, real, text in zip(*found, *prompts, ("0.43", "-1.50", "3.00"), strict=True):
        assert np.all(np.diff(np.asarray(valid, int)) >= 0)
        np.testing.assert_array_equal(tokens[valid], [*prompt[real], *encode_all([f" <rm_score>: {text}\n"])[0]])


def test_answers_move_behind_other_prompts():
    mask = np.array([[True, True, False]])
    seqs = Sequences(np.int32([[1, 2, 7, 8, 0]]), np.array([[True, True, True, True, False]]), mask)
    moved = answered(Prompts(np.int32([[0, 1, 2, 31]]), np.array([[False, True, True, True]])), seqs)
    np.testing.assert_array_equal(moved.tokens, [[0, 1, 2, 31, 7, 8, 0]])
    np.testing.assert_array_equal(moved.valid, [[False, True, True, True, True, True, False]])


def test_the_collector_trains_on_the_chosen_answers(monkeypatch):
    """Around a sampler and a reward model that are looked at easily: an answer is its row's number."""
    config, mesh = config_of("raft", n=4, minibatches=2), make_mesh(MeshConfig())
    scores = np.random.default_rng(2).normal(size=64).astype(np.float32)

    def sampler(params, prompts, keys):
        tokens = jnp.arange(64, dtype=jnp.int32)[:, None] + jnp.zeros((64, 3), jnp.int32)
        return Sequences(tokens, tokens >= 0, tokens[:, 1:] >= 0), None

    monkeypatch.setattr(programs, "sampler", lambda *_: sampler)
    monkeypatch.setattr(programs, "scores", lambda *_: lambda params, rows: params[rows.tokens[:, 0]])
    monkeypatch.setattr(programs, "pair_logps", lambda *_: None)
    prompts = Prompts(np.zeros((64, 1), np.int32), np.ones((64, 1), bool))
    collect = selection.collector.__wrapped__(config, None, None, "token", gold.EOS, gold.PAD, mesh)
    parts, metrics = jax.device_get(collect(None, scores, None, None, prompts, jax.random.key(0)))
    best = np.asarray(losses.best_of_n(scores.reshape(16, 4))) + 4 * np.arange(16)
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part.tokens[:, 1], best[i::2])
    np.testing.assert_allclose(metrics["chosen_score"], scores[best].mean(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["raft", "rso", "conditioned"])
def test_an_iterations_batches_are_the_chosen_of_its_own_answers(method):
    """The program against its parts: the sampler's answers, the reward model's scores, what `choose` says of them."""
    config, mesh, size = config_of(method, n=4, minibatches=2), make_mesh(MeshConfig()), SIZES["gold"]
    models = [jax.jit(programs.init_fn(size, head))(jax.random.key(i)) for i, head in enumerate(("lm", "token"))]
    tokens = np.repeat(np.random.default_rng(1).integers(20, 28, (16, 4)), 4, axis=0).astype(np.int32)
    prompts = put_batch(Prompts(tokens, np.ones(tokens.shape, bool)), mesh)
    labels = make_labels(None, SimpleNamespace(tokenizer=None)) if method == "conditioned" else None
    key = stream(0, "rollout", 1)
    collect = selection.collector(config, size, size, "token", gold.EOS, gold.PAD, mesh)
    parts, metrics = jax.device_get(collect(*models, models[0], labels, prompts, key))

    draw, pick = jax.random.split(key)
    sampler = programs.sampler(size, SamplingConfig(24), gold.EOS, gold.PAD, mesh)
    seqs = jax.device_get(sampler(models[0], prompts, jax.random.split(draw, 64))[0])
    scores = np.asarray(programs.scores(size, "token", mesh)(models[1], seqs))
    rows = np.asarray(chosen_of(config, scores.reshape(16, 4), pick))
    assert len(set(scores)) > 32
    np.testing.assert_allclose(metrics["score"], scores.mean(), rtol=1e-5)
    if method == "conditioned":
        thirds = np.searchsorted([-0.43, 0.43], (scores - scores.mean()) / scores.std())
        seqs = answered(Prompts(np.c_[tokens, 29 + thirds].astype(np.int32), np.ones((64, 5), bool)), seqs)
    if method == "raft":
        np.testing.assert_array_equal(rows, 4 * np.arange(16) + scores.reshape(16, 4).argmax(1))
    for i, part in enumerate(parts):
        sides = part.pairs if method == "rso" else [part]
        for side, found in enumerate(sides):
            chosen = rows[:, side] if method == "rso" else rows
            chex.assert_trees_all_equal(found, jax.tree.map(lambda x, r=chosen[i::2]: x[r], seqs))


def test_figures_of_the_best_of_n(monkeypatch):
    """n = 1 is what was drawn. Where the SFT policy is pi0 itself, the bound on the KL to pi0 is log n - (n-1)/n."""
    config = config_of("best_of_n")
    world = gold.World()
    task = SimpleNamespace(world=world, mesh=make_mesh(MeshConfig()))
    prompts, rng = world.prompts(np.random.default_rng(0), 64), np.random.default_rng(1)
    each = np.repeat(prompts, 2, axis=0)
    tokens, mask = world.sample_pi0(each, rng)
    seqs = Sequences(np.c_[each, tokens], np.c_[np.ones(each.shape, bool), mask], mask)
    scores, returns = rng.normal(size=(64, 2)), world.returns(each, tokens, mask).reshape(64, 2)
    judge = Judge(config, task, SimpleNamespace(tokenizer=None), None, None, None, None)

    def logps(self, params, rows):
        return world._along(world.log_pi0, rows.tokens[:, :4], rows.tokens[:, 4:], rows.mask).sum(1)

    monkeypatch.setattr(Judge, "logps", logps)
    for n, best in ((1, np.zeros(64, int)), (2, scores.argmax(1))):
        figures, chosen = judge.best_of(n, Prompts(prompts, prompts > 0), seqs, scores.reshape(-1))
        chex.assert_trees_all_equal(chosen, jax.tree.map(lambda x, i=best: x[2 * np.arange(64) + i], seqs))
        bound = np.log(n) - (n - 1) / n
        expected = returns[np.arange(64), best].mean(dtype=np.float64)
        assert figures["gold_return"] == expected and figures["n_answers"] == n
        np.testing.assert_allclose([figures["kl_to_sft_bound"], figures["kl_bound"]], bound, atol=1e-6)
        np.testing.assert_allclose(figures["J_bound"], expected - 0.5 * bound, rtol=1e-6)
        assert figures["length"] == chosen.mask.sum(1).mean()


@pytest.mark.slow
def test_best_of_one_is_plain_sampling(start, tmp_path):
    """To the bit, as the SFT stage scored its model. Of more, the frontier has 1, 2, 4 of the same answers."""
    figures = selection.run(config_of("best_of_n", n=4, out=str(tmp_path / "four"), **start))
    rows = figures.pop("frontier")
    assert [row["n_answers"] for row in rows] == [1, 2, 4] and rows[-1] == figures
    assert np.all(np.diff([row["score"] for row in rows]) >= 0)
    one = selection.run(config_of("best_of_n", n=1, out=str(tmp_path / "one"), **start))
    expected = json.loads((Path(start["sft"]) / "results.json").read_text())
    assert one["gold_return"] == expected["gold_return"] and one["length"] == expected["length"]
    assert np.load(tmp_path / "one" / "returns-1.npy").mean(dtype=np.float64) == one["gold_return"]
    assert not list((tmp_path / "one").glob("checkpoints/*")) and (tmp_path / "one" / "report.html").exists()


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lora"), [*((x, 0) for x in TRAINED), ("raft", 2), ("rso", 2)])
def test_resume_ends_with_the_same_bytes(start, method, lora, tmp_path, monkeypatch):
    """Stopped after its first checkpoint, resumed: every parameter, logged metric and figure as without the stop."""
    small = dict(iterations=2, save_every=1, eval_every=1, n=4, lora=LoraConfig(lora))
    straight = config_of(method, out=str(tmp_path / "straight"), **small, **start)
    stopped = dataclasses.replace(straight, out=str(tmp_path / "stopped"))
    figures = selection.run(straight)
    assert {"gold_return", "kl", "J", "share", "length"} <= figures.keys() and figures["share"] <= 1
    push = MetricsLog.push

    def stop(self, step, metrics):
        if step == 2:
            raise Stopped
        return push(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "push", stop)
        with pytest.raises(Stopped):
            selection.run(stopped)
    assert selection.run(dataclasses.replace(stopped, resume=True)) == figures
    size = dataclasses.replace(SIZES["gold"], lora=LoraConfig(lora))
    abstract = programs.abstract_trained(size, "lm", make_mesh(MeshConfig()))
    one, two = (jax.device_get(restore_params(tmp_path / x / "checkpoints", abstract)) for x in ("straight", "stopped"))
    chex.assert_trees_all_equal(one, two)

    def lines(folder):
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "time_s"} for row in rows]

    assert lines("stopped") == lines("straight")
    assert (tmp_path / "straight" / "model.json").exists() == (method != "conditioned")


@pytest.mark.slow
@pytest.mark.parametrize("method", get_args(selection.Method))
def test_text(method, tmp_path):
    """A random Llama and a few records: figures of `summary`, for the SFT policy too."""
    model, data = write_model(tmp_path / "model"), tmp_path / "data.jsonl"
    records = [{"prompt": f"{i} + {i}?", "chosen": str(2 * i), "rejected": "no"} for i in range(128)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    common = dict(data=str(data), batch_size=32, eval_size=16, lengths=Lengths(24, 8), micro_batches=1)
    reward = reward_model.PRESETS["smollm2"][1]
    reward_model.run(dataclasses.replace(reward, init=str(model), out=str(tmp_path / "rm"), steps=1, **common))
    config = dataclasses.replace(
        selection.presets(method)["smollm2"][1], sft=str(model), reward_model=str(tmp_path / "rm"), iterations=2,
        out=str(tmp_path / method), **common,
    )  # fmt: skip
    figures = selection.run(config)
    if method == "best_of_n":
        assert figures["frontier"][0]["kl_bound"] == 0 and figures["score"] >= figures["frontier"][0]["score"]
    else:
        assert figures["kl"] != 0 and figures["SFT"]["kl"] == 0
    assert len(json.loads((tmp_path / method / "samples.json").read_text())) == 8


def test_every_method_has_ppos_rollouts_in_every_preset():
    """As many as PPO, in the same number of iterations, from the same models."""
    for method in get_args(selection.Method):
        for name, (_, config) in selection.presets(method).items():
            rl = ppo.PRESETS[name][1]
            assert config.method == method and config.iterations * config.batch_size == rl.iterations * rl.batch_size
            assert (config.sft, config.reward_model) == (rl.sft, rl.reward_model)
            assert dataclasses.replace(config) == config and hash(config)


@pytest.mark.parametrize("method", ["best_of_n", *(pytest.param(x, marks=pytest.mark.slow) for x in TRAINED)])
def test_dry_run(method, capsys):
    selection.run(config_of(method, out="", dry_run=True))
    assert f"{method}: mesh data 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "flags", "said"),
    [
        ("raft", "--n 0", "--n must be at least 1"),
        ("raft", "--keep 5", "--keep 5 is more than the --n 4 answers"),
        ("raft", "--beta 0.2", "--beta 0.2 has no effect: --method raft does not take it"),
        ("best_of_n", "--temperature 0.9", "--temperature 0.9 has no effect"),
        ("rso", "--keep 3", "--keep must be even"),
        ("rso", "--rejection-beta 0", "--rejection-beta must be positive"),
        ("iterative_dpo", "--n 1", "needs an --n of 2"),
        ("raft", "--n 3", "--batch-size 256 does not divide"),
        ("conditioned", "--minibatches 3", "--minibatches 3"),
        ("rafting", "", "raft"),
        ("raft", "--sft nowhere", "--sft nowhere holds no model"),
    ],
)  # fmt: skip
def test_bad_flags_end_in_one_sentence_with_status_2(method, flags, said, capsys, tmp_path):
    argv = ["--method", method, "--out", str(tmp_path / "out"), *flags.split()]
    with pytest.raises(SystemExit) as stop:
        main(selection.presets(selection.chosen_method(argv)), selection.run, selection.__doc__, argv)
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
