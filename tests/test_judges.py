"""Who judges text: a reward model of other data, a sentiment program, and the files of AlpacaEval 2 and Arena-Hard."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from experiments import judges, reward_model, sft, study, table1
from experiments.judges import JudgeConfig
from rto_jax.data import Lengths, read_preferences
from rto_jax.errors import UserError
from tests.test_text import FLAGS, command, write_data, write_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(run directory, configuration) of an SFT model, one trained further, and a reward model."""
    base = tmp_path_factory.mktemp("judges")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTO_JAX_CACHE", str(base / "cache"))
        model, data = write_model(base / "model"), write_data(base / "data")
        common = ["--data", str(data), *FLAGS]
        command(sft, "--model", str(model), *common, "--out", str(base / "sft"))
        command(sft, "--model", str(base / "sft"), *common, "--seed", "1", "--out", str(base / "further"))
        command(reward_model, "--init", str(base / "sft"), *common, "--out", str(base / "judge"))
        stage = dataclasses.replace(
            sft.PRESETS["smollm2"][1], data=str(data), lengths=Lengths(prompt=40, response=12), batch_size=16, eval_size=16
        )
        yield {name: (base / name, stage) for name in ("sft", "further", "judge")}


def test_judged_by_a_reward_model(runs):
    arms = {"SFT": runs["sft"], "further": runs["further"]}
    found = judges.judged(arms, runs["sft"], runs["judge"], JudgeConfig())
    base, other = found["arms"]["SFT"], found["arms"]["further"]
    assert found["answers"] == 16 and found["reviews"] == 0
    assert (base["win_rate"], base["ties"], base["kl"]) == (0.5, 1.0, 0.0)
    assert 0 <= other["win_rate"] <= 1 and 1 <= other["length"] <= 12 and other["kl"] != 0
    again = judges.judged({"further": runs["further"]}, runs["sft"], runs["judge"], JudgeConfig())
    assert again["arms"]["further"] == other, "an arm is judged alike whoever else is"


def test_reviews_are_continued_and_their_sentiment_scored(runs, tmp_path, monkeypatch):
    """With a sentiment that counts e's in the place of VADER's; what it is given is text without the template."""
    file = tmp_path / "reviews.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(json.dumps({"text": f"a film {i}"}).encode() + b"\n" for i in range(20))))
    given = []

    def count(texts):
        given.append(texts)
        return np.array([float(text.count("e")) for text in texts])

    monkeypatch.setattr(judges, "sentiment", count)
    found = judges.judged({"further": runs["further"]}, runs["sft"], runs["judge"], JudgeConfig(reviews=str(file)))
    assert found["reviews"] == 16 and len(given) == 2 and not any("<|" in text for texts in given for text in texts)
    gap = np.sign(np.array([a.count("e") - b.count("e") for a, b in zip(given[1], given[0], strict=True)]))
    assert found["arms"]["further"]["sentiment_win_rate"] == pytest.approx(np.mean(0.5 + 0.5 * gap))
    assert judges.review_prompts(str(file), 2) == [judges.REVIEW + "a film 0", judges.REVIEW + "a film 1"]


def test_vader_tells_praise_from_blame():
    pytest.importorskip("vaderSentiment", reason="pip install vaderSentiment")
    good, bad = judges.sentiment(["A wonderful, moving film.", "A dreadful, boring mess."])
    assert good > 0.3 > -0.3 > bad


def test_answer_files_and_what_their_judges_say(runs, tmp_path):
    """The files have every question in order; a second call leaves them; verdicts are matched by the generator's name."""
    asked = [{"instruction": f"Say {i} < 3 & \u2028 done", "dataset": "helpful_base"} for i in range(5)]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(asked))
    hard = [{"uid": f"u{i}", "prompt": f"Why {i}?"} for i in range(3)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hard))
    config = JudgeConfig(alpaca_eval=str(tmp_path / "alpaca_eval.json"), arena_hard=str(tmp_path / "question.jsonl"))
    arms = {"SFT": runs["sft"], "PPO, λ = 1": runs["further"]}
    judges.write_answers(arms, config, tmp_path / "out")
    made = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.json*"))
    names = ("rto_jax-PPO-1", "rto_jax-SFT")
    assert made == [*(f"alpaca_eval/{name}.json" for name in names), *(f"arena_hard/{name}.jsonl" for name in names)]
    rows = json.loads((tmp_path / "out/alpaca_eval/rto_jax-SFT.json").read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in asked]
    assert {row["generator"] for row in rows} == {"rto_jax-SFT"} and all(isinstance(row["output"], str) for row in rows)
    lines = [json.loads(line) for line in (tmp_path / "out/arena_hard/rto_jax-PPO-1.jsonl").read_text().split("\n") if line]
    assert [(line["uid"], line["messages"][0]["content"], line["model"]) for line in lines] == [
        (row["uid"], row["prompt"], "rto_jax-PPO-1") for row in hard
    ]
    assert isinstance(lines[0]["messages"][1]["content"]["answer"], str)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.json*")}
    judges.write_answers(arms, config, tmp_path / "out")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.json*")} == times

    (tmp_path / "leaderboard.csv").write_text(
        ",win_rate,standard_error,length_controlled_winrate\ngpt4,23.58,1.28,38.13\nrto_jax-SFT,9.5,1.0,13.25\n"
    )
    (tmp_path / "table.txt").write_text(
        "##### Category: hard_prompt #####\n              Model  Scores          CI (%)\n"
        "0             o3     0.859  (-0.8 / +0.9)\n1  rto_jax-PPO-1     0.162  (-1.0 / +1.1)\n"
    )
    config = JudgeConfig(alpaca_leaderboard=str(tmp_path / "leaderboard.csv"), arena_table=str(tmp_path / "table.txt"))
    found = judges.read_results(list(arms), config)
    assert found == {"SFT": [{"alpaca_lc": 13.25, "alpaca": 9.5}], "PPO, λ = 1": [{"arena": pytest.approx(16.2)}]}
    text = study.draw_text(table1.TABLE, {"arms": found}, tmp_path, "paper")
    assert "| SFT | 13.2 | 9.5 | – | 13.2 | 9.2 |" in text and "| PPO, λ = 1 | – | – | 16.2 | – | – |" in text


def test_text_tables_are_drawn(tmp_path):
    run = {"judge": 0.25, "win_rate": 0.75, "ties": 0.0, "kl": 1.5, "length": 20.0}
    found = {
        "arms": {"SFT": [run | {"win_rate": 0.5}] * 2, "RTO": [run] * 2}, "answers": 100, "reviews": 0,
        "curves": {"score": {"RTO": {"rollouts": [16, 32], "runs": [[0.0, 1.0], [0.0, 2.0]]}}},
    }  # fmt: skip
    text = study.draw_text(table1.TABLE, found, tmp_path, "smollm2")
    assert "| RTO | 0.25 [0.25, 0.25] | 0.750 [0.750, 0.750] | 1.50 [1.50, 1.50] | 20.0 [20.0, 20.0] |" in text
    assert "at most 0.050" in text and (tmp_path / "smollm2.svg").exists()


def tiny_arms(model: str) -> dict[str, study.Arm]:
    """The base arms of text, of a model and steps that a test has time for."""
    sizes = dict(lengths=Lengths(prompt=40, response=12), batch_size=16, eval_size=16)
    arms = study.base_arms("smollm2")
    small = {"SFT": arms["SFT"].changed(model=model, steps=2, **sizes)}
    small |= {name: arms[name].changed(steps=2, **sizes).after(init=small["SFT"]) for name in ("reward model", "DPO")}
    before = {"sft": small["SFT"], "reward_model": small["reward model"]}
    sizes["batch_size"] = 32
    small["PPO"] = arms["PPO"].changed(iterations=1, **sizes).after(**before)
    small["RTO"] = arms["RTO"].changed(iterations=1, **sizes).after(**before, dpo=small["DPO"])
    return small


@pytest.mark.slow
def test_a_table_of_text(tmp_path, monkeypatch):
    """Arms and judge are trained and judged once; weights that no arm starts from are dropped where that is asked for."""
    model, data, other = write_model(tmp_path / "model"), write_data(tmp_path / "data"), write_data(tmp_path / "other")
    arms = tiny_arms(str(model))
    monkeypatch.setattr(study, "base_arms", lambda preset: arms)
    table = study.Table("table1", lambda preset: {name: arms[name] for name in ("SFT", "DPO", "RTO")}, None, None)
    config = study.StudyConfig(
        runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), data=str(data), seeds=1, jobs=1, drop_weights=True,
        judges=JudgeConfig(data=str(other)),
    )  # fmt: skip
    text = study.make(table, "smollm2", config)
    assert text.count("\n| ") == 4 and "Accuracy on held-out pairs: judge 0." in text
    kept = {folder.parent.name for folder in (tmp_path / "runs").glob("seed1/*/checkpoints")}
    assert kept == {arms[name].folder for name in ("SFT", "reward model", "DPO")}
    assert [folder.name for folder in (tmp_path / f"runs/seed{judges.JUDGE_SEED}").glob("*")] != []
    found = json.loads((tmp_path / "results/table1/smollm2.json").read_text())
    assert set(found["arms"]) == {"SFT", "DPO", "RTO"} and found["arms"]["SFT"][0]["win_rate"] == 0.5
    monkeypatch.setattr(study, "run_arm", lambda *_: pytest.fail("trained again"))
    assert study.make(table, "smollm2", dataclasses.replace(config, draw=True)) == text
    with monkeypatch.context() as patch:
        patch.setattr(judges, "bench", lambda *_: pytest.fail("judged again"))
        again = study.collect_text(table, "smollm2", table.arms(""), config)
    assert again["arms"]["RTO"] == found["arms"]["RTO"]


def test_preferences_are_cut_by_prompt(tmp_path):
    rows = [{"prompt": f"p{i % 40}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "test.jsonl").write_text(json.dumps({"prompt": "held out", "chosen": "a", "rejected": "b"}) + "\n")
    counts = judges.split_preferences(source, tmp_path / "out")
    assert sum(counts.values()) == 201 and min(counts.values()) > 20
    prompts = {
        side: {name: {row.prompt[0]["content"] for row in read_preferences(tmp_path / "out" / side, name)[0]} for name in ("train", "test")}
        for side in ("arms", "judge")
    }
    assert prompts["arms"]["test"] == prompts["judge"]["test"] and "held out" in prompts["arms"]["test"]
    sets = [prompts["arms"]["train"], prompts["judge"]["train"], prompts["arms"]["test"]]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 41, "no prompt is in two parts"
    kept = sorted(row.chosen for row in read_preferences(tmp_path / "out" / "arms")[0])
    assert kept == sorted(row["chosen"] for row in rows if row["prompt"] in prompts["arms"]["train"])


def test_bad_input_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"texts": "no"}\n')
    with pytest.raises(UserError, match=r'a\.jsonl:2: want an object with a "text"'):
        judges.review_prompts(str(tmp_path / "a.jsonl"), 10)
    with pytest.raises(UserError, match=r"nowhere: .*No such file"):
        judges.review_prompts(str(tmp_path / "nowhere"), 10)
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n')[:-9])
    with pytest.raises(UserError, match=r"torn\.jsonl\.gz: broken gzip file"):
        judges.review_prompts(str(tmp_path / "torn.jsonl.gz"), 10)
    with pytest.raises(UserError, match=r'record 1 has no text "instruction"'):
        judges.questions(str(tmp_path / "a.jsonl"), "--judges.alpaca-eval", "instruction")
    with pytest.raises(UserError, match="neither a JSON list nor JSON lines"):
        (tmp_path / "b.json").write_text("[{]")
        judges.questions(str(tmp_path / "b.json"), "--judges.arena-hard", "prompt")
    with pytest.raises(UserError, match=r"is no leaderboard\.csv"):
        judges.read_alpaca_eval(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="holds no table"):
        judges.read_arena_hard(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"--judges\.data is missing"):
        study.make(table1.TABLE, "smollm2", study.StudyConfig(results=str(tmp_path)))
