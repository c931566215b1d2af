"""What every stage shares: its configuration, its command line, models from earlier stages, its run directory."""

import contextlib
import dataclasses
import errno
import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
import tyro

from experiments.preemption import PREEMPTION
from rto_jax import hosts, loops, programs
from rto_jax.checkpoint import Checkpointer, restore_params
from rto_jax.data import Lengths, Tokenizer, download, load_tokenizer, smollm2_tokenizer
from rto_jax.errors import UserError
from rto_jax.metrics import MetricsLog, write_config
from rto_jax.models import (
    SIZES,
    LlamaConfig,
    LoraConfig,
    RopeScaling,
    fold_affine,
    freeze,
    init_adapters,
    load_hf,
    load_smollm2,
    merge,
    rescaled,
    thaw,
)  # fmt: skip
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
    """folder with {train,test,...}.jsonl[.gz], a file, or owner/name on the Hugging Face hub; the gold world needs none; digits: pictures (rto_jax/digits.py)"""
    seed: int = 0
    """of initialisation, data order and sampling"""
    resume: bool = False
    """continue the run in --out exactly where its last good checkpoint stands"""
    dry_run: bool = False
    """build every program and check every shape and sharding abstractly, then stop: no weights, no data"""
    skip_bad_records: bool = False
    """count malformed records and go on, instead of stopping at the first"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """compute dtype; norms, softmax and log-probabilities are float32 whatever it is"""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype that trained parameters are kept in; in bfloat16 every update is rounded up or down at random"""
    frozen_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """what parameters that are not trained are kept in: reference, DPO and reward model, and the base under adapters"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """train adapters over frozen weights instead of the weights"""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """back end of attention: splash (Pallas, TPU), cudnn (NVIDIA GPU, 16-bit dtype) or xla; auto takes the device's fastest"""
    remat: Literal["none", "full", "attention", "dots", "offload"] = "none"
    """what the backward pass computes again: all of a block, all but attention's output, all but products with
    weights, or nothing; offload is attention, with what is kept in the host's memory"""
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

    freezes: ClassVar[bool] = False  # whether the stage holds a model that it doesn't train

    def levers(self, config: LlamaConfig) -> LlamaConfig:
        """A model's sizes, with what the flags say of its dtypes, memory and adapters."""
        return dataclasses.replace(
            config, dtype=self.dtype, param_dtype=self.param_dtype, attention=self.attention, remat=self.remat, lora=self.lora
        )

    def __post_init__(self):
        if self.batch_size < 1 or self.micro_batches < 1:
            raise UserError("--batch-size and --micro-batches must be at least 1.")
        if self.frozen_dtype != "float32" and not (self.freezes or self.lora.rank):
            raise UserError(f"--frozen-dtype {self.frozen_dtype} has no effect: without --lora.rank this stage trains all.")
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
        again = ["--resume"] if hasattr(config, "resume") else []  # a study goes on without being told
        module = f"experiments.{Path(sys.argv[0]).stem}"
        with PREEMPTION.caught(["python", "-m", module, *(x for x in argv if x != "--resume"), *again]):
            run(config)
    except loops.Stopped as where:
        if jax.process_index() == 0:
            print(PREEMPTION.line(f" {where}"), file=sys.stderr)
    except UserError as error:
        hosts.stop(2, f"error: {error}", str(error))
    except KeyboardInterrupt:
        hosts.stop(130, "stopped; --resume continues from the last checkpoint", "interrupted")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hosts.stop(1, "", f"{error!r:.300}", error)
        cause = f"{error.filename or f'--out {config.out}'}: {error.strerror}; --resume continues from the last checkpoint"
        hosts.stop(2, f"error: {cause}", cause)
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            cause = f"the device's memory is too small ({str(error).partition(': ')[2].partition(' [')[0].splitlines()[0]})"
            more = "; a run needs less with more --micro-batches or --remat full, tables with fewer --jobs"
            hosts.stop(2, f"error: {cause}{more}; --resume continues from the last checkpoint", cause)
        hosts.stop(1, "", f"{error!r:.300}", error)


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
    hosts.join()
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
    load: Callable[[Any], Params]  # mesh -> parameters on it, float32, a copy of one's own; adapters are merged in
    identity: str = ""  # of its weights: another text, other weights
    base: str | None = None  # the identity of the model that it is adapters over, if it is
    adapters: LoraConfig = LoraConfig()  # how these were trained
    own: Callable[[Any], Params] | None = None  # mesh -> these and its scalar head, scaled for config.lora; a copy

    @property
    def fingerprint(self) -> str:
        return self.tokenizer.fingerprint if self.tokenizer else GOLD


def open_model(source: str, stage: Stage, flag: str) -> Model:
    """ "gold" (random), "smollm2", a run directory, a Hugging Face folder, or owner/name on the hub."""
    if source == GOLD:
        config = SIZES[GOLD]
        init = programs.init_fn(config, "lm")

        def draw(mesh):
            return sharded_init(init, mesh, stream(stage.seed, "init"))

        return Model(source, stage.levers(config), "lm", None, draw, f"gold, seed {stage.seed}")
    if source == "smollm2":
        config, params = load_smollm2()
        put = lambda mesh: put_params(params, mesh)  # noqa: E731
        return Model(source, stage.levers(config), "lm", smollm2_tokenizer(), put, source)
    folder = Path(source)
    if (folder / "model.json").exists():
        return open_run_model(folder, stage)
    if (folder / "config.json").exists() and (files := sorted(folder.glob("*.safetensors"))):
        config, params = load_hf(folder)
        named = stage.tokenizer or source
        tokenizer = load_tokenizer(named if Path(named).exists() else download(named, "model"))
        put = lambda mesh: put_params(params, mesh)  # noqa: E731
        identity = _digest(folder / "config.json", *(f"{file.name} {file.stat().st_size}" for file in files))
        return Model(source, stage.levers(config), "lm", tokenizer, put, identity)
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "runs/")):
        raise UserError(
            f"{flag} {source} holds no model: it has neither a finished run (model.json) nor a Hugging Face "
            "checkpoint (config.json and *.safetensors). Run the stage before first, or point the flag elsewhere."
        )
    return open_model(str(download(source, "model")), stage, flag)


def _digest(*parts: Path | str) -> str:
    """One short text for all: of files their content counts."""
    texts = (part.read_text() if isinstance(part, Path) else part for part in parts)
    return sha256("\n".join(texts).encode()).hexdigest()[:16]


def _lora_config(fields: dict) -> LoraConfig:
    return LoraConfig(**fields | {"targets": tuple(fields["targets"])})


def open_run_model(folder: Path, stage: Stage) -> Model:
    try:
        about = json.loads((folder / "model.json").read_text())
        fields = dict(about["config"])
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"]) if fields["rope_scaling"] else None
        # Before the policies of remat had names it was true or false.
        fields["remat"] = {True: "full", False: "none"}.get(fields["remat"], fields["remat"])
        fields["lora"] = _lora_config(fields["lora"]) if "lora" in fields else LoraConfig()
        config, head, fingerprint = LlamaConfig(**fields), about["head"], about["tokenizer"]
        shift, scale = float(about["shift"]), float(about["scale"])
        base = about.get("base")
        if base:
            base = (*(str(base[key]) for key in ("source", "identity", "dtype")), int(base["seed"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'model.json'} is not a model description ({error!r}).") from None
    tokenizer = None if fingerprint == GOLD else load_tokenizer(folder / "tokenizer")
    if tokenizer and tokenizer.fingerprint != fingerprint:
        raise UserError(f"{folder / 'tokenizer'} is not the tokenizer that {folder / 'model.json'} was trained with.")

    def restore(abstract):
        params = restore_params(folder / "checkpoints", abstract)
        return params if (shift, scale) == (0.0, 1.0) else fold_affine(params, shift, scale)

    sizes = stage.levers(dataclasses.replace(config, lora=LoraConfig()))
    sums = sorted((folder / "checkpoints").glob("[0-9]*/files.json"), key=lambda file: int(file.parent.name))
    identity = _digest(folder / "model.json", *sums[-1:])
    if base is None:
        load = lambda mesh: restore(programs.abstract_params(config, head, mesh))  # noqa: E731
        return Model(str(folder), sizes, head, tokenizer, load, identity)

    source, wanted, dtype, seed = base
    source = os.path.normpath(folder / source) if (folder / source).is_dir() else source
    under = open_model(source, dataclasses.replace(stage, seed=seed), f"the base of the adapters in {folder},")
    if under.identity != wanted:
        raise UserError(f"{folder} holds adapters over {source}, which has changed since then: train them again.")

    def adapters(mesh):
        return restore(programs.abstract_trained(config, head, mesh))

    def own(mesh):
        return rescaled(adapters(mesh), stage.lora.scale / config.lora.scale)

    def load(mesh):
        def whole(weights, trained):
            weights = merge(config, thaw(freeze(weights, dtype)) | trained)
            return {name: tree for name, tree in weights.items() if head == "lm" or name != "lm_head"}

        return sharded_init(whole, mesh, under.load(mesh), adapters(mesh))

    return Model(str(folder), sizes, head, tokenizer, load, identity, under.identity, config.lora, own)


def frozen(params: Params, stage: Stage, mesh) -> Params:
    """Parameters that the stage won't train, in --frozen-dtype."""
    if stage.frozen_dtype == "float32":
        return params
    return sharded_init(lambda p: freeze(p, stage.frozen_dtype), mesh, params)


def to_train(model: Model, stage: Stage, mesh) -> Params:
    """What the stage trains of it: the whole of it or, with --lora.rank, new adapters over it."""
    if not stage.lora.rank:
        return model.load(mesh)
    return sharded_init(lambda key: init_adapters(model.config, key), mesh, stream(stage.seed, "lora"))


def same_tokenizer(first: Model, *others: tuple[str, Model]) -> None:
    """Raises UserError where another model reads other token ids than the first."""
    for flag, other in others:
        if other.fingerprint != first.fingerprint:
            raise UserError(
                f"the tokenizer of {flag} {other.source} is not that of {first.source}: "
                "its scores would be of other text. Train it with the policy's tokenizer."
            )


def same_size(sft: Model, *others: tuple[str, Model]) -> None:
    """Raises UserError where another model is no language model of the size of --sft."""
    for flag, other in others:
        if (other.head, other.config) != ("lm", sft.config):
            raise UserError(f"{flag} {other.source} is not a language model of the size of --sft {sft.source}.")


def describe_model(
    out: Path, stage: Stage, model: Model, head: str, shift: float = 0.0, scale: float = 1.0
) -> None:
    """Writes model.json and tokenizer/: what a later stage needs besides the checkpoint. Every process may then read it."""
    if model.tokenizer and jax.process_index() == 0:
        model.tokenizer.save(out / "tokenizer")
    config = dataclasses.replace(model.config, dtype="float32", param_dtype="float32", attention="auto", remat="none")
    about = {
        "config": dataclasses.asdict(config), "head": head, "tokenizer": model.fingerprint,
        "shift": shift, "scale": scale,
    }  # fmt: skip
    if stage.lora.rank:
        # A folder is named as seen from here, so that the two can move together.
        source = os.path.relpath(model.source, out) if Path(model.source).is_dir() else model.source
        base = {"source": source, "seed": stage.seed, "dtype": stage.frozen_dtype, "identity": model.identity}
        about["base"] = base
    write_json(out / "model.json", about)
    hosts.wait_for_all()


def write_json(path: Path, value) -> None:
    """Whole or not at all, by process 0."""
    if jax.process_index():
        return
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
        with contextlib.ExitStack() as stack:  # each, whatever the one before raises
            stack.callback(self.checkpointer.close)
            stack.callback(self.log.close, check=kind is None)
        if kind is None:
            PREEMPTION.left()


def open_run(stage: Stage, name: str, abstract: Any, fresh: Callable[[], Any], batches: Any) -> Run:
    """The run in --out: its last good state and place in the data under --resume, else `fresh()`.

    Raises UserError where --out holds a run and --resume was not given.
    """
    out = Path(stage.out)
    if not stage.resume and (out / "config.json").exists():
        raise UserError(f"--out {out} already holds a run: give --resume to continue it, or another --out.")
    checkpointer = Checkpointer(out / "checkpoints", keep=stage.keep)
    hosts.check_shared(out, "--out")
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
