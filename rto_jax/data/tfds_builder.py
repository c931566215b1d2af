"""Records as a tensorflow-datasets data set in array_record files, written and read without tensorflow.

    source, report = prepare("preferences", "data/alpaca_eval", "train")
    source[0]              # a records.Preference
    source.__getitems__([3, 1, 4])

A data set is prepared once per content: it stands under the cache in a folder named by the sha256 of the
source files and of what decides how it is read. Array records are read at random from disk, so a source of any size
costs no memory. Importing this module imports tensorflow_datasets (0.4 s).
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rto_jax.data import records as rec
from rto_jax.errors import UserError

VERSION = "1.0.0"  # of the layout on disk and of the rules in records.py: raise it when either changes
MARKER = "prepared.json"  # written last: the report, and the size of every other file

_MESSAGES = {"role": tfds.features.Text(), "content": tfds.features.Text()}
FIELDS = {"preferences": ("chosen", "rejected"), "examples": ("response",), "prompts": ()}
RECORDS = {"preferences": rec.Preference, "examples": rec.Example, "prompts": rec.PromptRecord}


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: no bucket knows this data, and tfds's own search leaves an empty folder in /tmp each time."""


class RtoRecords(tfds.core.GeneratorBasedBuilder):
    """Builder of one split of one kind of record: prompt messages, the kind's texts, file number and line."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=kind) for kind in FIELDS]  # noqa: RUF012 (tfds's convention)
    code_path = Path(__file__)  # tfds's own look-up needs importlib_resources, which it does not install

    def __init__(self, *, kind: str, split: str, files: Sequence[Path], records: Sequence[Any], **kwargs):
        self._kind, self._split, self._records = kind, split, records
        self._files = [str(file) for file in files]
        # The default file format, tfrecord, would need tensorflow, and fail only at the end of writing.
        super().__init__(config=kind, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {name: tfds.features.Text() for name in FIELDS[self._kind]}
        features = {"prompt": tfds.features.Sequence(_MESSAGES), **texts, "file": np.int64, "line": np.int64}
        features = tfds.features.FeaturesDict(features)
        return _Info(builder=self, features=features, disable_shuffling=True)  # the file's order

    def _split_generators(self, dl_manager):
        return {self._split: self._generate_examples()}

    def _generate_examples(self):
        for key, record in enumerate(self._records):
            texts = {name: getattr(record, name) for name in FIELDS[self._kind]}
            file, _, line = record.where.rpartition(":")
            yield key, {"prompt": list(record.prompt), **texts, "file": self._files.index(file), "line": int(line)}


class RecordSource:
    """Random access to prepared records: `len`, an index, or `__getitems__` of a list of indices."""

    def __init__(self, kind: str, files: Sequence[Path], folder: Path, split: str):
        self._kind, self._files, self.folder = kind, files, folder
        self._source = tfds.builder_from_directory(folder).as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int):
        return self._decode(self._source[int(index)])

    def __getitems__(self, indices: Sequence[int]) -> list:
        return [self._decode(row) for row in self._source.__getitems__([int(i) for i in indices])]

    def _decode(self, row: dict[str, Any]):
        # tfds gives a sequence of dicts back as a dict of lists, and text as bytes.
        roles, contents = row["prompt"]["role"], row["prompt"]["content"]
        prompt = tuple({"role": r.decode(), "content": c.decode()} for r, c in zip(roles, contents, strict=True))
        texts = (row[name].decode() for name in FIELDS[self._kind])
        return RECORDS[self._kind](prompt, *texts, where=f"{self._files[row['file']]}:{row['line']}")


def default_cache() -> Path:
    """$RTO_JAX_CACHE, or rto_jax in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RTO_JAX_CACHE") or Path(home) / "rto_jax")


def prepare(
    kind: str, path: str | Path, split: str = "train", *, skip_bad: bool = False, cache: str | Path | None = None
) -> tuple[RecordSource, rec.Report]:
    """The records of a file, or of a split in a folder, written once and then read from the cache.

    `kind` is "preferences", "examples" or "prompts"; bad records as in `records`. Safe to call at once from several
    processes (each writes its own folder and renames it whole; the last to finish throws its copy away), and after
    a process was killed (a folder without its marker, or with files of another size, is written anew).
    """
    files = rec.find_files(path, split)
    cache = default_cache() if cache is None else Path(cache).expanduser()
    # The files' names are no part of the key, so a copied or moved data set is not prepared again.
    key = hashlib.sha256(f"{VERSION} {kind} {split} {skip_bad}".encode())
    for file in files:
        with file.open("rb") as stream:
            key.update(hashlib.file_digest(stream, "sha256").digest())
    folder = cache / "tfds" / f"{kind}-{key.hexdigest()[:20]}"

    marker = _marker(folder)
    for _ in range(3):  # again only where another process replaces a torn folder at the same moment
        if marker is None:
            parsed, report = rec.READERS[kind](path, split, skip_bad=skip_bad)
            try:
                _write(folder, report, kind=kind, split=split, files=files, records=parsed)
            except OSError as error:
                raise UserError(f"{cache}: the prepared data can't be written ({error.strerror or error})") from None
            marker = _marker(folder)
    if marker is None:
        raise UserError(f"{folder}: another process keeps changing the prepared data")
    report = rec.Report(**marker["report"])
    return RecordSource(kind, files, folder, split), report


def _marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a folder that is whole, else None."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in marker["sizes"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return marker if whole else None


def _write(folder: Path, report: rec.Report, **content) -> None:
    """Prepares in a folder of this process's own, then renames."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as tmp:
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints two lines about downloads that there are none of
            builder = RtoRecords(**content, data_dir=tmp)
            builder.download_and_prepare(download_dir=Path(tmp) / "downloads")
        done = Path(builder.data_dir)
        sizes = {file.name: file.stat().st_size for file in done.iterdir()}
        (done / MARKER).write_text(json.dumps({"report": dataclasses.asdict(report), "sizes": sizes}))
        if folder.exists() and _marker(folder) is None:
            with contextlib.suppress(OSError):  # another process may be replacing it too
                folder.rename(Path(tmp) / "torn")
        try:
            done.rename(folder)
        except OSError:
            if _marker(folder) is None:
                raise
