"""DPO: -log sigmoid(beta·(log-ratio of chosen - log-ratio of rejected)). Its model gives RTO's token rewards.

    python -m experiments.dpo                      the embedded world, half a minute on a laptop
    python -m experiments.dpo --preset smollm2 --data DIR
"""

from dataclasses import dataclass, field

import jax
import numpy as np

from experiments.common import Stage, describe_model, main, open_model, write_json
from experiments.pages import stage_page
from experiments.presets import ABOUT, GOLD, LONG, PAPER, SMOLLM2
from experiments.supervised import accuracy, dry_run, run_supervised
from experiments.tasks import make_task, map_rows, stream_batches, take
from rto_jax import programs
from rto_jax.losses import implicit_token_rewards
from rto_jax.models import SIZES
from rto_jax.optim import OptimConfig
from rto_jax.sharding import MeshConfig, make_mesh, put_batch
from rto_jax.steps import PairsWithReference


@dataclass(frozen=True, kw_only=True)
class DpoConfig(Stage):
    init: str = "runs/gold/sft"
    """the model to start from, and the frozen reference"""
    beta: float = 0.1
    """strength of the KL constraint"""
    label_smoothing: float = 0.0
    """probability that a label is wrong (cDPO)"""
    steps: int = 512
    """updates"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimiser"""


def run(config: DpoConfig) -> dict:
    options = (("beta", config.beta), ("label_smoothing", config.label_smoothing))
    if config.dry_run:
        return dry_run(config, "dpo", SIZES[config.policy_size], "lm", config.optim, config.steps, options)
    mesh = make_mesh(config.mesh)
    model = open_model(config.init, config, "--init")
    task = make_task(config, mesh, model)
    reference, sums = model.load(mesh), programs.pair_logps(model.config, mesh)

    def place(pairs):
        pairs = put_batch(pairs, mesh)
        return PairsWithReference(pairs, *sums(reference, pairs))

    result, params = run_supervised(
        config, "dpo", model, "lm", config.optim, config.steps, stream_batches(task.pairs("train", model), config),
        place, model.load, mesh, options,
    )  # fmt: skip
    describe_model(result.out, model, "lm")

    def margins(pairs):
        (chosen, rejected), (ref_chosen, ref_rejected) = sums(params, pairs), sums(reference, pairs)
        return (chosen - ref_chosen) - (rejected - ref_rejected)

    figures = {}
    for split in task.evaluation_splits():
        pairs = take(task.pairs(split, model), config.eval_size, config.seed)
        figures[split] = accuracy(map_rows(margins, pairs, config.batch_size, mesh) > 0) | task.pair_facts(split, pairs)
    if model.tokenizer is None:
        figures |= task.score(model.config, params, config.seed)
    write_json(result.out / "heatmap.json", one_pair(task, model, params, reference, config, mesh))
    write_json(result.out / "results.json", figures)
    curves = {"loss": "DPO loss", "accuracy": "accuracy on its batches", "chosen_reward": "implicit reward of chosen",
              "rejected_reward": "implicit reward of rejected"}  # fmt: skip
    stage_page(result.out, "DPO", curves, figures)
    return figures


def one_pair(task, model, params, reference, config: DpoConfig, mesh) -> dict:
    """The implicit token rewards beta·log(pi/pi_ref) of one held-out pair, for the report's heat map."""
    pairs = take(task.pairs(task.evaluation_splits()[0], model), 64, config.seed)
    index = task.telling_pair(pairs)
    logps = programs.response_logps(model.config, mesh)
    panels = {}
    for name, rows in zip(("chosen", "rejected"), pairs, strict=True):
        rows = jax.tree.map(lambda x: np.repeat(x[index : index + 1], config.batch_size, 0), rows)
        batch = put_batch(rows, mesh)
        rewards = implicit_token_rewards(logps(params, batch), logps(reference, batch), batch.mask, beta=config.beta)
        mask = rows.mask[0]
        tokens = task.pieces(rows.tokens[0, -len(mask) :][mask])
        panels[name] = tokens, [float(x) for x in np.asarray(rewards[0])[mask]]
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
