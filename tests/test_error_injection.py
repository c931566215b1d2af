"""experiments.error_injection: the metric can be trusted, errors are where they are said to be, text and gold."""

import dataclasses
import gzip
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import error_injection as E
from experiments import study
from experiments.error_injection import corrupt, encode, finds, inject, natural_pairs, proper_names
from experiments.study import StudyConfig
from rto_jax.data import Example, Lengths, load_tokenizer
from rto_jax.errors import UserError
from rto_jax.evaluation import auc
from rto_jax.gold import World
from rto_jax.sharding import MeshConfig, make_mesh
from tests.test_text import write_model

RESULTS = study.ROOT / "results" / "error_injection"

# ---- AUC


def test_auc_by_hand():
    """Positives 3, 1, negatives 2, 1: of four pairs two are won, one is lost, one is a tie."""
    assert auc([3, 1, 2, 1], [True, True, False, False]) == (2 + 0.5) / 4
    assert auc([1, 2, 3], [False, False, True]) == 1.0 and auc([1, 1, 1], [0, 1, 1]) == 0.5
    with pytest.raises(ValueError, match="positive holds 3 positives and 0 negatives"):
        auc([1, 2, 3], [True] * 3)
    with pytest.raises(ValueError, match="scores holds NaN or infinity, first in row 1"):
        auc([1, math.nan], [True, False])


def test_auc_against_every_pair():
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = int(rng.integers(2, 60))
        scores, positive = rng.integers(0, 6, n) / 2, rng.permutation(np.arange(n) < rng.integers(1, n))
        ours, others = scores[positive], scores[~positive]
        slow = np.mean([(a > b) + 0.5 * (a == b) for a in ours for b in others])
        assert auc(scores, positive) == pytest.approx(slow, abs=1e-12)
        assert auc(-scores, positive) == pytest.approx(1 - slow, abs=1e-12)
        assert auc(3 * scores + 1, positive) == auc(scores, positive)


def test_what_finds_an_error_by_hand():
    """Lower is worse: first answer, the error is lowest; second, it ties with one of two others; what is masked is nothing."""
    scores = np.array([[0.0, -3.0, 1.0, -9.0], [0.0, 0.0, 1.0, -9.0]])
    errors = np.array([[False, True, False, False], [True, False, False, False]])
    mask = np.array([[True, True, True, False]] * 2)
    area, first = finds(scores, errors, mask)
    np.testing.assert_array_equal(area, [1.0, 0.75])
    np.testing.assert_array_equal(first, [1.0, 0.5])


def test_correlation_by_hand():
    mask = np.array([[True, True, True, False]])
    x = np.array([[1.0, 2.0, 3.0, 99.0]])
    assert E.correlation(x, -2 * x + 1, mask) == pytest.approx(-1.0)
    assert E.correlation(x, np.array([[1.0, 3.0, 2.0, 0.0]]), mask) == pytest.approx(0.5)
    assert E.correlation(np.zeros_like(x), x, mask) == 0.0


# ---- the gold world


@pytest.mark.parametrize("count", [1, 2])
def test_injected_errors_are_all_that_the_exact_advantage_finds(count):
    world, rng = World(), np.random.default_rng(0)
    prompts = world.prompts(rng, 300)
    tokens, mask = world.sample(world.solve().log_pistar, prompts, rng)
    made = inject(world, prompts, tokens, mask, count, rng)
    n = len(made.tokens)
    assert n > 200 and (made.errors.sum(1) == count).all() and not (made.errors & ~made.mask).any()
    rewards = world.exact_advantages(made.prompts, made.tokens, made.mask)  # raises for what is no complete answer
    np.testing.assert_array_equal((rewards <= -E.THRESHOLD) & made.mask, made.errors)
    # Each is a right answer but for the errors.
    originals = {tuple(p): [] for p in prompts.tolist()}
    for p, t, m in zip(prompts.tolist(), tokens, mask, strict=True):
        originals[tuple(p)].append((t, m))
    for p, t, m, e in zip(*made, strict=True):
        assert any((m == om).all() and (t[m & ~e] == ot[m & ~e]).all() and (t[e] != ot[e]).all() for ot, om in originals[tuple(p)])
    area, first = finds(rewards, made.errors, made.mask)
    assert area.min() == 1.0 and first.min() == 1.0, "the exact advantage does not find what it defines"
    chance, _ = finds(rng.standard_normal(mask.shape)[:n], made.errors, made.mask)
    assert abs(chance.mean() - 0.5) < 4 * chance.std() / n**0.5


def test_arms_are_those_of_the_other_tables():
    arms, base = E.arms("gold"), study.base_arms("gold")
    assert {arms[name].folder for name in ("SFT", "DPO", "reward model")} == {base[name].folder for name in ("SFT", "DPO", "reward model")}
    assert arms["last"].config.head == "last" and arms["reward model"].config.head == "token"


def test_the_table_is_drawn_from_its_json(tmp_path):
    names = [E.EXACT, E.DPO, *E.REWARD.values(), E.LIKELY, E.RANDOM]
    run = lambda x: dict.fromkeys(E.KEYS, x)  # noqa: E731
    found = {"answers": [[100, 90, 64]] * 2, "length": 20.0, "scores": {n: [run(0.5), run(0.75)] for n in names}}
    text = E.draw(found, tmp_path)
    assert "| DPO's implicit reward | 0.625 [0.500, 0.750] |" in text and "Means over 2 seeds" in text
    assert "100 answers a seed with one error and 90 with two" in text and (tmp_path / "gold.svg").exists()


@pytest.mark.skipif(not (RESULTS / "gold.json").exists(), reason="no results are committed")
def test_committed_figures_are_sound():
    scores = json.loads((RESULTS / "gold.json").read_text())["scores"]
    assert all(run["auc"] == run["first"] == run["second"] == 1.0 and run["held_out"] > 1 - 1e-9 for run in scores[E.EXACT])
    low, high = study.interval([run["auc"] for run in scores[E.RANDOM]])[1:]
    assert low - 0.02 < 0.5 < high + 0.02
    assert all(0 <= run[key] <= 1 for runs in scores.values() for run in runs for key in ("auc", "first", "second"))


@pytest.mark.slow
def test_a_cheap_run(tmp_path):
    config = StudyConfig(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), cheap=True, jobs=1)
    text = study.make(E.TABLE, "gold", config)
    assert "| exact advantage A* | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |" in text and "nothing can be concluded" in text


# ---- text

ANSWER = "Natalia sold 48/2 = 24 clips in May, 3 more than Weng.\n#### 24"


def test_corruptions_change_one_thing_of_their_kind():
    rng, names = np.random.default_rng(0), ["Betty", "Natalia", "Weng"]
    seen = {kind: set() for kind in E.KINDS}
    for _ in range(100):
        for kind in E.KINDS:
            made = corrupt(ANSWER, kind, rng, names)
            tail = len(made.text) - made.end
            old = ANSWER[made.begin : len(ANSWER) - tail]
            new = made.text[made.begin : made.end]
            assert ANSWER[: made.begin] + old + ANSWER[len(ANSWER) - tail :] == ANSWER and old != new
            seen[kind].add(old)
            if kind == "number":
                assert 1 <= abs(int(new) - int(old)) <= 10 and int(new) >= 0
            elif kind == "name":
                assert {old, new} <= set(names)
            else:
                assert (old, new) in {("/", "*"), ("more", "less")}
    assert seen == {"number": {"48", "2", "24", "3"}, "name": {"Natalia", "Weng"}, "sign": {"/", "more"}}
    assert corrupt("Nothing here.", "number", rng) is None and corrupt("1.5 x2 1,000", "number", rng) is None
    assert corrupt("May", "name", rng, ["May"]) is None and corrupt("no sign - at all", "sign", rng) is None


def test_proper_names_are_never_in_lower_case():
    texts = ["How many did Betty buy? Betty may buy 3.", "Last May, how did Weng do?", "Then Al left."]
    assert proper_names(texts) == ["Betty", "Last", "Then", "Weng"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("text") / "model")


def test_the_tokens_of_an_error_are_those_that_overlap_it(folder):
    tokenizer = load_tokenizer(folder)  # bytes
    example = Example(({"role": "user", "content": "q"},), "a 12 b")
    rows, errors = encode([(example, E.Corrupted("a 317 b", 2, 5)), (example, E.Corrupted("é 9", 2, 3))], tokenizer, Lengths(24, 12))
    assert [np.flatnonzero(row).tolist() for row in errors] == [[2, 3, 4], [3]]  # é is two bytes
    assert rows.mask.sum(1).tolist() == [8, 5] and not (errors & ~rows.mask).any()


def test_pairs_as_they_come(tmp_path):
    file = tmp_path / "eval.jsonl.gz"
    rows = [{"input": "q", "output_1": "a", "output_2": "b", "label": label} for label in (1, 2)]
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    assert [(p.chosen, p.rejected) for p in natural_pairs(file)] == [("a", "b"), ("b", "a")]
    with gzip.open(file, "at") as lines:
        lines.write(json.dumps(rows[0] | {"label": 3}))
    with pytest.raises(UserError, match=r"eval\.jsonl\.gz:3: want texts input, output_1 and output_2, and a label of 1 or 2"):
        natural_pairs(file)
    plain = tmp_path / "pairs.jsonl"
    plain.write_text(json.dumps({"question": "q", "chosen": "yes", "rejected": "no"}) + "\n")
    assert [(p.chosen, p.rejected) for p in natural_pairs(plain)] == [("yes", "no")]


def test_text_models_end_to_end(folder, tmp_path, capsys, monkeypatch):
    """A model that is its own reference knows nothing: implicit rewards are 0, all ties."""
    monkeypatch.setattr(E, "make_mesh", lambda _: make_mesh(MeshConfig(1), jax.devices()[:1]))  # less to compile
    data = tmp_path / "data"
    data.mkdir()
    answers = [f"Betty has {i} + 2 = <<{i}+2={i + 2}>>{i + 2}." for i in range(6)]
    rows = [{"question": f"Betty {i}, and Weng?", "answer": a} for i, a in enumerate(answers)]
    (data / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": "q", "chosen": f"{i} yes", "rejected": "no"}) + "\n" for i in range(4)))
    config = dataclasses.replace(
        E.PRESETS["smollm2"][1], out=str(tmp_path / "out"), sft=str(folder), dpo=str(folder), reward_model="", data=str(data),
        pairs=str(pairs), lengths=Lengths(32, 32), answers=4,
    )  # fmt: skip
    found = E.run(config)
    assert set(found["tokens"]) == set(E.KINDS) and found["facts"]["beta"] == 1.0
    ours = found["scores"][E.DPO]
    assert all(x == 0.5 for kind in E.KINDS for x in ours[kind]["auc"]) and ours["pairs"]["right"] == [0.5] * 4
    assert all(0 <= x <= 1 for kind in E.KINDS for x in found["scores"][E.LIKELY][kind]["auc"])
    printed = capsys.readouterr().out
    assert "| DPO's implicit reward | 0.500 [0.500, 0.500] |" in printed and "number: 4 answers of" in printed
    assert E.run(dataclasses.replace(config, draw=True)) == found and capsys.readouterr().out in printed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": ""}, "--data is missing: a folder or file of right answers"),
        ({"sft": "gold", "dpo": "gold"}, "--sft is a model of the gold world"),
        ({"draw": True}, "--draw: there is no .*results.json"),
        ({"lengths": Lengths(32, 2)}, "no answer fits --lengths.response 2"),
    ],
)
def test_bad_flags(changes, said, folder, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "It is 31."}) + "\n")
    good = {"sft": str(folder), "dpo": str(folder), "data": str(file), "lengths": Lengths(32, 32)}
    config = dataclasses.replace(E.PRESETS["smollm2"][1], out=str(tmp_path / "out"), reward_model="", **good | changes)
    with pytest.raises(UserError, match=said):
        E.run(config)
    with pytest.raises(UserError, match="--answers must be at least 2"):
        dataclasses.replace(config, answers=1)
