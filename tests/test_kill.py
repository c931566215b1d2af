"""A run that is killed, preempted, out of disk and damaged ends with the same bytes: benchmarks.kill's own functions."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kill
from experiments import sft
from experiments.common import main
from rto_jax import loops
from rto_jax.checkpoint import Checkpointer

TINY = "--gold.examples 64 --gold.pairs 32 --gold.test-pairs 8 --gold.rollouts 16 --batch-size 8 --eval-size 8"
PACE = kill.Pace(total=10, row=0.02, write=0.05)  # only says where within a row or a write the signal comes


def steps(out) -> list[int]:
    with Checkpointer(out / "checkpoints") as checkpointer:
        return checkpointer.steps()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with SFT of 200 steps that nobody stopped in it."""
    base = tmp_path_factory.mktemp("kill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kill.FLAGS, "sft", f"{TINY} --steps 200 --save-every 10")
        patch.setitem(kill.ROWS, "sft", 200)
        kill.finish("sft", base, base / "sft")
        yield base


@pytest.mark.slow
def test_three_kills_a_sigterm_a_full_disk_and_a_flipped_byte_leave_no_trace(straight):
    """One run, stopped at moments that seed 0 draws, all before its 150th step; what it ends with is as without a stop."""
    out, rng = straight / "runs" / "sft", random.Random(0)

    def stop(after, most, number=signal.SIGKILL):
        delay = rng.uniform(0, PACE.write if after == "write" else PACE.row)
        return kill.stop("sft", straight, out, kill.Aim(after, rng.randint(1, most), delay, number), PACE)

    kills = [stop("row", 8), stop("write", 3), stop("row", 8)]
    assert all(kills), kills  # else it had ended before
    assert any(seen["rows"] >= 10 for seen in kills)  # one of them at least left a checkpoint to go on from

    term = stop("row", 8, signal.SIGTERM)
    rows = len(kill.metrics(out))
    assert term and term["seconds_to_exit"] < 60 and rows < 200
    assert kill.log_of(out).read_text().rstrip().splitlines()[-1] == (
        f"stopped by SIGTERM after step {rows} of sft; continue with: python -m experiments.sft "
        f"{kill.FLAGS['sft']} --out {out} --resume"
    )
    assert steps(out)[-1] == rows  # what was done is saved

    before = steps(out)
    process = kill.start("sft", straight, out, "--resume")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # less than a checkpoint's arrays
    assert process.wait(300) == 2
    said = kill.log_of(out).read_text().rstrip().splitlines()[-1]
    due = rows // 10 * 10 + 10
    assert said == f"error: step {due} could not be saved in {out}/checkpoints: file too large", said
    assert steps(out) == before

    newest = out / "checkpoints" / str(rows)
    file = max((newest / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    kill.finish("sft", straight, out, "--resume")
    said = kill.log_of(out).read_text()
    assert f"warning: the checkpoint {newest} is damaged (params/" in said and said.count("is damaged") == 1
    assert f"going back to step {before[-2]}" in said
    assert kill.differences("sft", straight / "sft", out) == []


@pytest.mark.slow
def test_differences_are_found(straight, tmp_path):
    """The comparison sees one bit of one parameter, another place in the data, another row, another result."""
    other = tmp_path / "sft"
    shutil.copytree(straight / "sft", other)
    assert kill.differences("sft", straight / "sft", other) == []
    want = loops.cut(kill.abstract_state("sft"))
    with Checkpointer(other / "checkpoints") as checkpointer:
        first, last = checkpointer.steps()
        found = checkpointer.restore(last, want.params, want.train)
        moved = jax.tree.map(lambda x: x, found.params_by_name)
        scale = np.array(moved["params"]["norm"]["scale"])
        scale.view(np.uint32)[0] ^= 1
        moved["params"]["norm"]["scale"] = jnp.asarray(scale)
        checkpointer.restore(first, want.params, want.train)  # from here on, so that `last` may be written again
        checkpointer.save(last, moved, found.train, {"batches": 0})
    path = other / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[7]["loss"] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (other / "results.json").write_text("{}")
    assert kill.differences("sft", straight / "sft", other) == [
        "results.json differs",
        "metrics.jsonl differs",
        "TensorBoard shows other rows than metrics.jsonl holds",
        f"step {last}: the place in the data differs",
        f"step {last}: params/norm/scale differs",
    ]


CHILD = """
import sys, time
from experiments.preemption import PREEMPTION
with PREEMPTION.caught(["resume", "the run"]):
    if "loop" in sys.argv:
        assert not PREEMPTION.asked(1)
    print("ready", flush=True)
    while "loop" not in sys.argv or not PREEMPTION.asked(2):
        time.sleep(0.01)
    print("asked", flush=True)
    while "twice" in sys.argv:
        time.sleep(0.01)
    PREEMPTION.left()
print("went on")
"""


def test_sigterm_ends_at_once_where_no_loop_would_notice():
    """Before the first step: at once, with 0. In the loop: when asked, and at its end. A second signal: at once, with 143."""
    cases = {"": 0, "loop": 0, "loop twice": 143}
    command = [sys.executable, "-c", CHILD]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=kill.ROOT)
    processes = {case: subprocess.Popen([*command, *case.split()], **pipes) for case in cases}
    for case, process in processes.items():
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        if case:
            assert process.stdout.readline() == "asked\n"
        if case == "loop twice":
            process.send_signal(signal.SIGTERM)
        rest, error = process.communicate(timeout=60)
        assert (process.returncode, rest) == (cases[case], ""), case
        assert error == "stopped by SIGTERM; continue with: resume 'the run'\n"


def test_a_disk_that_is_full_for_other_files_is_one_sentence(tmp_path, capsys):
    """/dev/full has no space for anybody."""

    def run(config):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"a row of metrics")

    with pytest.raises(SystemExit) as stop:
        main(sft.PRESETS, run, "", ["--out", str(tmp_path)])
    said = f"error: --out {tmp_path}: No space left on device; --resume continues from the last checkpoint\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, said)


@pytest.mark.slow
def test_kills_in_rollouts_and_updates_of_rto(tmp_path, monkeypatch):
    """The benchmark's own campaign over RTO alone: three kills and a SIGTERM, at moments that seed 1 draws."""
    flags = f"{TINY} --iterations 60 --save-every 4 --eval-every 0 --sft gold --dpo gold"
    monkeypatch.setitem(kill.FLAGS, "reward_model", f"{TINY} --steps 1 --init gold")
    monkeypatch.setitem(kill.FLAGS, "rto", f"{flags} --reward-model {{base}}/reward_model")
    monkeypatch.setitem(kill.ROWS, "rto", 60)
    kill.finish("reward_model", tmp_path, tmp_path / "reward_model")
    kill.finish("rto", tmp_path, tmp_path / "rto")
    paces = {"rto": PACE._replace(row=0.2, rollout=0.1)}
    runs = kill.campaign(tmp_path, paces, 3, 1, seed=1)
    stops = [seen for run in runs for seen in run["stops"]]
    assert sorted(seen["signal"] for seen in stops) == ["SIGKILL"] * 3 + ["SIGTERM"]
    assert [run["differences"] for run in runs] == [[]] * len(runs)
