"""DPO: -log sigmoid(beta·(log-ratio of chosen - log-ratio of rejected)), or another loss over pairs (--loss).

Its model gives RTO's token rewards.

    python -m experiments.dpo                      the embedded world, half a minute on a laptop
    python -m experiments.dpo --loss simpo --beta 10 --gamma 0.5
    python -m experiments.dpo --preset smollm2 --data DIR
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax
import numpy as np

from experiments.common import describe_model, frozen, main, open_model, to_train, write_json
from experiments.pages import stage_page
from experiments.presets import ABOUT, GOLD, LONG, PAPER, SMOLLM2
from experiments.supervised import SupervisedStage, accuracy, dry_run, run_supervised
from experiments.tasks import make_task, map_rows, stream_batches, take
from rto_jax import programs
from rto_jax.errors import UserError
from rto_jax.losses import implicit_token_rewards
from rto_jax.models import SIZES
from rto_jax.optim import OptimConfig
from rto_jax.sharding import MeshConfig, make_mesh, put_batch, put_whole, to_host
from rto_jax.steps import PAIR_LOSSES, PairsWithReference, own_rewards


@dataclass(frozen=True, kw_only=True)
class DpoConfig(SupervisedStage):
    freezes: ClassVar[bool] = True
    init: str = "runs/gold/sft"
    """the model to start from, and the frozen reference"""
    loss: Literal[tuple(PAIR_LOSSES)] = "dpo"
    """what is minimised (rto_jax/losses/preference.py); simpo, orpo and cpo have no reference, and kto is that of pairs"""
    beta: float = 0.1
    """strength of the KL constraint; of simpo, the scale of the mean log-probabilities; of orpo, λ"""
    label_smoothing: float = 0.0
    """dpo (then it is cDPO), cpo: probability that a label is wrong"""
    alpha: float | None = None
    """r_dpo: reward charged per token; tdpo2: weight of the two KLs' difference; cpo: weight of the SFT term"""
    gamma: float | None = None
    """simpo: margin, in log-odds"""
    steps: int = 512
    """updates"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimiser"""

    def __post_init__(self):
        super().__post_init__()
        takes = PAIR_LOSSES[self.loss].takes
        for name, unset, high in (("label_smoothing", 0.0, 0.5), ("alpha", None, np.inf), ("gamma", None, np.inf)):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if name in takes and value is None:
                raise UserError(f"--loss {self.loss} needs {flag}.")
            if name not in takes and value != unset:
                raise UserError(f"{flag} {value} has no effect: --loss {self.loss} does not take it.")
            if value is not None and not 0 <= value <= high:
                raise UserError(f"{flag} must be at least 0{f' and at most {high}' * (high < np.inf)}, not {value}.")
        if not self.beta > 0:
            raise UserError(f"--beta must be positive, not {self.beta}.")
        if self.loss == "kto" and (self.micro_batches > 1 or self.pack):
            raise UserError("--loss kto compares with means over the whole batch: it takes --micro-batches 1 and --pack 0.")

    @property
    def options(self) -> programs.Options:
        """Keywords of the step's objective."""
        return ("loss", self.loss), ("beta", self.beta), *((n, getattr(self, n)) for n in PAIR_LOSSES[self.loss].takes)


def run(config: DpoConfig, sampler: str = "") -> dict:
    """sampler: the model whose answers the pairs of the embedded world are of; default: --init."""
    options, loss = config.options, PAIR_LOSSES[config.loss]
    if config.dry_run:
        return dry_run(config, "dpo", config.levers(SIZES[config.policy_size]), "lm", config.optim, config.steps, options)
    mesh = make_mesh(config.mesh)
    model = open_model(config.init, config, "--init")
    task = make_task(config, mesh, model)
    answering = open_model(sampler, config, "--sampler") if sampler else model
    sums = programs.pair_logps(model.config, mesh)
    load = lambda: frozen(model.load(mesh), config, mesh)  # noqa: E731
    reference = load() if loss.has_reference or config.lora.rank else None
    base = reference if config.lora.rank else {"reference": reference} if "kl" in loss.reads else None

    def place(pairs):
        pairs = put_batch(pairs, mesh)
        return PairsWithReference(pairs, *sums(reference, pairs)) if "reference" in loss.reads else pairs

    result, params = run_supervised(
        config, "dpo", model, "lm", config.optim, config.steps,
        stream_batches(task.pairs("train", answering), config, mesh, config.pack, config.buckets),
        place, lambda mesh: to_train(model, config, mesh), mesh, options, base,
    )  # fmt: skip
    describe_model(result.out, config, model, "lm")
    reference = reference or load()

    def margins(pairs):
        """Of log pi/pi_ref, and of what the loss itself ranks by."""
        ours, (ref_chosen, ref_rejected) = sums(params, pairs), sums(reference, pairs)
        ratios = ours[0] - ref_chosen, ours[1] - ref_rejected
        own = ratios if loss.has_reference else own_rewards(config.loss, ours, pairs)
        return ratios[0] - ratios[1], own[0] - own[1]

    figures = {}
    for split in task.evaluation_splits():
        pairs = take(task.pairs(split, answering), config.eval_size, config.seed)
        of_ratio, of_own = map_rows(margins, pairs, config.batch_size, mesh)
        figures[split] = accuracy(of_own > 0) | {"log_ratio_accuracy": float((of_ratio > 0).mean())}
        figures[split] |= task.pair_facts(split, pairs)
    if model.tokenizer is None:
        figures |= task.score(model.config, params, config.seed)
    write_json(result.out / "heatmap.json", one_pair(task, model, answering, params, reference, config, mesh))
    name = config.loss.upper().replace("_", "-")
    curves = {"loss": f"{name} loss", "accuracy": "accuracy on its batches", "chosen_reward": "implicit reward of chosen",
              "rejected_reward": "implicit reward of rejected"}  # fmt: skip
    stage_page(result.out, name, curves, figures)
    write_json(result.out / "results.json", figures)  # last: quickstart takes it for the end
    return figures


def one_pair(task, model, answering, params, reference, config: DpoConfig, mesh) -> dict:
    """The implicit token rewards beta·log(pi/pi_ref) of one held-out pair, for the report's heat map."""
    pairs = take(task.pairs(task.evaluation_splits()[0], answering), 64, config.seed)
    index = task.telling_pair(pairs)
    logps = programs.response_logps(model.config, mesh)
    panels = {}
    for name, rows in zip(("chosen", "rejected"), pairs, strict=True):
        rows = jax.tree.map(lambda x: np.repeat(x[index : index + 1], config.batch_size, 0), rows)
        batch = put_whole(rows, mesh)
        ours, theirs = logps(params, batch), logps(reference, batch)
        rewards = to_host(implicit_token_rewards(ours, theirs, batch.mask, beta=config.beta))
        mask = rows.mask[0]
        tokens = task.pieces(rows.tokens[0, -len(mask) :][mask])
        panels[name] = tokens, [float(x) for x in rewards[0][mask]]
        panels |= task.exact_panels(name, tokens, jax.tree.map(lambda x: x[:1], rows))
    start = pairs.chosen.tokens.shape[1] - pairs.chosen.mask.shape[1]
    prompt = pairs.chosen.tokens[index, :start][pairs.chosen.valid[index, :start]]
    return {"prompt": task.prompt_text(prompt), "panels": panels, "note": task.HEATMAP_NOTE}


PRESETS = {
    "gold": (
        ABOUT["gold"],
        DpoConfig(out="runs/gold/dpo", beta=0.5, steps=512, batch_size=64, optim=OptimConfig(learning_rate=2e-3), **GOLD),
    ),
    "smollm2": (
        ABOUT["smollm2"],
        DpoConfig(
            out="runs/smollm2/dpo", init="runs/smollm2/sft", steps=24, optim=OptimConfig(learning_rate=5e-6), **SMOLLM2
        ),
    ),
    "smollm2-long": (
        ABOUT["smollm2-long"],
        DpoConfig(
            out="runs/smollm2-long/dpo", init="runs/smollm2-long/sft", steps=150, optim=OptimConfig(learning_rate=5e-6),
            **LONG,
        ),
    ),
    "paper": (
        ABOUT["paper"],
        DpoConfig(
            out="runs/paper/dpo", init="OpenRLHF/Llama-3-8b-sft-mixture", beta=0.1, steps=239, batch_size=256,
            micro_batches=4, mesh=MeshConfig(fsdp=64), optim=OptimConfig(learning_rate=5e-7), **PAPER,
        ),
    ),
}  # fmt: skip


if __name__ == "__main__":
    main(PRESETS, run, __doc__)
