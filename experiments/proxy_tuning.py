"""Proxy tuning as value-guided decoding (From r to Q*, section 5.3): a small DPO pair steers a larger SFT model.

    python -m experiments.proxy_tuning              5 seeds of the embedded world, 20 minutes on 2 cores
    python -m experiments.proxy_tuning --cheap      a minute: one seed, hardly any steps
    python -m experiments.proxy_tuning --draw       from results/proxy_tuning/gold.json alone

π ∝ π_base · (π_proxy/π_ref)^α (arXiv 2404.12358, eq. 14): the small DPO model over its small reference is exp(A*/β), so the
large model, which no preference has trained, is guided by an advantage function. The paper reads proxy tuning and emulated
fine-tuning this way and gives no numbers. What would bear it out: on the large SFT model α = 1 does about what the large
model's own DPO does, and better than the small DPO model itself.

Beside it the same pair on its own reference, where α = 1 is the small DPO model, and any other α is DPO at β/α without
training: what α alone does. The large model has LARGE's sizes, 8 times the parameters; each DPO has pairs of its own SFT
model's answers. All answer the same prompts with the same random numbers.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments import sft
from experiments.common import Model, open_model
from experiments.likelihoods import learn
from experiments.study import (
    COLOURS,
    KEYS,
    MARKERS,
    PRESETS,
    Arm,
    Table,
    base_arms,
    column,
    command,
    drawing,
    interval,
    markdown,
    numbers,
    over_seeds,
    runs,
    shown,
)  # fmt: skip
from experiments.tasks import make_task, map_rows, take
from rto_jax import gold, programs
from rto_jax.models import SIZES, LlamaConfig, language_model
from rto_jax.proxy_tuning import ProxyParams, ProxyTuned
from rto_jax.rng import stream
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.sharding import batch_sharding, make_mesh
from rto_jax.train_state import sharded_init
from rto_jax.types import prompt_length

STAGE = "experiments.proxy_tuning"
ALPHAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
LARGE = dict(width=64, layers=4, heads=4, kv_heads=4, mlp_width=192, unroll=4)
BASES = ("large SFT", "small SFT")
AXES = {"gold_return": "gold return", "kl": "KL to the data policy, nats", "J": "objective J", "share": "share of the optimum", "length": "length"}


@dataclass(frozen=True, kw_only=True)
class LargeConfig(sft.SftConfig):
    """SFT of a random model of the gold world with LARGE's sizes."""


def run(config: LargeConfig) -> dict:
    sizes = dataclasses.replace(SIZES["gold"], **LARGE)

    def draw(mesh):
        return sharded_init(programs.init_fn(sizes, "lm"), mesh, stream(config.seed, "init"))

    model = Model("gold", config.levers(sizes), "lm", None, draw, f"large gold, seed {config.seed}")
    return learn(config, model, lambda task: task.examples("train"))


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    large = Arm(STAGE, LargeConfig(**vars(base["SFT"].config)))
    return {"small SFT": base["SFT"], "small DPO": base["DPO"], "large SFT": large, "large DPO": base["DPO"].after(init=large)}


@functools.cache
def steering(base: LlamaConfig, pair: LlamaConfig, length: int, mesh):
    """Programs: ProxyParams, (prompts, key data [B]) -> an answer each; ProxyParams, Sequences -> logits [B, T, V]."""
    model, rows = ProxyTuned(language_model(base, mesh), language_model(pair, mesh)), batch_sharding(mesh)

    def answer(params, batch):
        prompts, keys = batch[0], jax.random.wrap_key_data(batch[1])
        return sample(model, params, prompts, keys, config=SamplingConfig(length), eos_id=gold.EOS, pad_id=gold.PAD)[0]

    def logits(params, seqs):
        return model.logits(params, seqs.tokens, seqs.valid, prompt_length(seqs))

    return jax.jit(answer, out_shardings=rows), jax.jit(logits, out_shardings=rows)


def steered(arms: dict[str, Arm], base: Path, seed: int, name: str, alphas=ALPHAS) -> list[dict[str, float]]:
    """The exact score, with KEYS, of model `name` steered by the small pair, for each α."""
    stage = dataclasses.replace(arms[name].config, out="", seed=seed)
    mesh = make_mesh(stage.mesh)
    models = [open_model(str(base / f"seed{seed}" / arms[x].folder), stage, "--runs") for x in (name, "small DPO", "small SFT")]
    task = make_task(stage, mesh, models[0])
    weights = [model.load(mesh) for model in models]
    answer, logits = steering(models[0].config, models[1].config, task.world.horizon, mesh)
    prompts = take(task.prompts("test"), stage.gold.rollouts, seed)
    keys = np.asarray(jax.random.key_data(jax.random.split(stream(seed, "sample"), len(prompts.tokens))))
    size, found = min(1024, len(keys)), []
    for alpha in alphas:
        params = ProxyParams(*weights, np.float32(alpha))
        seqs = map_rows(functools.partial(answer, params), (prompts, keys), size, mesh)
        at = map_rows(functools.partial(logits, params), seqs, size, mesh)
        score = task.world.score(at, prompts.tokens, seqs.tokens[:, gold.PROMPT_LENGTH :], seqs.mask)
        found.append({key: score[key] for key in KEYS})
    return found


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    sweeps = {name: [steered(arms, base, seed, name) for seed in numbers(seeds)] for name in BASES}
    return {"alphas": ALPHAS, "arms": runs(arms, base, seeds), "steered": sweeps}


def draw(found: dict, folder: Path) -> str:
    alphas, table = found["alphas"], found["arms"]
    of = lambda name, key: np.array([[row[key] for row in run] for run in found["steered"][name]])  # noqa: E731
    with drawing(folder / "gold.svg", 4, 3.1) as panels:
        for panel, key in zip(panels, ("gold_return", "kl", "share", "length"), strict=True):
            for number, name in enumerate(BASES):
                values, colour = of(name, key), COLOURS[number]
                panel.plot(alphas, values.mean(0), color=colour, marker=MARKERS[number], ms=4, label=f"small pair on {name}")
                panel.fill_between(alphas, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
            for name, style, number in (("large DPO", "--", 0), ("small DPO", ":", 1)):
                panel.axhline(np.mean(column(table, name, key)), color=COLOURS[number], ls=style, lw=1.2, label=name)
            panel.set(title=AXES[key], xlabel="α")
        panels[0].legend()
    rows = [[name, *(shown(interval(column(table, name, key)), 3 if key == "share" else 2) for key in AXES)] for name in table]
    rows += [
        [f"small pair on {name}, α = {alpha:g}", *(shown(interval(list(of(name, key)[:, at])), 3 if key == "share" else 2) for key in AXES)]
        for name in BASES
        for at, alpha in enumerate(alphas)
    ]
    text = markdown(("policy", *AXES.values()), rows) + over_seeds(len(table["large SFT"]))
    one = list(of("large SFT", "share")[:, alphas.index(1.0)])
    text += "\n\nShare of the optimum of the large SFT model steered at α = 1:\n"
    for name in ("large DPO", "small DPO", "large SFT"):
        gap = interval(one, column(table, name, "share"))
        way = "undecided against" if not gap.low > 0 and not gap.high < 0 else "above" if gap.low > 0 else "below"
        text += f"\n- {way} {name}: {shown(gap, 3)}"
    gained = [(x - a) / (b - a) for x, a, b in zip(one, column(table, "large SFT", "share"), column(table, "large DPO", "share"), strict=True)]
    return text + f"\n\nIt has {shown(interval(gained))} of what the large model's own DPO gains over its SFT."


TABLE = Table("proxy_tuning", arms, collect, draw)

if __name__ == "__main__":
    from experiments import proxy_tuning  # by its own name, which the runs' configurations go by

    command(proxy_tuning.TABLE, __doc__, {"gold": PRESETS["gold"]})
