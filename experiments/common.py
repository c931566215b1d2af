"""What every stage shares: its configuration, its command line, models from earlier stages, its run directory."""

import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from rto_jax import loops, programs
from rto_jax.checkpoint import Checkpointer, restore_params
from rto_jax.data import Lengths, Tokenizer, download, load_tokenizer, smollm2_tokenizer
from rto_jax.errors import UserError
from rto_jax.metrics import MetricsLog, write_config
from rto_jax.models import SIZES, LlamaConfig, RopeScaling, fold_affine, load_hf, load_smollm2
from rto_jax.rng import stream
from rto_jax.sharding import MeshConfig, put_params
from rto_jax.train_state import sharded_init
from rto_jax.types import Params

GOLD = "gold"  # the fingerprint of the embedded world's vocabulary, which needs no tokenizer


@dataclass(frozen=True)
class GoldData:
    """How much the embedded world draws."""

    examples: int = 32_768
    """responses of the data policy for SFT"""
    pairs: int = 16_384
    """training pairs, sampled from the SFT policy"""
    test_pairs: int = 2_048
    """held-out pairs"""
    rollouts: int = 1_024
    """rollouts behind an exact score"""


@dataclass(frozen=True)
class Stage:
    """The flags that all stages have."""

    out: str
    """run directory; a directory that holds a run is continued with --resume and never overwritten"""
    data: str = ""
    """folder with {train,test,...}.jsonl[.gz], a file, or owner/name on the Hugging Face hub; the gold world needs none"""
    seed: int = 0
    """of initialisation, data order and sampling"""
    resume: bool = False
    """continue the run in --out exactly where its last good checkpoint stands"""
    dry_run: bool = False
    """build every program and check every shape and sharding abstractly, then stop: no weights, no data"""
    skip_bad_records: bool = False
    """count malformed records and go on, instead of stopping at the first"""
    dtype: str = "float32"
    """compute dtype; parameters and optimiser state stay float32"""
    remat: bool = False
    """recompute activations in the backward pass"""
    batch_size: int = 128
    """rows (pairs, for pair losses; rollouts per iteration, for RL) per step, over all devices"""
    micro_batches: int = 1
    """parts in which a batch's gradient is accumulated"""
    lengths: Lengths = field(default_factory=lambda: Lengths(4, 24))
    """static shapes, in tokens"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """devices"""
    save_every: int = 0
    """steps between checkpoints; one is always written at the end"""
    keep: int = 2
    """newest checkpoints kept"""
    eval_size: int = 1_000
    """held-out rows evaluated, at most, per set"""
    policy_size: str = "gold"
    """named size that --dry-run takes for the policy"""
    reward_size: str = "gold"
    """named size that --dry-run takes for the reward model and the critic"""
    tokenizer: str = ""
    """folder or hub name of the tokenizer and chat template to use instead of the starting model's own"""
    gold: GoldData = field(default_factory=GoldData)
    """sizes of the embedded world's data"""

    def __post_init__(self):
        if self.batch_size < 1 or self.micro_batches < 1:
            raise UserError("--batch-size and --micro-batches must be at least 1.")
        for name in ("policy_size", "reward_size"):
            if getattr(self, name) not in SIZES:
                raise UserError(f"--{name.replace('_', '-')} must be one of {', '.join(SIZES)}.")


# ---------------------------------------------------------------------------------------------- command line

Presets = Mapping[str, tuple[str, Any]]


def main(presets: Presets, run: Callable[[Any], Any], description: str, argv: list[str] | None = None) -> None:
    """`--preset NAME` chooses the defaults, every other flag overrides one; a UserError is one line and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        name, rest = split_preset(argv, presets)
        text = f"{description}\n\npresets (--preset NAME, default {next(iter(presets))}):\n" + "\n".join(
            f"  {key:<14}{about}" for key, (about, _) in presets.items()
        )
        config = tyro.cli(
            type(presets[name][1]), default=presets[name][1], args=rest, description=text,
            prog=f"python -m experiments.{Path(sys.argv[0]).stem}", config=(tyro.conf.FlagCreatePairsOff,),
        )  # fmt: skip
        set_up()
        run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; --resume continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def split_preset(argv: list[str], presets: Presets) -> tuple[str, list[str]]:
    """The value of --preset (or the first preset), and the other arguments."""
    name, rest, words = next(iter(presets)), [], iter(argv)
    for word in words:
        if word == "--preset":
            name = next(words, "")
        elif word.startswith("--preset="):
            name = word.split("=", 1)[1]
        else:
            rest.append(word)
    if name not in presets:
        raise UserError(f"--preset {name or '(nothing)'} is not one of {', '.join(presets)}.")
    return name, rest


def set_up() -> None:
    """Several processes find each other; compiled programs are kept for the next start."""
    processes = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(int(os.environ.get(name) or 1) > 1 for name in processes)
    if (several or os.environ.get("RTO_DISTRIBUTED")) and not jax.distributed.is_initialized():
        jax.distributed.initialize()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "rto_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# ---------------------------------------------------------------------------------------------- models


class Model(NamedTuple):
    """A model that an earlier stage or somebody else trained, not loaded yet."""

    source: str
    config: LlamaConfig
    head: str  # "lm", "last" or "token"
    tokenizer: Tokenizer | None  # None: the gold world's vocabulary
    load: Callable[[Any], Params]  # mesh -> parameters on it, float32, a copy of one's own

    @property
    def fingerprint(self) -> str:
        return self.tokenizer.fingerprint if self.tokenizer else GOLD


def open_model(source: str, stage: Stage, flag: str) -> Model:
    """ "gold" (random), "smollm2", a run directory, a Hugging Face folder, or owner/name on the hub."""

    def set_dtype(config):
        return dataclasses.replace(config, dtype=stage.dtype, remat=stage.remat)

    if source == GOLD:
        config = set_dtype(SIZES[GOLD])
        init = programs.init_fn(config, "lm")
        return Model(source, config, "lm", None, lambda mesh: sharded_init(init, mesh, stream(stage.seed, "init")))
    if source == "smollm2":
        config, params = load_smollm2()
        return Model(source, set_dtype(config), "lm", smollm2_tokenizer(), lambda mesh: put_params(params, mesh))
    folder = Path(source)
    if (folder / "model.json").exists():
        return open_run_model(folder, set_dtype)
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        config, params = load_hf(folder)
        named = stage.tokenizer or source
        tokenizer = load_tokenizer(named if Path(named).exists() else download(named, "model"))
        return Model(source, set_dtype(config), "lm", tokenizer, lambda mesh: put_params(params, mesh))
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "runs/")):
        raise UserError(
            f"{flag} {source} holds no model: it has neither a finished run (model.json) nor a Hugging Face "
            "checkpoint (config.json and *.safetensors). Run the stage before first, or point the flag elsewhere."
        )
    return open_model(str(download(source, "model")), stage, flag)


def open_run_model(folder: Path, set_dtype) -> Model:
    try:
        about = json.loads((folder / "model.json").read_text())
        fields = dict(about["config"])
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"]) if fields["rope_scaling"] else None
        config, head, fingerprint = LlamaConfig(**fields), about["head"], about["tokenizer"]
        shift, scale = float(about["shift"]), float(about["scale"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'model.json'} is not a model description ({error!r}).") from None
    tokenizer = None if fingerprint == GOLD else load_tokenizer(folder / "tokenizer")
    if tokenizer and tokenizer.fingerprint != fingerprint:
        raise UserError(f"{folder / 'tokenizer'} is not the tokenizer that {folder / 'model.json'} was trained with.")

    def load(mesh):
        params = restore_params(folder / "checkpoints", programs.abstract_params(config, head, mesh))
        return params if (shift, scale) == (0.0, 1.0) else fold_affine(params, shift, scale)

    return Model(str(folder), set_dtype(config), head, tokenizer, load)


def same_tokenizer(first: Model, *others: tuple[str, Model]) -> None:
    """Raises UserError where another model reads other token ids than the first."""
    for flag, other in others:
        if other.fingerprint != first.fingerprint:
            raise UserError(
                f"the tokenizer of {flag} {other.source} is not that of {first.source}: "
                "its scores would be of other text. Train it with the policy's tokenizer."
            )


def describe_model(out: Path, model: Model, head: str, shift: float = 0.0, scale: float = 1.0) -> None:
    """Writes model.json and tokenizer/: what a later stage needs besides the checkpoint."""
    if jax.process_index():
        return
    if model.tokenizer:
        model.tokenizer.save(out / "tokenizer")
    config = dataclasses.replace(model.config, dtype="float32", remat=False)
    about = {
        "config": dataclasses.asdict(config), "head": head, "tokenizer": model.fingerprint,
        "shift": shift, "scale": scale,
    }  # fmt: skip
    write_json(out / "model.json", about)


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


# ---------------------------------------------------------------------------------------------- a run


class Run(NamedTuple):
    out: Path
    log: MetricsLog
    checkpointer: Checkpointer
    start: int  # steps already done
    state: Any

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, *_) -> None:
        self.log.close(check=kind is None)
        self.checkpointer.close()


def open_run(stage: Stage, name: str, abstract: Any, fresh: Callable[[], Any], batches: Any) -> Run:
    """The run in --out: its last good state and place in the data under --resume, else `fresh()`.

    Raises UserError where --out holds a run and --resume was not given.
    """
    out = Path(stage.out)
    if not stage.resume and (out / "config.json").exists():
        raise UserError(f"--out {out} already holds a run: give --resume to continue it, or another --out.")
    checkpointer = Checkpointer(out / "checkpoints", keep=stage.keep)
    if stage.resume and checkpointer.steps():
        start, state, extra = loops.restore(checkpointer, abstract)
        batches.restore(extra["batches"])
    else:
        start, state = 0, fresh()
    write_config(out, stage)

    def last_good():
        checkpointer.wait()
        return checkpointer.latest_path()

    return Run(out, MetricsLog(out, name, start or None, last_good), checkpointer, start, state)


def numpy_rng(seed: int, purpose: str) -> np.random.Generator:
    """A named NumPy stream, as `rng.stream` is for JAX."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])
