"""Kills training runs at random moments, resumes them, and compares every byte with the run that nobody killed.

    python -m benchmarks.kill [--kills 50] [--terms 10] [--seed 0] [--out benchmarks/results/kill.json]

SFT, DPO and RTO in the embedded world. A process is watched from outside (its metrics.jsonl and its folder of
checkpoints) and gets SIGKILL at a random moment. It is resumed, stopped again up to three times, and then left to
finish. --terms of the stops are SIGTERM, after which it must save and exit with status 0. Compared are, in every
checkpoint that is left, each parameter, optimiser moment and counter and the place in the data; every row of
metrics.jsonl but for the clock; the rows that TensorBoard shows; and what the stage writes at its end. Anything that
differs is an error. Also measures what saving costs: memory, seconds, checksums.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where a program's result is the same, to the bit, whenever it runs
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import dpo, rto, sft
from rto_jax import checkpoint, loops, programs
from rto_jax.checkpoint import Checkpointer
from rto_jax.metrics import git_commit, progress
from rto_jax.models import SIZES
from rto_jax.sharding import MeshConfig, make_mesh
from rto_jax.steps import ActorCritic

ROOT = Path(__file__).parents[1]
STAGES = {"sft": sft, "dpo": dpo, "rto": rto}
ROWS = {
    "sft": 24,
    "dpo": 24,
    "rto": 13,
}  # of a finished run's metrics.jsonl; RTO's first is of the state it starts from
SMALL = "--gold.examples 1024 --gold.pairs 512 --gold.test-pairs 64 --gold.rollouts 64 --batch-size 64 --eval-size 64"
FLAGS = {
    "sft": f"{SMALL} --steps 24 --save-every 6",
    "reward_model": f"{SMALL} --steps 4 --init {{base}}/sft",
    "dpo": f"{SMALL} --steps 24 --save-every 6 --init {{base}}/sft",
    "rto": f"{SMALL} --iterations 12 --save-every 3 --eval-every 4 --sft {{base}}/sft "
    "--reward-model {base}/reward_model --dpo {base}/dpo",
}
FILES = ("results.json", "model.json", "samples.json", "heatmap.json")


# ---- a run, watched from outside -------------------------------------------------------------------------------------


class View(NamedTuple):
    """What can be seen of a run."""

    opened: str  # the newest TensorBoard file: a new one says that the checkpoint was read and metrics.jsonl cut
    rows: int  # steps in metrics.jsonl
    writing: frozenset[tuple[str, int]]  # unfinished checkpoints and deletions: name and inode


def look(out: Path) -> View:
    opened, rows, writing = "", 0, frozenset()
    with contextlib.suppress(OSError):
        opened = max(os.listdir(out / "tb"), default="")
        rows = (out / "metrics.jsonl").read_bytes().count(b"\n")
    with contextlib.suppress(OSError):
        entries = list(os.scandir(out / "checkpoints"))
        writing = frozenset((entry.name, entry.inode()) for entry in entries if not entry.name.isdecimal())
    return View(opened, rows, writing)


def start(stage: str, base: Path, out: Path, extra: str = "") -> subprocess.Popen:
    """The stage's command; what it says goes to OUT.log."""
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(base / "cache"), **os.environ}
    flags = f"{FLAGS[stage].format(base=base)} --out {out} {extra}".split()
    command = [sys.executable, "-m", f"experiments.{stage}", *flags]
    with log_of(out).open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def log_of(out: Path) -> Path:
    return out.with_name(out.name + ".log")


def finish(stage: str, base: Path, out: Path, extra: str = "") -> None:
    """Runs the stage to its end."""
    check(start(stage, base, out, extra).wait(1200), stage, out)


def check(status: int, stage: str, out: Path) -> None:
    if status:
        raise SystemExit(f"{stage} ended with status {status}:\n{log_of(out).read_text()[-2000:]}")


class Pace(NamedTuple):
    """Of a run that nobody stops, in seconds."""

    total: float
    row: float  # from one row of metrics to the next
    write: float  # that a checkpoint is unfinished
    rollout: float = 0.0  # of a row's, those of the rollout


def straight(stage: str, base: Path) -> Pace:
    """Runs the stage into base/STAGE without a stop, and again, to see that the result is the same and how long it takes."""
    finish(stage, base, base / stage)
    out = base / f"{stage}-again"
    process, began, rows, writes, known = start(stage, base, out), time.monotonic(), [], [], {}
    while process.poll() is None:
        now, view = time.monotonic(), look(out)
        rows += [now] * (view.rows - len(rows))
        known |= {key: now for key in view.writing - known.keys()}
        writes += [now - known.pop(key) for key in list(known) if key not in view.writing]
        time.sleep(0.002)
    total = time.monotonic() - began
    check(process.returncode, stage, out)
    if found := differences(stage, base / stage, out):
        raise SystemExit(f"two runs of {stage} that nobody stopped differ: {found}")
    row = statistics.median(b - a for a, b in itertools.pairwise(rows))
    if stage != "rto":
        return Pace(total, row, statistics.median(writes))
    return Pace(total, row, statistics.median(writes), rollout_share(base) * row)


def rollout_share(base: Path) -> float:
    """Of an iteration of RTO: a row is written when an update has ended and a rollout begins, and with an epoch more,
    a row takes an update longer. In CPU time, which is the same whoever else computes here."""
    once, twice = (cpu_per_row(base, epochs) for epochs in (1, 2))
    return max(0.0, 2 * once - twice) / once


def cpu_per_row(base: Path, epochs: int) -> float:
    """Seconds of CPU that an iteration of RTO with so many epochs takes."""
    out, seen = base / f"rto-epochs{epochs}", [(2, 0.0)]  # rows, seconds of CPU; the first two compile
    process = start("rto", base, out, f"--ppo.epochs {epochs} --iterations 40 --eval-every 0 --save-every 0")
    while process.poll() is None:
        if (rows := look(out).rows) > seen[-1][0]:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            seen.append((rows, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")))
        time.sleep(0.002)
    check(process.returncode, "rto", out)
    (first, began), (last, ended) = seen[1], seen[-2]  # what comes after the last row may count as its
    return (ended - began) / (last - first)


# ---- what must be the same -------------------------------------------------------------------------------------------


def abstract_state(stage: str) -> Any:
    """What the stage's checkpoints hold."""
    mesh, size = make_mesh(MeshConfig(), jax.devices()[:1]), SIZES["gold"]
    config = STAGES[stage].PRESETS["gold"][1]
    if stage != "rto":
        return programs.abstract_state(size, "lm", config.optim, 1, mesh)
    policy = programs.abstract_state(size, "lm", config.policy_optim, 1, mesh)
    return ActorCritic(policy, programs.abstract_state(size, "last", config.critic_optim, 1, mesh))


def metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time_s"} for row in rows]


def shown(out: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) as TensorBoard shows them: a restart hides what the files before hold from its step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: list[tuple[int, str, float]] = []
    for file in sorted((out / "tb").iterdir()):
        data, at = file.read_bytes(), 0
        while at + 12 < len(data):  # records of u64 length, u32 crc, payload, u32 crc
            length = int.from_bytes(data[at : at + 8], "little")
            if at + 16 + length > len(data):
                break  # cut by a kill
            event = Event.FromString(data[at + 12 : at + 12 + length])
            if event.session_log.status == SessionLog.START:
                found = [row for row in found if row[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def differences(stage: str, one: Path, two: Path) -> list[str]:
    """Where two finished runs differ, byte for byte; empty if nowhere."""
    read = lambda path: path.read_bytes() if path.exists() else None  # noqa: E731
    found = [f"{name} differs" for name in FILES if read(one / name) != read(two / name)]
    rows = metrics(two)
    if rows != metrics(one):
        found.append("metrics.jsonl differs")
    expected = [
        (r["step"], name, np.float32(x)) for r in rows for name, x in r.items() if name != "step" and x is not None
    ]
    if shown(two) != expected:
        found.append("TensorBoard shows other rows than metrics.jsonl holds")
    want = loops.cut(abstract_state(stage))
    with Checkpointer(one / "checkpoints") as first, Checkpointer(two / "checkpoints") as second:
        if first.steps() != second.steps():
            return [*found, f"checkpoints of steps {first.steps()} and {second.steps()}"]
        for step in first.steps():
            (_, *ours, place), (_, *theirs, other) = (x.restore(step, want.params, want.train) for x in (first, second))
            if place != other:
                found.append(f"step {step}: the place in the data differs")
            for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
                if np.asarray(x).tobytes() != np.asarray(y).tobytes():
                    found.append(f"step {step}: {jax.tree_util.keystr(path[1:], simple=True, separator='/')} differs")
    return found


# ---- stopping --------------------------------------------------------------------------------------------------------


class Aim(NamedTuple):
    """`delay` seconds after the process began, or after its `count`-th new row, or after its `count`-th new unfinished
    checkpoint. No row comes before the first one: row 0 is where the loop begins, with a compilation."""

    after: str  # "start", "row" or "write"
    count: int
    delay: float
    signal: int = signal.SIGKILL


def draw(rng: random.Random, pace: Pace, number: signal.Signals) -> Aim:
    # Not before there is somebody to catch SIGTERM: an interpreter that is importing just ends.
    after = rng.choices(("start", "row", "write"), (2 if number == signal.SIGKILL else 0, 4, 4))[0]
    span = {"start": pace.total, "row": pace.row, "write": pace.write}[after]
    return Aim(after, rng.randint(*((0, 8) if after == "row" else (1, 3))), rng.uniform(0, span), number)


def stop(stage: str, base: Path, out: Path, aim: Aim, pace: Pace) -> dict | None:
    """Starts the run, or resumes it, and stops it as aimed: what was seen. None: it ended before."""
    before = view = look(out)
    process, began = start(stage, base, out, "--resume" * out.exists()), time.monotonic()
    kept, events, known, last, due = None, 0, before.writing, began, began if aim.after == "start" else None
    while due is None or time.monotonic() < due + aim.delay:
        if process.poll() is not None:
            check(process.returncode, stage, out)
            return None
        old, view, now = view, look(out), time.monotonic()
        if view.rows != old.rows:
            last = now
        if kept is None and view.opened != before.opened:
            kept, last = view.rows, now
        if aim.after == "row" and kept is not None:
            events = view.rows - kept
        elif aim.after == "write":
            events, known = events + len(view.writing - known), known | view.writing
        if due is None and kept is not None and events >= aim.count:
            due = now
        time.sleep(0.001)
    seen, killed = look(out), time.monotonic()
    process.send_signal(aim.signal)
    status = process.wait(300)
    grace = time.monotonic() - killed
    view = look(out) if aim.signal == signal.SIGKILL else seen  # after SIGTERM it went on and saved
    phase = "start" if kept is None else "first step" if view.rows <= kept else "step"
    if phase == "step" and view.rows >= ROWS[stage]:
        phase = "end"
    elif phase == "step" and stage == "rto":
        phase = "rollout" if killed - last < pace.rollout else "update"
    row = {"stage": stage, "phase": phase, "seconds": round(killed - began, 2), "rows": view.rows}
    if unfinished := view.writing - before.writing:  # in the background: the loop goes on
        written = "checkpoint" if any(not name.endswith("deleted") for name, _ in unfinished) else "deletion"
        row |= {"phase": written, "meanwhile": phase}
    if aim.signal == signal.SIGTERM:
        line = log_of(out).read_text().rstrip().rpartition("\n")[2]
        if status or not line.startswith("stopped by SIGTERM"):
            raise SystemExit(f"{stage} got SIGTERM in its {phase}, and ended with status {status}: {line}")
        row["seconds_to_exit"] = round(grace, 2)
    return row


def campaign(
    base: Path, paces: dict[str, Pace], kills: int, terms: int, seed: int, keep=lambda runs: None
) -> list[dict]:
    """Runs that are stopped one to four times each, until so many stops have happened; `keep` sees them as they grow."""
    rng = random.Random(seed)
    left = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(left)
    runs: list[dict] = []
    with progress(len(left), "stops") as bar:
        for number, stage in enumerate(itertools.cycle(paces), 1):
            if not left:
                return runs
            out, stops = base / "runs" / f"{number}-{stage}", []
            for _ in range(rng.randint(1, 4)):
                aim = draw(rng, paces[stage], left[-1]) if left else None
                seen = aim and stop(stage, base, out, aim, paces[stage])
                if not seen:
                    break
                stops.append(seen | {"signal": left.pop().name})
                bar.update()
            finish(stage, base, out, "--resume")
            found, said = differences(stage, base / stage, out), log_of(out).read_text()
            damaged = said.count("is damaged")
            runs.append({"stage": stage, "stops": stops, "differences": found, "damaged_checkpoints": damaged})
            keep(runs)
            if not found:
                shutil.rmtree(out)


# ---- what saving costs -----------------------------------------------------------------------------------------------


def memory(name: str) -> float:
    """MiB of this process, from /proc: VmRSS, or VmHWM, the most since the last `forget`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def saving(layout: str) -> dict[str, float]:
    """Saves and restores 512 MiB of float32 noise in a process of its own."""
    if jax.config.jax_platforms == "cpu" and layout != "one device":
        jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(MeshConfig(fsdp=jax.device_count()))
    sharding = NamedSharding(mesh, P() if layout == "copies on 8 devices" else P("fsdp"))
    make = jax.jit(lambda key: jax.random.normal(key, (1024, 8192)), out_shardings=sharding)
    with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpointer:
        checkpointer.save(0, {"params": {"w": make(jax.random.key(0))}}, {}, {})  # threads, pools and imports
        checkpointer.restore(0, {"params": {"w": make(jax.random.key(0))}}, {})
        state = {"params": {f"w{i}": make(jax.random.key(i)) for i in range(16)}}
        jax.block_until_ready(state)
        size = sum(x.nbytes for x in state["params"].values()) / 2**20
        forget()
        before, began = memory("VmRSS"), time.monotonic()
        checkpointer.save(1, state, {}, {})
        blocked = time.monotonic() - began
        checkpointer.wait()
        total, peak = time.monotonic() - began, memory("VmHWM") - before
        began = time.monotonic()
        checkpoint._sums(Path(folder), (Path(folder) / "1").rglob("*"))
        summed = time.monotonic() - began
        forget()
        before, began = memory("VmRSS"), time.monotonic()
        restored = checkpointer.restore(1, state, {})
        jax.block_until_ready(restored.params_by_name)
        read, held = time.monotonic() - began, len(sharding.device_set) if layout.startswith("copies") else 1
        found = {
            "layout": layout, "state_mib": size, "seconds_blocked": blocked, "seconds_to_disk": total,
            "seconds_of_checksums": summed, "host_memory_over_state": peak / size, "seconds_to_restore": read,
            "restore_memory_over_state": (memory("VmHWM") - before) / size / held,
        }  # fmt: skip
    return {name: round(x, 3) if isinstance(x, float) else x for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", default="benchmarks/results/kill.json", help="JSON file")
    args = parser.parse_args()
    out, began = Path(args.out), time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        costs = list(pool.map(saving, ("one device", "split over 8 devices", "copies on 8 devices")))
    for cost in costs:
        print(", ".join(f"{name} {x}" for name, x in cost.items()), flush=True)
    base = Path(tempfile.mkdtemp(prefix="rto-jax-kill-"))
    print(f"runs and their logs: {base}", flush=True)
    paces = {"sft": straight("sft", base)}
    finish("reward_model", base, base / "reward_model")
    paces |= {stage: straight(stage, base) for stage in ("dpo", "rto")}

    def keep(runs: list[dict]) -> None:
        stops = [row for run in runs for row in run["stops"]]
        count = lambda rows, key: dict(Counter(row[key] for row in rows if key in row).most_common())  # noqa: E731
        kills, terms = ([r for r in stops if r["signal"] == name] for name in ("SIGKILL", "SIGTERM"))
        found = {
            "command": " ".join(["python -m benchmarks.kill", *sys.argv[1:]]),
            "git": git_commit(),
            "cpu": f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}",
            "jax": jax.__version__,
            "seconds": round(time.monotonic() - began),
            "flags": FLAGS,
            "paces": {stage: {k: round(x, 3) for k, x in pace._asdict().items()} for stage, pace in paces.items()},
            "runs": len(runs),
            "runs_that_differ": sum(bool(run["differences"]) for run in runs),
            "kills": count(kills, "phase"),
            "kills_while_writing": count(kills, "meanwhile"),
            "terms": count(terms, "phase"),
            "seconds_to_exit": [r["seconds_to_exit"] for r in terms],
            "saving": costs,
            "rows": runs,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")

    runs = campaign(base, paces, args.kills, args.terms, args.seed, keep)
    different = [run for run in runs if run["differences"]]
    print(
        f"{args.kills} kills and {args.terms} SIGTERMs in {len(runs)} runs, of which {len(different)} end differently"
    )
    print(f"wrote {out}")
    if different:
        raise SystemExit(f"they are in {base}/runs: {different}")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
