"""Several processes on this machine, which meet over the loop-back address: the run of one, and one end for all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import pytest

from experiments import sft
from experiments.common import describe_model, main, open_model
from rto_jax import programs
from rto_jax.checkpoint import Checkpointer, restore_params
from rto_jax.models import SIZES
from rto_jax.sharding import MeshConfig, make_mesh

ROOT = Path(__file__).parents[1]
SMALL = "--gold.examples 128 --gold.pairs 64 --gold.test-pairs 32 --gold.rollouts 32 --batch-size 32 --eval-size 32"
FLAGS = {
    "sft": f"{SMALL} --steps 2 --save-every 1",
    "dpo": f"{SMALL} --steps 2 --init gold",
    # The other model of the DPO term is the SFT run's: any that is not the reference will do.
    "rto": f"{SMALL} --iterations 2 --eval-every 0 --sft gold --dpo {{one}}/sft --reward-model {{one}}/../reward_model",
}
# Each argument is a stage and its flags; all run in one process, for most of what they cost is start and compilation.
STAGES = """
import importlib, sys
from experiments.common import main
for line in sys.argv[1:]:
    name, *flags = line.split()
    stage = importlib.import_module("experiments." + name)
    main(stage.PRESETS, stage.run, "", flags)
"""
STEPS = """
import sys, time, jax
from rto_jax import hosts
hosts.join()
print("together", flush=True)
while True:
    hosts.wait_for_all()
"""


def start(log: Path, count: int, *command: str, last: tuple = (), devices: int = 1, **environment: str):
    """`python COMMAND` as so many processes with so many devices each; what they say goes to LOG.0, LOG.1, ...

    The last of them gets further arguments too.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    processes = []
    for index in range(count):
        place = zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), (address, count, index), strict=True)
        own = {f"JAX_{name}": str(value) for name, value in place} if count > 1 else {}
        own = {**os.environ, **common, **own, **environment}
        words = [sys.executable, *command, *(last if index == count - 1 else ())]
        with Path(f"{log}.{index}").open("w") as file:
            processes.append(subprocess.Popen(words, cwd=ROOT, env=own, stdout=file, stderr=file))
    return processes


def said(log: Path, index: int) -> str:
    return Path(f"{log}.{index}").read_text()


def finish(log: Path, processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """Status and output of each, which must end within so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        statuses = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(status, said(log, index)) for index, status in enumerate(statuses)]


def until(condition, processes: list[subprocess.Popen], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        running = all(process.poll() is None for process in processes)
        if not running or time.monotonic() > deadline:
            for process in processes:
                process.kill()
                process.wait()
            raise AssertionError("one ended too early" if not running else "not in time")
        time.sleep(0.05)


def run(base: Path, stages: str, count: int, devices: int, one: Path | None = None) -> Path:
    """The stages, one after the other, in base/STAGE."""
    lines = [f"{name} {FLAGS[name].format(one=one or base)} --out {base}/{name}" for name in stages.split()]
    base.mkdir()
    processes = start(base / "log", count, "-c", STAGES, *lines, devices=devices)
    for status, text in finish(base / "log", processes, 1200):
        assert status == 0, text
    return base


def reward_model(folder: Path) -> None:
    """One that nobody trained."""
    params = jax.jit(programs.init_fn(SIZES["gold"], "last"))(jax.random.key(1))
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params}, {}, {})
    config = sft.PRESETS["gold"][1]
    describe_model(folder, config, open_model("gold", config, "--model"), "last")


def rows(folder: Path) -> list[dict]:
    """Of metrics.jsonl, without the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time_s"} for row in found]


def params_of(folder: Path, name: str):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = programs.abstract_params(SIZES["gold"], "last" if name == "critic" else "lm", mesh)
    return jax.device_get(restore_params(folder / "checkpoints", abstract, name))


def check_same(stage: str, one: Path, several: Path, count: int, equal) -> None:
    """`several` has what `one` has, and its parameters and metrics are equal; everything is there once."""
    device = json.loads((several / stage / "config.json").read_text())["device"]
    assert (device["processes"], device["count"]) == (count, count)
    for name in ("params", "critic") if stage == "rto" else ("params",):
        equal(params_of(several / stage, name), params_of(one / stage, name))
    assert [row["step"] for row in rows(several / stage)] == [1, 2]
    equal(rows(several / stage), rows(one / stage))
    names = [sorted(path.name for path in (base / stage).iterdir()) for base in (one, several)]
    assert names[0] == names[1]  # and nothing half-written beside them
    assert len(list((several / stage / "tb").iterdir())) == 1
    steps = [sorted(path.name for path in (base / stage / "checkpoints").iterdir()) for base in (one, several)]
    assert steps[0] == steps[1]


def test_two_processes_end_as_one(tmp_path):
    """SFT on two devices, of one process or of two: every byte the same, for a sum of two has one order."""
    one = run(tmp_path / "one", "sft", 1, 2)
    two = run(tmp_path / "two", "sft", 2, 1, one)
    check_same("sft", one, two, 2, chex.assert_trees_all_equal)
    for name in ("results.json", "model.json"):
        assert (two / "sft" / name).read_bytes() == (one / "sft" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_all_stages(tmp_path, count):
    """SFT, DPO and RTO; four add in another order than one, and Adam makes more of that. (An update is up to 8e-3.)"""
    reward_model(tmp_path / "reward_model")
    one = run(tmp_path / "one", "sft dpo rto", 1, count)
    several = run(tmp_path / "several", "sft dpo rto", count, 1, one)
    for stage in ("sft", "dpo", "rto"):
        close = lambda x, y: chex.assert_trees_all_close(x, y, rtol=1e-3, atol=1e-4)  # noqa: E731
        check_same(stage, one, several, count, chex.assert_trees_all_equal if count == 2 else close)
    if count == 2:
        for name in ("results.json", "model.json", "samples.json"):
            assert (several / "rto" / name).read_bytes() == (one / "rto" / name).read_bytes()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(tmp_path, victim):
    """Which waits for it in a collective, and would wait for minutes."""
    log = tmp_path / "log"
    processes = start(log, 2, "-c", STEPS)
    until(lambda: all("together" in said(log, index) for index in (0, 1)), processes)
    processes[victim].kill()
    status, text = finish(log, processes, 20)[1 - victim]
    lost = f"error: process {victim} of 2 was lost (killed, or its machine is gone); --resume continues from the last"
    # Of process 0 JAX knows too, and may be first to end this one.
    assert (status == 1 and lost in text) or (victim == 0 and status < 0 and "another task died" in text), text


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_users_error_in_one_process_ends_all(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("no JSON")
    log, command = tmp_path / "log", ["-m", "experiments.sft", *SMALL.split(), "--out", str(tmp_path / "run")]
    processes = start(log, 2, *command, last=("--model", str(tmp_path / "model")))
    (first, here), (second, there) = finish(log, processes, 120)
    assert (first, second) == (2, 2)
    (own,), (heard,) = errors(there), errors(here)
    assert "model.json is not a model description" in own
    assert heard == own.replace("error: ", "error: process 1 of 2 stopped: ")


def test_a_directory_that_is_not_shared_is_told(tmp_path):
    """Each process has a folder of its own under the same name."""
    code = """
import os
from pathlib import Path
from rto_jax import hosts
from rto_jax.errors import UserError
hosts.join()
hosts.check_shared(Path("."), "--out")
os.mkdir(os.environ["JAX_PROCESS_ID"])
os.chdir(os.environ["JAX_PROCESS_ID"])
try:
    hosts.check_shared(Path("."), "--out")
except UserError as error:
    hosts.stop(2, f"error: {error}", str(error))
"""
    log = tmp_path / "log"
    processes = start(log, 2, "-c", f"import os; os.chdir({str(tmp_path)!r}){code}", PYTHONPATH=str(ROOT))
    for status, text in finish(log, processes, 120):
        assert status == 2 and len(errors(text)) == 1
        assert "is not the same directory for all processes (process 1 does not see" in text
    assert not list(tmp_path.glob("**/.seen*"))


def test_one_that_does_not_come_is_told(tmp_path):
    processes = start(tmp_path / "log", 2, "-c", STEPS, RTO_START_TIMEOUT="3")
    processes[1].kill()
    status, text = finish(tmp_path / "log", processes, 60)[0]
    assert status == 1 and "not all processes reached process 0 at 127.0.0.1:" in text and "RTO_START_TIMEOUT" in text


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "which this is: JAX_COORDINATOR_ADDRESS=, JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=."),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, "JAX_NUM_PROCESSES=,"),
        ({"JAX_COORDINATOR_ADDRESS": "here", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2"),
        ({"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "PROCESSES=two"),
        ({"JAX_NUM_PROCESSES": "2", "RTO_START_TIMEOUT": "soon"}, "RTO_START_TIMEOUT must be a number of seconds"),
    ],
)
def test_an_incomplete_environment_exits_2(environment, words, monkeypatch, tmp_path, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main(sft.PRESETS, sft.run, "", ["--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and words in error, error
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_exits_2(monkeypatch, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = (f"127.0.0.1:{taken.getsockname()[1]}", "2", "0")
        for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), environment, strict=True):
            monkeypatch.setenv(f"JAX_{name}", value)
        with pytest.raises(SystemExit) as stop:
            main(sft.PRESETS, sft.run, "", ["--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "process 0 cannot listen there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_of_two_in_the_middle_of_a_run(tmp_path, number):
    """SIGTERM: both save the same step and exit 0. SIGKILL: the other ends with the sentence. --resume goes on."""
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    command = ["-m", "experiments.sft", *SMALL.split(), "--steps", "100000", "--save-every", "5", "--out"]
    command += [str(tmp_path / "run")]
    processes = start(log, 2, *command)
    until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 12, processes)
    processes[1].send_signal(number)
    ends = finish(log, processes, 60)
    steps = sorted(int(path.name) for path in metrics.with_name("checkpoints").iterdir() if path.name.isdecimal())
    if number == signal.SIGTERM:
        assert [status for status, _ in ends] == [0, 0]
        told = f"stopped by SIGTERM after step {steps[-1]} of sft; continue with: python -m experiments.sft"
        assert told in ends[0][1]
        assert rows(tmp_path / "run")[-1]["step"] == steps[-1]
    else:
        assert ends[0][0] == 1 and "process 1 of 2 was lost" in ends[0][1] and ends[1][0] == -signal.SIGKILL
    before = rows(tmp_path / "run")[-1]["step"]
    resumed = start(tmp_path / "resumed", 2, *command, "--resume")
    until(lambda: rows(tmp_path / "run")[-1]["step"] > before + 3, resumed)
    resumed[0].send_signal(signal.SIGTERM)
    assert [status for status, _ in finish(tmp_path / "resumed", resumed, 60)] == [0, 0]
    found = [row["step"] for row in rows(tmp_path / "run")]
    assert found == list(range(1, len(found) + 1))
