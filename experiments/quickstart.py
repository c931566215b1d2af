"""All stages, then PPO and RTO with the same reward model, critic, learning rates and number of rollouts, and a page.

    python -m experiments.quickstart                                    the embedded world, 3 seeds, about 5 minutes
    python -m experiments.quickstart --preset smollm2 --data DIR        real model, real preferences, about 30 minutes
"""

import dataclasses
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments import dpo, ppo, reward_model, rl, rto, sft
from experiments.common import main, write_json
from experiments.pages import spread, study_page
from experiments.preemption import PREEMPTION
from experiments.presets import ABOUT
from rto_jax.errors import UserError
from rto_jax.metrics import git_commit


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    out: str = ""
    """directory of the study; default: runs/quickstart-DATE-TIME"""
    data: str = ""
    """--data of every stage"""
    seeds: int = 3
    """how often everything is repeated, upstream stages too"""
    resume: bool = False
    """go on with the study in --out: finished stages are kept"""
    controls: bool = True
    """also PPO at lambda = 1, and PPO at the KL penalty that gives RTO's effective temperature"""
    skip_bad_records: bool = False
    """count malformed records and go on"""
    sft: sft.SftConfig
    """supervised fine-tuning"""
    reward_model: reward_model.RewardConfig
    """reward model"""
    dpo: dpo.DpoConfig
    """DPO"""
    ppo: rl.PpoRunConfig
    """PPO; RTO is the same with the DPO term, whatever is changed here"""
    rto: rl.RtoRunConfig
    """RTO: only beta1, dpo-clip, dpo and placement are taken from here"""

    def __post_init__(self):
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}.")
        if self.resume and not self.out:
            raise UserError("--resume needs --out, the study to go on with.")


def arms(config: QuickstartConfig) -> dict[str, rl.PpoRunConfig]:
    """Every RL run of the study. All differ from PPO in what their name says, and in nothing else."""
    common = {f.name: getattr(config.ppo, f.name) for f in dataclasses.fields(config.ppo)}
    own = {name: getattr(config.rto, name) for name in ("beta1", "dpo_clip", "dpo", "placement")}
    found = {"PPO": config.ppo, "RTO": rl.RtoRunConfig(**common | own)}
    if config.controls:
        tempered = config.ppo.beta2 / (1 + config.rto.beta1 / config.ppo.beta2)
        found["PPO, lambda 1"] = dataclasses.replace(config.ppo, ppo=dataclasses.replace(config.ppo.ppo, lam=1.0))
        found[f"PPO, beta2 {tempered:.3g}"] = dataclasses.replace(config.ppo, beta2=tempered)
    return found


def folder_name(arm: str) -> str:
    return arm.lower().replace(",", "").replace(" ", "-")


def run_stage(module, config) -> dict:
    """A stage, unless it is finished: then its figures as they stand."""
    done = Path(config.out) / "results.json"
    if config.resume and done.exists():
        return json.loads(done.read_text())
    return module.run(config)


def run(config: QuickstartConfig) -> Path:
    if not config.out and jax.process_count() > 1:
        raise UserError("--out is missing: several processes may not make up the name, which has the time in it.")
    started, writes = time.time(), jax.process_index() == 0
    out = Path(config.out or time.strftime("runs/quickstart-%Y%m%d-%H%M%S"))
    if not config.out:
        PREEMPTION.command += ["--out", str(out)]
    seconds: dict[str, float] = {}
    figures: dict[str, list[dict]] = {}
    for seed in range(config.seeds):
        base = out / f"seed{seed}"

        def stage(module, name, settings, base=base, seed=seed, **extra):
            begun = time.time()
            settings = dataclasses.replace(
                settings, out=str(base / folder_name(name)), seed=seed, data=config.data or settings.data,
                resume=config.resume, skip_bad_records=config.skip_bad_records or settings.skip_bad_records, **extra,
            )  # fmt: skip
            result = run_stage(module, settings)
            seconds[name] = seconds.get(name, 0.0) + time.time() - begun
            # An RL run reports its baselines too: under their own names, and once.
            results = {name if label in ("PPO", "RTO") else label: x for label, x in result.items()}
            for label, value in (results if module is rl else {name: result}).items():
                found = figures.setdefault(label, [])
                if len(found) <= seed:
                    found.append(value)
                elif isinstance(value, dict):
                    found[seed] |= value
            if writes and (sys.stderr.isatty() or seed == 0):
                print(f"seed {seed}: {name} done in {time.time() - begun:.0f} s", flush=True)

        first = str(base / "sft")
        stage(sft, "SFT", config.sft)
        stage(reward_model, "reward model", config.reward_model, init=first)
        stage(dpo, "DPO", config.dpo, init=first)
        for name, settings in arms(config).items():
            extra = {"dpo": str(base / "dpo")} if isinstance(settings, rl.RtoRunConfig) else {}
            stage(rl, name, settings, sft=first, reward_model=str(base / "reward-model"), **extra)
    facts = {
        "command": " ".join(["python -m experiments.quickstart", *sys.argv[1:]]),
        "git": git_commit(),
        "seconds": round(time.time() - started, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "seeds": config.seeds,
    }
    write_json(out / "results.json", {"facts": facts, "seconds": seconds, "figures": figures})
    page = out / "report.html"
    if writes:
        print_table(figures)
        study_page(out, config, {name: folder_name(name) for name in arms(config)}, figures, seconds, facts)
        print(f"report: {page.resolve()}", flush=True)
    return page


def print_table(figures: dict[str, list[dict]]) -> None:
    """The policies' figures, mean and standard deviation over the seeds."""
    keys = [k for k in ("gold_return", "kl", "J", "share", "score", "length") if any(k in r[0] for r in figures.values())]
    print(f"{'':<18}" + "".join(f"{k:>18}" for k in keys))
    for name, runs in figures.items():
        if any(k in runs[0] for k in keys):
            print(f"{name:<18}" + "".join(f"{spread([r[k] for r in runs]) if k in runs[0] else '':>18}" for k in keys))


def preset(name: str, **extra) -> tuple[str, QuickstartConfig]:
    stages = {m.__name__.rpartition(".")[2]: m.PRESETS[name][1] for m in (sft, reward_model, dpo, ppo, rto)}
    return ABOUT[name], QuickstartConfig(**stages, **extra)


PRESETS = {
    "gold": preset("gold"),
    "smollm2": preset("smollm2", seeds=1, controls=False),
    "smollm2-long": preset("smollm2-long", seeds=1, controls=False),
}

if __name__ == "__main__":
    main(PRESETS, run, __doc__)
