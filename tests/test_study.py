"""What the tables share: arms, seeds, intervals; and that the committed tables are what their JSON says."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import study, table1, tables
from experiments.study import StudyConfig
from rto_jax.errors import UserError
from rto_jax.gold import World

RESULTS = study.ROOT / "results"
COMMITTED = [file for table in tables.TABLES.values() for file in sorted((RESULTS / table.name).glob("*.json"))]


def test_arms_that_are_the_same_are_one_run():
    base = study.base_arms("gold")
    rto, rm = base["RTO"], base["reward model"]
    assert rto.changed(out="elsewhere", seed=7, resume=True).folder == rto.folder
    assert rto.changed(beta1=rto.config.beta1).folder == rto.folder != rto.changed(beta1=0.1).folder
    assert rto.after(reward_model=rm.changed(head="last")).folder != rto.folder
    assert rto.folder.startswith("rto-") and base["PPO"].folder.startswith("rl-") and rto.changed(beta1=0.0).folder != base["PPO"].folder
    every = {name: arm for table in tables.TABLES.values() for name, arm in table.arms("gold").items()}
    order = study.in_order(every.values())
    assert len({arm.folder for arm in order}) == len(order) < len(every) + 20
    for number, arm in enumerate(order):
        assert {other.folder for other in arm.upstream.values()} <= {other.folder for other in order[:number]}


def test_controls_have_rto_s_effective_temperature():
    """r/beta of beta2·log pi/pi_ref with w·beta2·log pi_dpo/pi_ref added: beta2/(1 + w), 0.5/1.5 here."""
    found = study.controls(study.base_arms("gold"))
    assert found["PPO, RTO's temperature"].config.beta2 == pytest.approx(1 / 3)
    assert found["PPO, λ = 1"].config.ppo.lam == 1.0
    assert {arm.upstream["sft"].folder for arm in found.values()} == {study.base_arms("gold")["SFT"].folder}


def test_arms_of_a_table_differ_in_what_they_say():
    """RTO is PPO with the DPO term, in every table, at every fraction of the data."""
    for table in tables.TABLES.values():
        arms = table.arms("gold")
        for name, arm in arms.items():
            if name.startswith("RTO") and (plain := name.replace("RTO with ", "").replace("RTO", "PPO")) in arms:
                ours, theirs = vars(arm.config), vars(arms[plain].config)
                assert {key for key in theirs if ours[key] != theirs[key]} == set(), name
                assert {key: other.folder for key, other in arm.upstream.items() if key != "dpo"} == {
                    key: other.folder for key, other in arms[plain].upstream.items()
                }


def test_wins_and_intervals_by_hand():
    assert study.wins(np.array([1.0, 2, 3, 4]), np.array([0.0, 2, 4, 3])) == {"win_rate": 0.625, "ties": 0.25}
    assert study.shown(study.interval([1.25])) == "1.25"
    assert study.shown(study.interval([-1.0, -1.0, -1.0])) == "−1.00 [−1.00, −1.00]"
    assert study.interval([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == pytest.approx((1.0, 1.0, 1.0))
    assert study.markdown(("a", "b"), [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_curves_count_rollouts(tmp_path):
    arm = study.base_arms("gold")["PPO"]
    for seed, values in ((1, (0.5, 1.0)), (2, (1.5, 2.0))):
        folder = tmp_path / f"seed{seed}" / arm.folder
        folder.mkdir(parents=True)
        rows = [{"step": 0, "eval_share": values[0]}, {"step": 1, "score": 0.0}, {"step": 2, "eval_share": values[1]}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert study.curve(arm, tmp_path, 2, "eval_share") == {"rollouts": [0, 512], "runs": [[0.5, 1.0], [1.5, 2.0]]}


STAGE = """
import json, os, pathlib

def run(config):
    assert not config.init or (pathlib.Path(config.init) / "results.json").exists(), "started before its upstream"
    assert config.beta < 9, "beta is too large"
    out = pathlib.Path(config.out)
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps({"process": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}))
"""


def test_runs_go_to_processes_when_what_they_start_from_is_finished(tmp_path, monkeypatch):
    (tmp_path / "stage_of_a_test.py").write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")  # put back afterwards
    first = study.Arm("stage_of_a_test", study.base_arms("gold")["DPO"].config).changed(init="")
    arms = [first.changed(beta=1 + x).after(init=first) for x in range(4)]
    config = StudyConfig(seeds=2, jobs=2)
    study.run_all(arms, tmp_path / "runs", config)
    files = sorted((tmp_path / "runs").glob("seed*/*/results.json"))
    assert len(files) == 10 and len(list((tmp_path / "runs").glob("seed*/*.log"))) == 10
    shares = {found["process"]: set(found["cores"]) for found in (json.loads(file.read_text()) for file in files)}
    cores = study._cores()
    assert len(shares) <= 2 and (len(cores) < 2 or all(len(share) < len(cores) for share in shares.values()))
    study.run_all(arms, tmp_path / "runs", config)  # all is there: no process, and nothing that could fail
    with pytest.raises(AssertionError, match="beta is too large"):
        study.run_all([first.changed(beta=10.0).after(init=first)], tmp_path / "runs", config)


def test_bad_flags(tmp_path):
    with pytest.raises(UserError, match="--seeds and --jobs must be at least 1"):
        StudyConfig(seeds=0)
    with pytest.raises(UserError, match=r"--draw: there is no .*gold\.json; run without it first"):
        study.make(table1.TABLE, "gold", StudyConfig(draw=True, results=str(tmp_path)))


def test_a_cheap_row_is_trained_collected_and_drawn_again(tmp_path):
    """Also that a study which is started again trains nothing."""
    few = ("SFT", "DPO", "PPO", "RTO")
    table = table1.TABLE._replace(arms=lambda preset: {name: table1.arms(preset)[name] for name in few})
    config = StudyConfig(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), cheap=True, jobs=1)
    text = study.make(table, "gold", config)
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")] == ["| method", "| ---", *(f"| {x}" for x in few)]
    assert "nothing can be concluded" in text
    folder = tmp_path / "results" / "table1"
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("results.json")}
    assert len(times) == 5  # with the reward model
    picture = (folder / "gold.svg").read_bytes()
    study.make(table, "gold", config)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("results.json")} == times
    assert study.make(table, "gold", StudyConfig(draw=True, results=config.results)).splitlines()[:6] == text.splitlines()[:6]
    assert (folder / "gold.svg").read_bytes() == picture
    found = json.loads((folder / "gold.json").read_text())
    assert all(run["share"] <= 1 for runs in found["arms"].values() for run in runs)
    assert found["arms"]["SFT"][0]["win_rate"] == 0.5 and found["arms"]["SFT"][0]["ties"] == 1.0


@pytest.mark.slow
def test_all_tables_from_one_command(tmp_path):
    config = StudyConfig(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), cheap=True, jobs=1)
    tables.run(config)
    page = (tmp_path / "results" / "README.md").read_text()
    assert all(f"## {title} (gold)" in page for title in tables.TABLES)
    assert all((tmp_path / "results" / table.name / "gold.json").exists() for table in tables.TABLES.values())


def shares(value) -> list[float]:
    """Every figure called share in a JSON value."""
    if isinstance(value, dict):
        return [x for key, y in value.items() for x in (np.ravel(y) if key == "share" else shares(y))]
    return [x for y in value for x in shares(y)] if isinstance(value, list) else []


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_tables_are_drawn_from_their_json(file: Path, tmp_path):
    table = next(table for table in tables.TABLES.values() if table.name == file.parent.name)
    copy = tmp_path / file.name
    copy.write_text(file.read_text())
    study.draw(table, copy)
    assert copy.with_suffix(".md").read_text() == file.with_suffix(".md").read_text()
    assert {x.name for x in tmp_path.glob("*.svg")} == {x.name for x in file.parent.glob(f"{file.stem}*.svg")}
    found = json.loads(file.read_text())
    assert not found["facts"]["cheap"] and found["facts"]["seeds"] >= (5 if file.stem == "gold" else 3)
    assert all(share <= 1 for share in shares(found)), "no policy is better than the optimum"


def test_the_pages_are_up_to_date():
    if not (RESULTS / "README.md").exists():
        pytest.skip("no results are committed")
    assert (RESULTS / "README.md").read_text() == tables.page(RESULTS)
    texts = {name: (study.ROOT / name).read_text() for name in tables.PAGES}
    assert texts == {name: tables.filled(text, RESULTS) for name, text in texts.items()}
    assert "<!-- results table1 -->\n| method |" in texts["README.md"]


def test_the_world_s_optimum_is_the_share_one():
    world = World()
    solution = world.solve()
    assert world.evaluate(solution.log_pistar)["J"] == pytest.approx(solution.Jstar, abs=1e-9)
