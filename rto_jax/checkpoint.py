"""Checkpoints: parameters, optimiser, counters and the data iterator's place in one step. The only user of Orbax.

`DIRECTORY/STEP/` holds one Orbax item for each named parameter tree ("params", "critic", ...), so that a later stage
reads the parameters alone; "train", whatever else the step changes; "extra", JSON of the host's state; and
`files.json`, size and CRC-32 of every file and of the list, since Orbax restores arrays whose bytes have changed without
a word. Orbax writes beside it, in `STEP.orbax-checkpoint-tmp`, and renames when all is there, so a killed save leaves no step
behind. Several processes need a directory that all of them share.
"""

import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rto_jax.errors import UserError
from rto_jax.types import Params

_TRAIN, _EXTRA, _FILES = "train", "extra", "files.json"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of steps, and of a step's items, that are being written


class Restored(NamedTuple):
    """What `Checkpointer.save` was given at `step`."""

    step: int
    params_by_name: dict[str, Params]
    train: Any
    extra: dict


class Checkpointer:
    """Saves in the background and keeps the last `keep` steps; a context manager, closed on the way out.

    The step that is one too many goes once the next is known to be complete, so `keep` + 1 lie on disk between a
    save and the next `save`, `wait` or `close`.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise UserError(f"keep must be at least 1 checkpoint, not {keep}")
        self.directory = _local(directory)
        self._keep = keep
        self._saving: int | None = None
        self._abandoned: set[int] = set()  # steps of a run that was taken up again from before them
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the checkpoint directory {self.directory}: {error.strerror}") from error
        for path in self._leftovers():
            _say(f"ignoring {path}, left by a run that was stopped while it saved")
        ocp = _orbax()
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        # Compressing takes time and a second copy of the state, and saves a twelfth of float32.
        handlers.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
        handler = ocp.CompositeCheckpointHandler(handler_registry=handlers)
        write = handler.async_save

        async def write_and_sum(*args, **kwargs):
            return [ocp.future.ChainedFuture(await write(*args, **kwargs), self._sum_own_files)]

        handler.async_save = write_and_sum  # Orbax has a callback on the first process only, and that is one too few
        # A save must not hang for ever on a process that died: the time-out is Orbax's, 20 minutes.
        self._writer = ocp.AsyncCheckpointer(
            handler, async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files)
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps on disk, complete or damaged, in order."""
        return _steps(self.directory)

    def latest(self) -> int | None:
        """The newest step on disk."""
        return max(self.steps(), default=None)

    def latest_path(self) -> Path | None:
        """Its directory, for messages."""
        step = self.latest()
        return None if step is None else self.directory / str(step)

    def save(self, step: int, params_by_name: dict[str, Params], train: Any, extra: dict) -> None:
        """Copies the arrays to the host, and writes in the background; waits first for the save before.

        The caller may donate the arrays as soon as this returns. `extra` is JSON. Raises UserError if the step is
        there already, unless the run was restored from before it: then the old branch is removed.
        """
        if reserved := {_TRAIN, _EXTRA} & params_by_name.keys():
            raise ValueError(f"{reserved} is no name for parameters")
        self.wait()
        if step in self.steps() and step not in self._abandoned:
            raise UserError(f"{self.directory} already holds step {step}: resume from it, or choose another directory")
        ocp = _orbax()
        # Orbax refuses a tree without leaves (plain SGD's state); there is nothing to keep of it.
        trees = {name: tree for name, tree in {**params_by_name, _TRAIN: train}.items() if jax.tree.leaves(tree)}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        # The copy through JSON is a snapshot: the file is written later, when the iterator has moved on.
        items[_EXTRA] = ocp.args.JsonSave(json.loads(json.dumps(extra)))
        self._saving = step
        self._remove_leftovers()
        try:
            args = ocp.args.Composite(**items)
            self._writer.save(self.directory / str(step), args=args, force=step in self._abandoned)
        except OSError as error:
            raise UserError(f"cannot save step {step} in {self.directory}: {error}") from error

    def wait(self) -> None:
        """Returns when the save in progress is on disk. Raises UserError if it could not be written."""
        step = self._saving
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            self._saving = None
            causes = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO))
            known = next((cause.lower() for cause in causes if cause in str(error)), None)
            reason = known or str(error).split("\n")[0][:200]
            raise UserError(f"step {step} could not be saved in {self.directory}: {reason}") from error
        if step is not None:
            self._saving = None
            self._abandoned.discard(step)
            self._prune()

    def close(self) -> None:
        """Waits, and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def restore(self, step: int | None, params_by_name: dict[str, Params], train: Any) -> Restored:
        """Reads a step onto the shardings of the two abstract trees, byte for byte.

        The trees have the structure that was saved, of ShapeDtypeStructs or of arrays; a leaf without a sharding
        comes back uncommitted, as jnp.asarray would give it. `step=None` is the newest; if that is damaged, one line on
        stderr says so and the last good one is read. Later steps go with the next save. Raises UserError: no such
        step; damaged; a name, shape or dtype that differs.
        """
        self.wait()

        def read(path: Path) -> Restored:
            _check_files(path, {*params_by_name, _TRAIN, _EXTRA})
            params = {name: _read_tree(path / name, tree, exact=True) for name, tree in params_by_name.items()}
            return Restored(int(path.name), params, _read_tree(path / _TRAIN, train, exact=True), _read_extra(path))

        restored = _newest_good(self.directory, step, read)
        self._abandoned = {other for other in self.steps() if other > restored.step}
        return restored

    def _root(self) -> Path:
        """Where the step that is being saved lies now."""
        candidates = [self.directory / str(self._saving), *self._leftovers(self._saving)]
        return next(path for path in candidates if path.is_dir())  # Orbax has not promised which

    def _sum_own_files(self) -> None:
        """Writes files.N.json; called on process N when its arrays are written, so that none reads all of them."""
        root, index = self._root(), jax.process_index()
        _write_json(root / f"files.{index}.json", _sums(root, root.glob(f"*/ocdbt.process_{index}/**/*")))

    def _list_files(self) -> None:
        """Writes files.json; called on one process, when all have written and Orbax has added what it adds."""
        root, sums = self._root(), {}
        parts = [root / f"files.{index}.json" for index in range(jax.process_count())]
        for part in parts:
            sums |= json.loads(part.read_text())
        rest = (path for path in root.glob("*/**/*") if str(path.relative_to(root)) not in sums)
        sums |= _sums(root, rest)
        _write_json(root / _FILES, {"files": sums, "crc": _crc(sums)})
        for part in parts:
            part.unlink()

    def _leftovers(self, step: int | None = None) -> list[Path]:
        """Directories of saves, of `step` if given, and of deletions that did not end."""
        return sorted(self.directory.glob(f"{'*' if step is None else step}{_UNFINISHED}*"))

    def _remove_leftovers(self) -> None:
        for path in self._leftovers() if jax.process_index() == 0 else ():
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        abandoned, self._abandoned = self._abandoned, set()
        if jax.process_index() == 0:
            good = [step for step in self.steps() if step not in abandoned]
            for step in [*abandoned, *good[: -self._keep]]:
                path = self.directory / str(step)
                if path.is_dir():  # renamed first: a deletion cut short must not look like a step
                    path.rename(path.with_name(f"{step}{_UNFINISHED}-deleted"))
            self._remove_leftovers()


def restore_params(directory: str | Path, abstract: Params, name: str = "params", step: int | None = None) -> Params:
    """Reads one parameter tree of a checkpoint directory, and nothing else of it, onto the shardings of `abstract`.

    `step=None` is the newest, or the last good one, as in `Checkpointer.restore`. Values are cast to the dtypes of
    `abstract`. Raises UserError as `Checkpointer.restore` does.
    """

    def read(path: Path) -> Params:
        _check_files(path, {name})
        return _read_tree(path / name, abstract, exact=False)

    return _newest_good(_local(directory), step, read)


class _Damaged(Exception):
    """A step of which something is missing, cut short or unreadable."""


@functools.cache
def _orbax():
    """Orbax, imported when first needed (0.4 s), without its log lines: what matters reaches us as exceptions.

    When a write fails, the other writes of that save end later, and tell an event loop that is closed by then: a stack
    trace each.
    """
    import orbax.checkpoint as ocp
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    show = sys.unraisablehook
    sys.unraisablehook = lambda error: None if str(error.exc_value) == "Event loop is closed" else show(error)
    return ocp


def _say(message: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {message}", file=sys.stderr)


def _local(directory: str | Path) -> Path:
    if re.match(r"\w\w+:/", str(directory)):  # would else be made here, as a folder of that name
        raise UserError(f"{directory} is an address: mount the bucket, and give the folder that it is mounted at")
    return Path(directory).absolute()


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def _newest_good(directory: Path, step: int | None, read: Callable[[Path], Any]) -> Any:
    """`read` of `step`, or of the newest step that is not damaged."""
    steps = _steps(directory)
    if not steps:
        raise UserError(f"there is no checkpoint in {directory}")
    if step is not None and step not in steps:
        raise UserError(f"{directory} holds no step {step}, only {', '.join(map(str, steps))}")
    candidates = steps[::-1] if step is None else [step]
    while True:
        path = directory / str(candidates.pop(0))
        try:
            return read(path)
        except _Damaged as damage:
            if not candidates:
                raise UserError(f"the checkpoint {path} is damaged: {damage}") from damage
            _say(f"the checkpoint {path} is damaged ({damage}); going back to step {candidates[0]}")


def _sum(path: Path) -> list[int]:
    """Size and CRC-32 of a file, through a small buffer."""
    size = crc = 0
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc = size + count, zlib.crc32(buffer[:count], crc)
    return [size, crc]


def _sums(root: Path, paths: Iterable[Path]) -> dict[str, list[int]]:
    """Under the names that the files will have."""
    files = [path for path in paths if path.is_file()]
    names = [str(path.relative_to(root)).replace(_UNFINISHED, "", 1) for path in files]
    with ThreadPoolExecutor(4) as pool:  # zlib lets go of the interpreter's lock
        return dict(zip(names, pool.map(_sum, files), strict=True))


def _crc(sums: dict[str, list[int]]) -> int:
    """CRC-32 of the list itself: a name that changed would else leave its file unchecked."""
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())


def _write_json(path: Path, value: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _fault(file: Path, size: int, crc: int) -> str | None:
    """What is wrong with a file."""
    try:
        if (found := file.stat().st_size) != size:
            return f"has {found} bytes, not {size}"
        return None if _sum(file) == [size, crc] else "has changed since it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _check_files(path: Path, items: set[str]) -> None:
    """Compares the files of `items` with files.json before anything is read: a read that fails leaves Orbax untidy.

    Each process reads its share of the files, and all raise if one has found a fault.
    """
    try:
        listed = json.loads((path / _FILES).read_text())
        sums = listed["files"]
        if listed["crc"] != _crc(sums):
            raise ValueError("changed")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _Damaged(f"{_FILES} is missing, cut short or changed") from error
    names = sorted(name for name in sums if Path(name).parts[0] in items)
    expected = [sums[name] for name in names]
    mine = range(jax.process_index(), len(names), jax.process_count())
    with ThreadPoolExecutor(4) as pool:
        faults = dict(zip(mine, pool.map(lambda i: _fault(path / names[i], *expected[i]), mine), strict=True))
    first = min((i for i, fault in faults.items() if fault), default=len(names))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        first = int(multihost_utils.process_allgather(np.int32(first)).min())
    if first < len(names):
        raise _Damaged(f"{names[first]} {faults.get(first) or 'is damaged'}")


def _read_extra(path: Path) -> dict:
    reader = _orbax().Checkpointer(_orbax().JsonCheckpointHandler())
    try:
        return reader.restore(path / _EXTRA)
    except Exception as error:
        raise _Damaged(f"{_EXTRA} cannot be read") from error
    finally:
        reader.close()


def _read_tree(path: Path, tree: Any, exact: bool) -> Any:
    if not jax.tree.leaves(tree):
        return tree
    if not path.is_dir():
        held = sorted(other.name for other in path.parent.iterdir() if other.is_dir())
        raise UserError(f"the checkpoint {path.parent} holds no '{path.name}', only {', '.join(held)}")
    abstract = jax.tree.map(_abstract, tree)
    reader = _orbax().StandardCheckpointer()
    try:
        _compare(path, reader.metadata(path).item_metadata.tree, abstract, exact)
        arrays = reader.restore(path, abstract)
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # no fault of the files
        raise
    except Exception as error:
        raise _Damaged(f"{path.name} cannot be read") from error
    finally:
        reader.close()
    return jax.tree.map(lambda leaf, x: jnp.asarray(np.asarray(x)) if _is_free(leaf) else x, tree, arrays)


def _is_free(leaf: Any) -> bool:
    """Not bound to devices: no sharding given, or an array that jit may move (`jnp.int32(0)`)."""
    return getattr(leaf, "sharding", None) is None or not getattr(leaf, "committed", True)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if _is_free(leaf) else leaf.sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compare(path: Path, held: Any, wanted: Any, exact: bool) -> None:
    """Raises UserError with the first leaf whose name, shape or (if `exact`) dtype differs, and the number of others.

    Orbax's own error names no leaf, and it casts another dtype silently.
    """
    held, wanted = ({_name(key): leaf for key, leaf in jax.tree.leaves_with_path(tree)} for tree in (held, wanted))
    owner = "the run" if path.name == _TRAIN else "the model"
    differences = []
    for name in wanted.keys() & held.keys():
        have, want = held[name], wanted[name]
        if tuple(have.shape) != want.shape:
            differences.append(f"holds {name} {[*have.shape]}, {owner} wants {[*want.shape]}")
        elif exact and have.dtype != want.dtype:
            differences.append(f"holds {name} in {have.dtype}, {owner} wants {want.dtype}")
    differences.sort()
    differences += [f"lacks {name} {[*wanted[name].shape]}" for name in sorted(wanted.keys() - held.keys())]
    differences += [f"holds {name}, which {owner} has not" for name in sorted(held.keys() - wanted.keys())]
    if differences:
        more = f" ({len(differences) - 1} more differ)" if len(differences) > 1 else ""
        raise UserError(f"the checkpoint {path} {differences[0]}{more}")


def _name(key: tuple) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")
