"""rto_jax.metrics: the file of a resumed run, numbers that JSON can hold, one-step-late fetch, NaN, provenance."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rto_jax import metrics
from rto_jax.errors import UserError
from rto_jax.metrics import MetricsLog, NanLoss, git_commit, progress, write_config


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_time(directory):
    return [{name: value for name, value in line.items() if name != "time_s"} for line in lines(directory)]


def records(directory):
    """Every TensorBoard event of a run: TFRecords of u64 length, u32 crc, payload, u32 crc."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted((directory / "tb").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def events(directory):
    return [
        (event.step, value.tag, value.simple_value) for event in records(directory) for value in event.summary.value
    ]


def restarts(directory):
    return [(event.step, event.session_log.status == event.session_log.START) for event in records(directory)]


def run(directory, steps, resume_step=None):
    with MetricsLog(directory, "sft", resume_step) as log:
        for step in steps:
            log.push(step, {"loss": jnp.float32(1 / step), "tokens": jnp.int32(step * 10)})


def test_one_object_a_step_with_numbers_as_they_are(tmp_path):
    big = 2**40 + 1
    with MetricsLog(tmp_path / "new", "sft") as log:
        log.push(1, {"loss": jnp.float32(0.1), "half": jnp.bfloat16(0.5), "double": np.float64(0.1), "tokens": big})
        log.push(2, {"accuracy": jnp.float32(jnp.nan), "ratio": np.inf, "done": jnp.bool_(True)})
    first, second = lines(tmp_path / "new")
    assert 0 <= first.pop("time_s") <= second.pop("time_s") < 60
    assert first == {"step": 1, "loss": 0.1, "half": 0.5, "double": 0.1, "tokens": big}
    assert second == {"step": 2, "accuracy": None, "ratio": None, "done": 1}
    text = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = events(tmp_path / "new")
    assert [(step, tag) for step, tag, _ in found] == [
        (1, "loss"),
        (1, "half"),
        (1, "double"),
        (1, "tokens"),
        (2, "done"),
    ]
    assert found[0][2] == np.float32(0.1) and found[4][2] == 1
    with MetricsLog(tmp_path / "new", "sft") as log, pytest.raises(ValueError, match="metric losses has shape"):
        log.push(1, {"losses": jnp.ones(3)})
        log.flush()


def test_each_step_is_fetched_when_the_next_is_pushed(tmp_path):
    with MetricsLog(tmp_path, "sft") as log, jax.transfer_guard("disallow"):
        with jax.transfer_guard("allow"):
            values = [jnp.float32(step) for step in range(3)]
        assert log.push(0, {"reward": values[0]}) is None
        assert lines(tmp_path) == []
        assert log.push(1, {"reward": values[1]}) == {"reward": 0.0}
        assert [line["step"] for line in lines(tmp_path)] == [0]  # on disk at once, for whoever reads along
        assert log.push(2, {"reward": values[2]}) == {"reward": 1.0}
        assert log.flush() == {"reward": 2.0} and log.flush() is None
        assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_torch_is_not_loaded_and_can_be_afterwards(tmp_path):
    """tensorboardX would load it: 2 s of every run, and its memory."""
    (tmp_path / "torch.py").write_text("print('loaded')\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from rto_jax.metrics import MetricsLog
MetricsLog({str(tmp_path / "run")!r}, "sft").close()
print("closed")
import torch
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.split() == ["closed", "loaded"]


@pytest.mark.parametrize("cut", ["", '{"step": 8, "lo', '{"step": 6, "loss": 0.5}'])
def test_a_resumed_file_is_the_uninterrupted_one(tmp_path, cut):
    run(tmp_path / "straight", range(1, 11))
    run(tmp_path / "stopped", range(1, 8))
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write(cut)  # no newline: killed while it wrote
    run(tmp_path / "stopped", range(6, 11), resume_step=5)
    assert without_time(tmp_path / "stopped") == without_time(tmp_path / "straight")
    assert len(lines(tmp_path / "stopped")) == 10
    times = [line["time_s"] for line in lines(tmp_path / "stopped")]
    assert times == sorted(times)  # the clock goes on from the stop
    assert 6 in [
        step for step, restart in restarts(tmp_path / "stopped") if restart
    ]  # TensorBoard hides 6, 7 of before


def test_without_resume_the_file_starts_anew(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, range(1, 2))
    assert [line["step"] for line in lines(tmp_path)] == [1]
    shutil.rmtree(tmp_path / "tb")
    (tmp_path / "metrics.jsonl").unlink()
    run(tmp_path, range(3, 4), resume_step=2)  # nothing to resume: no error, the checkpoint is what counts
    assert [line["step"] for line in lines(tmp_path)] == [3]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("loss", "nan", "NaN"), ("value_loss", "inf", "infinite"), ("grad_norm", "-inf", "minus")],
)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, name, value, said):
    with pytest.raises(NanLoss) as caught, MetricsLog(tmp_path, "sft", last_good=lambda: "RUN/checkpoints/10") as log:
        log.push(11, {name: jnp.float32(1.0)})
        log.push(12, {name: jnp.float32(value), "reward": jnp.float32(2.0)})
        log.push(13, {name: jnp.float32(value)})
    assert isinstance(caught.value, UserError)
    assert str(caught.value).startswith(f"{name} is {said}")
    where = f"at step 12 of sft (metrics in {tmp_path}/metrics.jsonl); last good checkpoint: RUN/checkpoints/10"
    assert str(caught.value).endswith(where)
    assert without_time(tmp_path)[-1] == {"step": 12, name: None, "reward": 2.0}  # what went wrong is on record


def test_flush_before_a_save_finds_the_nan_of_that_step(tmp_path):
    log = MetricsLog(tmp_path, "dpo")
    log.push(12, {"loss": jnp.float32(jnp.nan)})
    with pytest.raises(NanLoss, match=r"step 12 of dpo .*; no checkpoint was saved before"):
        log.flush()
    log.push(13, {"loss": jnp.float32(jnp.nan)})
    with pytest.raises(NanLoss, match="step 13"):
        log.close()
    assert [line["step"] for line in lines(tmp_path)] == [12, 13]
    with pytest.raises(KeyError), MetricsLog(tmp_path, "dpo") as log:
        log.push(1, {"loss": jnp.float32(jnp.nan)})
        raise KeyError  # another error is not hidden behind the NaN
    assert without_time(tmp_path) == [{"step": 1, "loss": None}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(NanLoss), MetricsLog(tmp_path / "run", "sft") as log:  # but every process stops
        assert log.push(1, {"loss": jnp.float32(0.5)}) is None
        assert log.push(2, {"loss": jnp.float32(jnp.nan)}) == {"loss": 0.5}
        log.flush()
    write_config(tmp_path / "run", Config())
    assert not (tmp_path / "run").exists()
    assert progress(3, "sft").disable


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_show_rate_and_time_left_on_a_terminal_only(monkeypatch, capsys):
    assert list(progress(range(3), "sft")) == [0, 1, 2]
    with progress(3, "sft") as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(10, "sft", initial=4, mininterval=0) as bar:
        bar.update(3)
        bar.update(2)
    text = terminal.getvalue()
    assert "sft" in text and "9/10" in text and "it/s" in text and "<" in text


@dataclasses.dataclass(frozen=True)
class Optimiser:
    rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    data: Path = Path("data/pairs.jsonl")
    optimiser: Optimiser = Optimiser()


def test_config_json_holds_what_made_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--steps", "3"])
    record = write_config(tmp_path / "run", Config())
    assert record == json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"] == {"steps": 3, "data": "data/pairs.jsonl", "optimiser": {"rate": 1e-3}}
    assert record["command"] == ["sft.py", "--steps", "3"]
    assert record["git"].keys() == {"commit", "dirty"}
    assert record["versions"]["jax"] == jax.__version__
    assert record["device"] == {"kind": "cpu", "platform": "cpu", "count": 8, "processes": 1}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_the_commit_is_that_of_the_source(tmp_path, monkeypatch):
    def git(*command):
        name = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *name, *command], check=True, capture_output=True, text=True
        ).stdout

    source = tmp_path / "package" / "metrics.py"
    source.parent.mkdir()
    source.write_text("# first\n")
    monkeypatch.setattr(metrics, "__file__", str(source))
    nothing = {"commit": None, "dirty": None}
    assert git_commit() == nothing  # no repository
    git("init", "-q")
    assert git_commit() == nothing  # a repository, but not ours: the file is not in it
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert len(commit) == 40 and git_commit() == {"commit": commit, "dirty": False}
    (tmp_path / "untracked").write_text("")
    assert git_commit()["dirty"] is False
    source.write_text("# second\n")
    assert git_commit() == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_commit() == nothing  # no git
