"""Figure 3: both sides of eq. 16 by hand and in NumPy, the arms, and what the drawing says."""

import json

import numpy as np
import pytest

from experiments import likelihoods, study
from experiments.common import GoldData
from experiments.likelihoods import EVERY, deviations, evaluated, identity, verdict


def test_the_identity_by_hand():
    """π_ref = (¾, ¼), π = (½, ½), β = 2, four answers in π_ref's proportions: both sides are −2 KL = −2(¾ log 3/2 − ¼ log 2)."""
    ref, own = (np.log(np.tile(np.array(p, np.float32), (4, 1, 1))) for p in ((0.75, 0.25), (0.5, 0.5)))
    tokens, mask = np.array([[0], [0], [0], [1]]), np.ones((4, 1), bool)
    found = identity(own, ref, tokens, mask, beta=2.0)
    kl = 0.75 * np.log(1.5) - 0.25 * np.log(2)
    assert found["sampled"] == pytest.approx(-2 * kl, abs=1e-6) == found["exact"]
    assert found["deviation"] == pytest.approx(0, abs=1e-6)
    # The tokens' log-ratios differ by 2 log 3: the standard deviation is half of that, √4 answers.
    assert found["deviation_se"] == pytest.approx(np.log(3) / 2)


def random_answers(seed, n=4000, length=5, vocabulary=6):
    """Logits of two random policies, answers of the first one, padded, in NumPy."""
    rng = np.random.default_rng(seed)
    ref, own = rng.normal(size=(2, n, length, vocabulary)).astype(np.float32)
    noise = rng.gumbel(size=ref.shape)
    mask = np.arange(length) < rng.integers(1, length + 1, size=(n, 1))
    return own, ref, np.where(mask, np.argmax(ref + noise, -1), 77), mask


def test_the_identity_against_numpy():
    own, ref, tokens, mask = random_answers(0)
    found = identity(own, ref, tokens, mask, beta=0.5)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (np.float64(own), np.float64(ref)))
    sampled, exact = np.zeros(len(mask)), np.zeros(len(mask))
    for i, t in zip(*np.nonzero(mask), strict=True):
        sampled[i] += 0.5 * (p - q)[i, t, tokens[i, t]]
        exact[i] -= 0.5 * (np.exp(q[i, t]) * (q - p)[i, t]).sum()
    off = sampled - exact
    expected = (sampled.mean(), exact.mean(), off.mean(), off.std(ddof=1) / len(off) ** 0.5)
    assert tuple(found.values()) == pytest.approx(expected, abs=1e-5)
    assert abs(found["deviation"]) < 3 * found["deviation_se"]


def test_answers_of_another_policy_break_the_identity():
    own, ref, tokens, mask = random_answers(1)
    found = identity(ref, own, tokens, mask, beta=0.5)  # as if π_ref were the other one
    assert abs(found["deviation"]) > 10 * found["deviation_se"]


def test_arms_learn_from_the_same_pairs():
    base, arms = study.base_arms("gold"), likelihoods.arms("gold")
    assert {arm.upstream["sampler"].folder for arm in arms.values()} == {base["SFT"].folder}
    assert len({arm.folder for arm in arms.values()}) == 3 == len({arm.config for arm in arms.values()}) + 2
    before = arms["no SFT"].upstream["init"]
    for name in ("chosen", "both"):
        init = arms[f"SFT on {name}"].upstream["init"]
        assert init.config.answers == name and init.upstream["model"].folder == before.folder != base["SFT"].folder
    config, theirs = arms["no SFT"].config, base["DPO"].config
    assert {key for key, value in vars(theirs).items() if getattr(config, key) != value} == {"out", "save_every", "keep"}
    assert evaluated(config) == [0, *range(EVERY, 512, EVERY), 512]
    assert config.keep >= len(evaluated(config))


def test_verdicts():
    of = lambda chosen, margin: {"chosen": chosen, "margin": margin}  # noqa: E731
    assert verdict(of([-1.0, -1.1], [0.5, 0.6])) == "the chosen answers' implicit reward falls, the margin grows"
    assert verdict(of([1.0, 1.1], [-0.5, 0.6])) == "the chosen answers' implicit reward rises, the margin is undecided"
    assert "has no clear trend" in verdict(of([-1.0, 1.1], [0.5, 0.6]))


def test_drawing_from_the_json_alone(tmp_path):
    run = {key: [0.0, -1.0, -2.0] for key in likelihoods.KEYS} | {
        "margin": [0.0, 1.0, 1.5], "deviation": [0.0, 0.1, -0.3], "deviation_se": [0.0, 0.1, 0.1],
    }  # fmt: skip
    np.testing.assert_allclose(deviations([run]), [[1, -3]])
    row = {"gold_return": 1.0, "kl": 2.0, "J": 0.5, "share": 0.5, "length": 18.0}
    names = ("SFT on chosen", "SFT on both", "no SFT")
    found = {
        "beta": 0.5, "answers": 64, "steps": [0, 32, 64], "followed": {name: [run, run] for name in names},
        "arms": {name: [row, row] for name in names}, "references": {name: [row, row] for name in names},
    }  # fmt: skip
    text = likelihoods.draw(found, tmp_path)
    assert "of 12 evaluations with 64 answers of π_ref each" in text and "standard errors in 50.0%" in text
    assert "within 3.0 in all" in text and "its mean −1.00." in text
    assert "- SFT on chosen: the chosen answers' implicit reward falls, the margin grows." in text
    assert (tmp_path / "gold.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_runs_are_followed_from_their_checkpoints(tmp_path):
    """SFT on the pairs' answers, DPO on the same pairs, and the evaluations; step 0 is the reference itself."""
    tiny = dict(gold=GoldData(examples=256, pairs=128, test_pairs=64, rollouts=128), batch_size=32, eval_size=64, steps=4)
    arms = {name: arm.changed(**tiny, save_every=2) for name, arm in likelihoods.arms("gold").items() if name != "SFT on both"}
    small = lambda arm: arm.changed(**tiny)._replace(upstream={k: small(a) for k, a in arm.upstream.items()})  # noqa: E731
    arms = {name: arm._replace(upstream={k: small(a) for k, a in arm.upstream.items()}) for name, arm in arms.items()}
    for arm in study.in_order(arms.values()):
        study.run_arm(arm, tmp_path, 1, "")
    found = likelihoods.collect(arms, tmp_path, 1)
    assert found["steps"] == [0, 2, 4]
    for (run,) in found["followed"].values():
        assert all(run[key][0] == pytest.approx(0, abs=1e-6) for key in likelihoods.KEYS if key != "accuracy")
        assert run["exact"][1] < 0 and run["exact"][2] < 0 and run["margin"][2] != run["margin"][1]
        assert all(abs(off) < 4 for off in deviations([run])[0])
    assert json.loads(json.dumps(found)) == likelihoods.collect(arms, tmp_path, 1)
