"""The reward model: Bradley–Terry (RTO eq. 2.2) on preferences, from the SFT model's trunk and a new head.

    python -m experiments.reward_model             the embedded world, half a minute on a laptop
    python -m experiments.reward_model --preset smollm2 --data DIR
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from experiments.common import describe_model, frozen, main, open_model, to_train, write_json
from experiments.pages import stage_page
from experiments.presets import ABOUT, GOLD, LONG, PAPER, SMOLLM2
from experiments.supervised import SupervisedStage, accuracy, dry_run, run_supervised
from experiments.tasks import make_task, map_rows, stream_batches, take
from rto_jax import programs
from rto_jax.models import SIZES, with_head
from rto_jax.optim import OptimConfig
from rto_jax.rng import stream
from rto_jax.sharding import MeshConfig, make_mesh, put_batch
from rto_jax.train_state import sharded_init


@dataclass(frozen=True, kw_only=True)
class RewardConfig(SupervisedStage):
    init: str = "runs/gold/sft"
    """whose trunk to start from; also where the gold world's pairs are sampled from"""
    head: Literal["last", "token"] = "token"
    """"last": one number at the last token; "token": a sum over the answer's tokens, as DPO's reward is"""
    normalise: Literal["no", "shift", "standardise"] = "shift"
    """afterwards: scores of held-out answers get mean 0 (shift), and standard deviation 1 too (standardise)"""
    steps: int = 512
    """updates"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimiser"""


def run(config: RewardConfig) -> dict:
    if config.dry_run:
        return dry_run(config, "reward", config.levers(SIZES[config.reward_size]), config.head, config.optim, config.steps)
    mesh = make_mesh(config.mesh)
    model = open_model(config.init, config, "--init")
    task = make_task(config, mesh, model)

    def initial(mesh):
        trunk, key = to_train(model, config, mesh), stream(config.seed, "head")
        zero = config.head == "token"  # starts at no opinion, since an answer's many terms would add up at random
        return sharded_init(lambda p, k: with_head(p, model.config, k, config.head, zero=zero), mesh, trunk, key)

    result, params = run_supervised(
        config, "reward", model, config.head, config.optim, config.steps,
        stream_batches(task.pairs("train", model), config, mesh, config.pack, config.buckets),
        lambda batch: put_batch(batch, mesh), initial, mesh,
        base=frozen(model.load(mesh), config, mesh) if config.lora.rank else None,
    )  # fmt: skip

    score = programs.scores(model.config, config.head, mesh)
    figures, scores = {}, None
    for split in task.evaluation_splits():
        pairs = take(task.pairs(split, model), config.eval_size, config.seed)
        both = [map_rows(lambda rows: score(params, rows), rows, config.batch_size, mesh) for rows in pairs]
        figures[split] = accuracy(both[0] > both[1]) | task.pair_facts(split, pairs)
        scores = np.concatenate(both) if scores is None else scores
    shift = float(scores.mean()) if config.normalise != "no" else 0.0
    scale = float(scores.std()) if config.normalise == "standardise" else 1.0
    describe_model(result.out, config, model, config.head, shift, scale)
    stage_page(result.out, "Reward model", {"loss": "Bradley–Terry loss", "accuracy": "accuracy on its batches"}, figures)
    write_json(result.out / "results.json", figures)  # last: quickstart takes it for the end
    return figures


PRESETS = {
    "gold": (
        ABOUT["gold"],
        RewardConfig(out="runs/gold/reward_model", steps=512, batch_size=64, optim=OptimConfig(learning_rate=4e-3), **GOLD),
    ),
    "smollm2": (
        ABOUT["smollm2"],
        RewardConfig(
            out="runs/smollm2/reward_model", init="runs/smollm2/sft", head="last", normalise="standardise", steps=24,
            optim=OptimConfig(learning_rate=2e-5), **SMOLLM2,
        ),
    ),
    "smollm2-long": (
        ABOUT["smollm2-long"],
        RewardConfig(
            out="runs/smollm2-long/reward_model", init="runs/smollm2-long/sft", head="last", normalise="standardise",
            steps=150, optim=OptimConfig(learning_rate=2e-5), **LONG,
        ),
    ),
    "paper": (
        ABOUT["paper"],
        RewardConfig(
            out="runs/paper/reward_model", init="meta-llama/Llama-3.2-1B-Instruct", head="last", normalise="standardise",
            steps=478, batch_size=128, mesh=MeshConfig(fsdp=64), optim=OptimConfig(learning_rate=1e-6),
            tokenizer="OpenRLHF/Llama-3-8b-sft-mixture", **PAPER,
        ),
    ),
}  # fmt: skip


if __name__ == "__main__":
    main(PRESETS, run, __doc__)
