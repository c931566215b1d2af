"""Pictures of digits as tokens: the world and its judges, the task, the exact optimum and credit, and the picture."""

import json
import types

import jax
import numpy as np
import pytest

from experiments import digits as study_of_digits
from experiments import dpo, ppo, reward_model, rto, sft
from experiments.common import GoldData, open_model
from experiments.study import StudyConfig, base_arms, make
from experiments.tasks import DigitsTask, GoldTask, make_task
from rto_jax import digits
from rto_jax.data import Lengths
from rto_jax.errors import UserError
from rto_jax.sharding import make_mesh
from rto_jax.types import Pairs, Sequences

pytest.importorskip("sklearn")
WORLD = digits.Digits()


def asking(labels) -> np.ndarray:
    return (digits.ASK + np.asarray(labels))[:, None]


def rows(prompts, pictures) -> Sequences:
    tokens = np.concatenate([prompts, pictures], axis=1).astype(np.int32)
    return Sequences(tokens, np.ones(tokens.shape, bool), np.ones(pictures.shape, bool))


# ---- the world


def test_the_splits_share_no_picture():
    (train, train_labels), (test, test_labels) = WORLD.real("train"), WORLD.real("test")
    assert (len(train), len(test)) == (1_397, 400) == (len(train_labels), len(test_labels))
    assert {0, 16} == {int(train.min()), int(train.max())} and train.dtype == np.int32
    both = np.concatenate([train, test])
    whole = digits._load()[0]
    assert sorted(map(bytes, both)) == sorted(map(bytes, whole))
    with pytest.raises(UserError, match='"train" and "test"'):
        WORLD.real("validation")


def test_the_judges_know_real_digits_and_the_reward_is_the_network_s_log_probability():
    pictures, labels = WORLD.real("test")
    for judge in digits.Judges._fields:
        assert WORLD.recognised(asking(labels), pictures, judge).mean() > 0.95
        assert WORLD.recognised(asking((labels + 1) % 10), pictures, judge).mean() < 0.05
    returns = WORLD.returns(asking(labels), pictures)
    # The network by hand: a hidden layer of rectified sums, then a softmax.
    network = WORLD.judges.gold
    hidden = np.maximum(pictures / 16 @ network.coefs_[0] + network.intercepts_[0], 0)
    logits = hidden @ network.coefs_[1] + network.intercepts_[1]
    expected = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(400), labels]
    np.testing.assert_allclose(returns, expected, atol=1e-5)
    assert returns.max() <= 0 and returns.mean() > WORLD.returns(asking((labels + 1) % 10), pictures).mean() + 3


def test_what_is_no_grey_level_is_blank():
    picture = np.full((1, 64), 8)
    odd = picture.copy()
    odd[0, :3] = 17, 19, -1
    picture[0, :3] = 0
    np.testing.assert_array_equal(digits.ink(odd), digits.ink(picture))
    assert digits.ink(np.full((1, 64), 16)).max() == 1.0
    with pytest.raises(UserError, match="rows of 64 ids"):
        digits.ink(np.zeros((1, 63)))
    for prompts in (np.zeros((1, 1), int), np.full((1, 1), 30), np.full((1, 2), 20)):
        with pytest.raises(UserError, match="one id, 20..29"):
            WORLD.asked(prompts)


# ---- the task


def stage(**fields) -> sft.SftConfig:
    return sft.SftConfig(**dict(out="", data="digits", lengths=Lengths(1, 64), gold=GoldData(0, 6, 6, 20)) | fields)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(stage().mesh)


@pytest.fixture(scope="module")
def task(mesh) -> DigitsTask:
    return make_task(stage(), mesh, open_model("gold", stage(), "--model"))


def test_data_chooses_the_task(mesh, task):
    plain = sft.SftConfig(out="")
    assert isinstance(task, DigitsTask)
    assert isinstance(make_task(plain, mesh, open_model("gold", plain, "--model")), GoldTask)
    with pytest.raises(UserError, match="--lengths.response 64"):
        make_task(stage(lengths=Lengths(4, 24)), mesh, open_model("gold", plain, "--model"))


def test_the_task_s_rows(task):
    examples = task.examples("train").rows
    pictures, labels = WORLD.real("train")
    np.testing.assert_array_equal(examples.tokens[:, 1:], pictures)
    np.testing.assert_array_equal(examples.tokens[:, 0], digits.ASK + labels)
    assert examples.mask.all() and examples.mask.shape == (1_397, 64)
    prompts = task.prompts("train").rows
    assert np.bincount(prompts.tokens[:, 0])[digits.ASK :].tolist() == [len(prompts.tokens) // 10] * 10
    assert task.prompt_text(np.array([27])) == "draw a 7"
    drawn = task.answer_text(np.array([27]), np.arange(64) % 17).split("\n")
    assert len(drawn) == 8 and drawn[0] == "      ░░░░░░▒▒▒▒" and {len(line) for line in drawn} == {16}


def test_pairs_are_labelled_by_the_gold_return(task, monkeypatch):
    """The better picture wins where the difference is large; training and held-out pairs have other noise."""
    pictures, labels = WORLD.real("test")
    seeds = []

    def drawn(task, config, params, prompts, seed, sampling):
        seeds.append(seed)
        asked = prompts.tokens[:, 0] - digits.ASK
        right = [np.flatnonzero(labels == d)[0] for d in asked]
        wrong = [np.flatnonzero(labels == (d + 1) % 10)[0] for d in asked]
        odd = np.arange(len(asked)) % 2 == 1
        return rows(prompts.tokens, pictures[np.where(odd, right, wrong)])

    monkeypatch.setattr("experiments.tasks.sample_rows", drawn)
    model = types.SimpleNamespace(source="nowhere", config=None, load=lambda mesh: None)
    pairs: Pairs = task.pairs("train", model).rows
    assert len(pairs.chosen.tokens) == 6
    np.testing.assert_array_equal(pairs.chosen.tokens[:, 0], pairs.rejected.tokens[:, 0])
    assert (task.returns(pairs.chosen) > task.returns(pairs.rejected) + 2).mean() > 0.8
    assert task.pair_facts("train", pairs)["ceiling"] > 0.8
    task.pairs("test", model)
    assert len(seeds) == len(set(seeds)) == 2


# ---- the exact optimum and credit


def fake_bench(returns, **more):
    columns = {"gold_return": returns, "recognised": returns > -1, "recognised_other": returns > -2}
    return types.SimpleNamespace(judged=lambda seqs: columns, beta=0.5, **more)


def test_the_optimum_by_hand():
    """Every digit: half of the pictures earn 0, half −0.5: J* = ½ log(½ + ½ e^−1), and π* keeps them as 1 : e^−1."""
    returns = np.repeat([0.0, -0.5], 50)  # ten digits, five pictures each
    found = study_of_digits.Bench.optimum(fake_bench(returns), None)
    weight = np.exp(-1)
    assert found["J"] == pytest.approx(0.5 * np.log((1 + weight) / 2))
    assert found["J_reference"] == -0.25
    assert found["gold_return"] == pytest.approx(-0.5 * weight / (1 + weight))
    p = np.array([1, weight]) / (1 + weight)
    assert found["kl"] == pytest.approx((p * np.log(2 * p)).sum())  # of π* to half and half
    assert np.allclose(found["values"], found["J"]) and found["J_se"] > 0


def test_no_other_policy_is_better():
    """J of any reweighting of the same pictures is at most J*."""
    rng = np.random.default_rng(0)
    returns = -rng.exponential(2.0, 400)
    best = study_of_digits.Bench.optimum(fake_bench(returns), None)["J"]
    for temperature in (0.25, 0.5, 1.0, 4.0):
        weights = np.exp(returns / temperature).reshape(-1, 10)
        p = weights / weights.sum(0)
        value = ((p * returns.reshape(-1, 10)).sum(0) - 0.5 * (p * np.log(p * len(p))).sum(0)).mean()
        assert value <= best + 1e-9
        assert (temperature == 0.5) == (value > best - 1e-9)


def test_exact_credit_reads_each_prefix_and_adds_up(task, monkeypatch):
    """What SFT finishes begins with the prefix, row by row; the credits of a picture sum to R − V*(s_0)."""
    pictures = np.arange(128).reshape(2, 64) % 17
    seqs = rows(asking([3, 8]), pictures)
    seen = []

    def finish(task, config, params, prompts, seed, sampling, size):
        new = np.full((len(prompts.tokens), sampling.max_new_tokens), 16)
        assert sampling.max_new_tokens + prompts.tokens.shape[1] >= 1 + 64
        return rows(prompts.tokens, new)._replace(valid=np.concatenate([prompts.valid, new > 0], axis=1))

    def returns(prompts, wholes):
        seen.append((prompts, wholes))
        return -wholes.mean(1) / 16 - prompts[:, 0] / 100

    monkeypatch.setattr(study_of_digits, "sample_rows", finish)
    world = types.SimpleNamespace(returns=returns, asked=digits.Digits.asked)
    bench = types.SimpleNamespace(task=task, config=None, params={"SFT": None}, seed=0, beta=0.5, world=world)
    start = -np.linspace(0.1, 1.0, 10)
    found = study_of_digits.Bench.exact_credit(bench, seqs, start)
    prompts, wholes = seen[0]
    assert wholes.shape == (2 * 7 * study_of_digits.FINISHED, 64)
    wholes = wholes.reshape(2, 7, study_of_digits.FINISHED, 64)
    for row in range(1, 8):
        for number in range(2):
            np.testing.assert_array_equal(wholes[number, row - 1, :, : 8 * row], np.tile(pictures[number, : 8 * row], (study_of_digits.FINISHED, 1)))
            assert (wholes[number, row - 1, :, 8 * row :] == 16).all()
    assert (prompts.reshape(2, -1) == asking([3, 8])).all()
    ends = returns(asking([3, 8]), pictures)
    assert found.shape == (2, 8)
    np.testing.assert_allclose(found.sum(1), ends - start[[3, 8]])
    # One finish only, so V* is its return: a row's credit is the difference of two of them.
    inside = returns(asking([3]), wholes[:1, 3, 0]) - returns(asking([3]), wholes[:1, 2, 0])
    assert found[0, 3] == pytest.approx(inside[0])


# ---- the study


def test_rl_arms_differ_from_the_gold_world_s_in_data_and_temperature_alone():
    arms = study_of_digits.arms("gold")
    for name in ("PPO", "RTO"):
        ours, theirs = vars(arms[name].config), vars(base_arms("gold")[name].config)
        changed = {key for key in theirs if ours[key] != theirs[key]}
        assert changed == {"data", "lengths", "gold", "eval_every", "beta2"} | ({"beta1"} if name == "RTO" else set())
    assert arms["RTO"].upstream["sft"].folder == arms["PPO"].upstream["sft"].folder == arms["SFT"].folder
    assert arms["RTO"].upstream["dpo"].folder == arms["DPO"].folder


def synthetic(seeds: int) -> dict:
    rng = np.random.default_rng(0)
    row = dict(gold_return=-1.0, kl=2.0, J=-2.0, share=0.4, recognised=0.75, recognised_other=0.7)
    row |= {f"{key}_se": 0.01 for key in row}
    names = ["SFT", "DPO", "PPO", "RTO", "exact optimum"]
    pictures = lambda n: rng.integers(0, 17, (n, 64)).tolist()  # noqa: E731
    dense = rng.normal(size=(20, 64))
    return {
        "arms": {name: [dict(row) for _ in range(seeds)] for name in names}, "answers": 1_000, "beta": 0.5,
        "stages": {name: [{"accuracy": 0.7, "ceiling": 0.8}] * seeds for name in ("reward model", "DPO")},
        "judges": {"gold": 0.97, "other": 0.985, "gold_return": -0.16, "n": 400},
        "pictures": {name: pictures(10) for name in names}, "read_as": {name: [0, 1, 2, 3, 4, 5, 6, 7, 8, 4] for name in names},
        "credit": {"pictures": pictures(20), "read_as": list(range(10)), "dpo": dense.tolist(),
                   "exact": dense.reshape(20, 8, 8).sum(-1).tolist()},
    }  # fmt: skip


@pytest.mark.parametrize(("seeds", "says"), [(1, "| −1.00 ± 0.01 |"), (2, "| −1.00 [−1.00, −1.00] |")])
def test_what_is_drawn_comes_from_the_json(seeds, says, tmp_path):
    text = study_of_digits.draw(synthetic(seeds), tmp_path)
    assert says in text and "pictures by SFT: 1.00." in text and "| real digits, held out | −0.16 |" in text
    assert (tmp_path / "gold.svg").stat().st_size > 10_000


def test_a_mosaic_puts_every_picture_in_its_place():
    whole = study_of_digits.mosaic([[np.full(64, d) for d in range(10)]], [3], 12)
    assert whole.shape == (12, 89) and np.isnan(whole[:3]).all() and np.isnan(whole[11]).all()
    assert (whole[3:11, 9:17] == 1).all() and np.isnan(whole[3:11, 17]).all()


@pytest.mark.slow
def test_the_stages_run_on_pictures(tmp_path):
    """SFT to RTO by the same modules, a few steps each; every one leaves figures of pictures."""
    common = dict(data="digits", lengths=Lengths(1, 64), gold=GoldData(0, 64, 32, 40), batch_size=32, eval_size=32)
    folder = lambda name: str(tmp_path / name)  # noqa: E731
    figures = {"sft": sft.run(sft.SftConfig(out=folder("sft"), steps=3, **common))}
    figures["reward_model"] = reward_model.run(reward_model.RewardConfig(out=folder("rm"), init=folder("sft"), steps=3, **common))
    figures["dpo"] = dpo.run(dpo.DpoConfig(out=folder("dpo"), init=folder("sft"), steps=3, **common))
    fields = dict(sft=folder("sft"), reward_model=folder("rm"), iterations=2, eval_every=1, **common)
    figures["ppo"] = ppo.run(ppo.PpoRunConfig(out=folder("ppo"), **fields))["PPO"]
    figures["rto"] = rto.run(rto.RtoRunConfig(out=folder("rto"), dpo=folder("dpo"), **fields))["RTO"]
    for name in ("sft", "dpo", "ppo", "rto"):
        assert figures[name]["gold_return"] < 0 <= figures[name]["recognised"] <= 1
    assert 0 <= figures["reward_model"]["test"]["accuracy"] <= 1
    asked = [row["prompt"] for row in json.loads((tmp_path / "rto" / "samples.json").read_text())]
    assert len(asked) == 8 and set(asked) <= {f"draw a {digit}" for digit in range(10)}


@pytest.mark.slow
def test_a_cheap_run_from_start_to_end(tmp_path):
    config = StudyConfig(data="digits", runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), cheap=True, jobs=1)
    text = make(study_of_digits.TABLE, "gold", config)
    assert "nothing can be concluded" in text and (tmp_path / "results/digits/gold.svg").exists()
    assert jax.device_count() == 8
