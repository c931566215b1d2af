"""What a run tells about itself: metrics.jsonl, TensorBoard events, config.json and progress bars.

Metrics leave the device one step late, so that the device never waits for the host; only process 0 writes.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rto_jax
from rto_jax.errors import UserError


class NanLoss(UserError):
    """A loss or a norm that is not finite: the parameters after that step are lost."""


class MetricsLog:
    """One JSON object a step in DIRECTORY/metrics.jsonl, and the same scalars as events in DIRECTORY/tb.

    `stage` names the run in the message of NanLoss; `last_good()` gives, for that message, the directory of the last
    checkpoint or None. `resume_step` keeps the lines up to that step and drops what came after, so that the file
    becomes that of the run without a stop, but for `time_s`, the run's seconds; without it both start anew.
    """

    def __init__(
        self,
        directory: str | Path,
        stage: str,
        resume_step: int | None = None,
        last_good: Callable[[], Any] = lambda: None,
    ):
        self.path = Path(directory) / "metrics.jsonl"
        self._stage, self._last_good = stage, last_good
        self._held: tuple[int, Mapping[str, Any]] | None = None
        self._writes = jax.process_index() == 0
        self._start = time.monotonic()
        if not self._writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _lines_up_to(self.path, resume_step)
        if kept:
            self._start -= json.loads(kept[-1]).get("time_s", 0.0)
        _write(self.path, "".join(kept))
        self._file = self.path.open("a", buffering=1)
        self._events = _Events(self.path.parent / "tb", resume_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(check=kind is None)

    def push(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float | int | None] | None:
        """Holds the scalars of `step`, on the device or not, and writes those held before, which are returned.

        Raises NanLoss when the step before had a metric named `...loss` or `...norm` that was not finite.
        """
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        written = self._write_held(check=True)
        self._held = (step, metrics)
        return written

    def flush(self, check: bool = True) -> dict[str, float | int | None] | None:
        """Writes what is held, to the disk. Call it before saving a checkpoint: a resumed run has all lines up to
        there, and NanLoss is raised while the checkpoint before is intact."""
        written = self._write_held(check)
        if self._writes:
            os.fsync(self._file.fileno())
            self._events.flush()
        return written

    def _write_held(self, check: bool) -> dict[str, float | int | None] | None:
        if self._held is None:
            return None
        (step, metrics), self._held = self._held, None
        values = {name: _number(name, value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if self._writes:
            elapsed = round(time.monotonic() - self._start, 3)
            self._file.write(json.dumps({"step": step, **finite, "time_s": elapsed}, allow_nan=False) + "\n")
            self._events.add(step, {name: value for name, value in finite.items() if value is not None})
        for name in values if check else ():
            if finite[name] is None and name.endswith(("loss", "norm")):
                good = self._last_good()
                raise NanLoss(
                    f"{name} is {_SAY.get(values[name], 'NaN')} at step {step} of {self._stage} "
                    f"(metrics in {self.path}); "
                    + (f"last good checkpoint: {good}" if good is not None else "no checkpoint was saved before")
                )
        return finite

    def close(self, check: bool = True) -> None:
        """Writes what is held and closes the files."""
        try:
            self.flush(check)
        finally:
            if self._writes:
                self._file.close()
                self._events.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports torch where it is installed, for nothing that we use: 2 s and 200 MiB in every run."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        yield
    finally:
        if hide:
            del sys.modules["torch"]


class _Events:
    """TensorBoard's file. Not tensorboardX's SummaryWriter: its thread may hold rows back when a run is killed, and when
    it dies of a full disk the run hangs."""

    def __init__(self, directory: Path, resume_step: int | None):
        with _without_torch():
            from tensorboardX import proto
            from tensorboardX.event_file_writer import EventsWriter

        if resume_step is None:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        self._proto = proto
        self._file = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        self._flushed = time.monotonic()
        if resume_step is not None:  # TensorBoard hides what the files before hold from this step on
            log = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
            self._file.write_event(proto.event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=log))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._proto.summary_pb2.Summary()
        for name, value in values.items():
            summary.value.add(tag=name, simple_value=value)
        self._file.write_event(self._proto.event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > 10:  # for whoever looks on
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


_SAY = {math.inf: "infinite", -math.inf: "minus infinity"}


def progress(work: Iterable | int, description: str, **options: Any):
    """A tqdm bar over an iterable, or over a number of steps to be counted with `.update()`.

    Shows rate and time left on stderr; off where that is no terminal, and on all processes but the first.
    """
    from tqdm import tqdm

    what = {"total": work} if isinstance(work, int) else {"iterable": work}
    hidden = None if jax.process_index() == 0 else True  # None: tqdm asks the terminal
    return tqdm(**what, desc=description, disable=hidden, dynamic_ncols=True, **options)


def git_commit() -> dict[str, str | bool | None]:
    """The commit that this package's source is of, and whether tracked files differ from it; None outside git."""
    here = Path(__file__)

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here.parent, *command], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody's repository; its commit would say nothing of ours.
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", here.name) else None
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def write_config(directory: str | Path, config: Any) -> dict:
    """Writes, and returns, DIRECTORY/config.json: the configuration (a dataclass) and all that made the run.

    Keys: config, command, git, versions, device.
    """
    device = jax.devices()[0]
    record = {
        "config": dataclasses.asdict(config),
        "command": sys.argv,
        "git": git_commit(),
        "versions": {"rto_jax": rto_jax.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }
    text = json.dumps(record, indent=2, default=str) + "\n"
    if jax.process_index() == 0:
        Path(directory).mkdir(parents=True, exist_ok=True)
        _write(Path(directory) / "config.json", text)
    return json.loads(text)


def _number(name: str, value: Any) -> float | int:
    """A Python number of as many digits as the dtype holds: 0.1 in float32 is written 0.1."""
    value = np.asarray(value)
    if value.shape != ():
        raise ValueError(f"metric {name} has shape {value.shape}; only scalars are logged")
    if np.issubdtype(value.dtype, np.integer) or value.dtype == bool:
        return int(value)
    return float(value) if value.dtype == np.float64 else float(str(np.float32(value)))


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of steps up to `step`; a line that a kill cut short is the last, and goes."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
