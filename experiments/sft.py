"""Supervised fine-tuning: -log pi(y_t | s_t) on response tokens. Its model is the reference of everything after it.

    python -m experiments.sft                      the embedded world, half a minute on a laptop
    python -m experiments.sft --preset smollm2 --data DIR
"""

from dataclasses import dataclass, field

from experiments.common import describe_model, frozen, main, open_model, to_train, write_json
from experiments.pages import stage_page
from experiments.presets import ABOUT, GOLD, LONG, PAPER, SMOLLM2
from experiments.supervised import SupervisedStage, dry_run, run_supervised
from experiments.tasks import make_task, stream_batches
from rto_jax.models import SIZES
from rto_jax.optim import OptimConfig
from rto_jax.sharding import MeshConfig, make_mesh, put_batch


@dataclass(frozen=True, kw_only=True)
class SftConfig(SupervisedStage):
    model: str = "gold"
    """where to start: "gold", "smollm2", a run directory, a Hugging Face folder, or owner/name on the hub"""
    steps: int = 600
    """updates"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimiser"""


def run(config: SftConfig) -> dict:
    if config.dry_run:
        return dry_run(config, "sft", config.levers(SIZES[config.policy_size]), "lm", config.optim, config.steps)
    mesh = make_mesh(config.mesh)
    model = open_model(config.model, config, "--model")
    task = make_task(config, mesh, model)
    result, params = run_supervised(
        config, "sft", model, "lm", config.optim, config.steps,
        stream_batches(task.examples("train"), config, mesh, config.pack, config.buckets),
        lambda batch: put_batch(batch, mesh), lambda mesh: to_train(model, config, mesh), mesh,
        base=frozen(model.load(mesh), config, mesh) if config.lora.rank else None,
    )  # fmt: skip
    describe_model(result.out, config, model, "lm")
    figures = task.score(model.config, params, config.seed) if model.tokenizer is None else {}
    stage_page(result.out, "Supervised fine-tuning", {"loss": "loss, nats per token"}, figures)
    write_json(result.out / "results.json", figures)  # last: quickstart takes it for the end
    return figures


PRESETS = {
    "gold": (
        ABOUT["gold"],
        SftConfig(out="runs/gold/sft", model="gold", steps=600, batch_size=128, optim=OptimConfig(learning_rate=8e-3), **GOLD),
    ),
    "smollm2": (
        ABOUT["smollm2"],
        SftConfig(out="runs/smollm2/sft", model="smollm2", steps=8, optim=OptimConfig(learning_rate=2e-6), **SMOLLM2),
    ),
    "smollm2-long": (
        ABOUT["smollm2-long"],
        SftConfig(out="runs/smollm2-long/sft", model="smollm2", steps=40, optim=OptimConfig(learning_rate=2e-6), **LONG),
    ),
    # The authors took OpenRLHF's SFT model and give no learning rate; 5e-6 and 256 are OpenRLHF's own.
    "paper": (
        ABOUT["paper"],
        SftConfig(
            out="runs/paper/sft", model="meta-llama/Meta-Llama-3-8B", steps=240, batch_size=256, micro_batches=4,
            mesh=MeshConfig(fsdp=64), optim=OptimConfig(learning_rate=5e-6),
            tokenizer="OpenRLHF/Llama-3-8b-sft-mixture", **PAPER,
        ),
    ),
}  # fmt: skip


if __name__ == "__main__":
    main(PRESETS, run, __doc__)
