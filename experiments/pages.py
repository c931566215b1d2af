"""The pages that people look at: report.html of a stage, and of a whole study. Drawn from the run's files alone."""

import json
import platform
import statistics
from pathlib import Path

import jax

from rto_jax import gold
from rto_jax.report import Report

Figures = dict[str, list[dict]]


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(runs: list[list[dict]], key: str, scale: float = 1.0) -> tuple[list[float], list[list[float]]]:
    """(x, one curve per run) of the lines that have `key`."""
    x = [scale * line["step"] for line in runs[0] if key in line]
    return x, [[line[key] if line[key] is not None else float("nan") for line in run if key in line] for run in runs]


def spread(values: list[float], digits: int = 3) -> str:
    """mean ± standard deviation over the seeds; one seed has no spread."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def with_error(runs: list[dict], key: str, digits: int = 3) -> str:
    """A figure over the seeds; of one seed, with the standard error of its rows where that is known."""
    text = spread([run[key] for run in runs], digits)
    error = runs[0].get(f"{key}_se")
    return f"{text} (SE {error:.{digits}f})" if len(runs) == 1 and error is not None else text


def hardware() -> str:
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform}), {platform.machine()}, jax {jax.__version__}"


def accuracy_text(runs: list[dict]) -> str:
    """Accuracy over the seeds; one seed: ± the standard error of its pairs."""
    if len(runs) > 1:
        return spread([run["accuracy"] for run in runs])
    return f"{runs[0]['accuracy']:.3f} (SE {runs[0]['se']:.3f})"


def accuracy_rows(stages: dict[str, list[dict]]) -> list[list[str | None]]:
    rows = []
    for stage, runs in stages.items():
        for split, figures in runs[0].items():
            if isinstance(figures, dict) and "accuracy" in figures:
                parts = [run[split] for run in runs]
                limit = "ceiling" if "ceiling" in figures else "longer_answer"
                note = ("gold reward itself" if limit == "ceiling" else "always the longer answer") + " "
                rows.append(
                    [f"{stage}, {split}", accuracy_text(parts), str(figures["n"]), note + spread([p[limit] for p in parts])]
                )
    return rows


ACCURACY = ("model and pairs", "accuracy", "pairs", "to compare with")


def draw_heatmap(report: Report, folder: Path) -> None:
    file = folder / "heatmap.json"
    if not file.exists():
        return
    data = json.loads(file.read_text())
    report.heatmap(
        "Token by token: where DPO sees the reward of one pair",
        {name: tuple(panel) for name, panel in data["panels"].items()},
        prompt=data["prompt"], unit="reward", note=data["note"],
    )  # fmt: skip


def read_samples(folder: Path) -> list[dict]:
    file = folder / "samples.json"
    return json.loads(file.read_text()) if file.exists() else []


def stage_page(out: Path, title: str, curves: dict[str, str], figures: dict) -> None:
    """out/report.html of one stage: the curves that its metrics hold, and its figures."""
    if jax.process_index():
        return
    lines, config = read_metrics(out), json.loads((out / "config.json").read_text())
    report = Report(title, str(out))
    for key, label in curves.items():
        x, values = series([lines], key)
        if x:
            report.curves(label, {title: values}, x, xlabel="step", ylabel=key)
    rows = accuracy_rows({title: [figures]})
    if rows:
        report.table("Accuracy on held-out pairs", ACCURACY, rows)
    rows = [[name, f"{value:.4g}"] for name, value in figures.items() if isinstance(value, int | float)]
    if rows:
        report.table("Figures at the end", ("figure", "value"), rows)
    draw_heatmap(report, out)
    if samples := read_samples(out):
        report.samples("Sampled texts", [(s["prompt"], s["texts"]) for s in samples])
    report.facts(
        {
            "command": " ".join(config["command"]),
            "commit": config["git"]["commit"],
            "hardware": hardware(),
            "seed": config["config"]["seed"],
            "seconds": lines[-1]["time_s"],
        }
    )
    report.write(out / "report.html")


GOLD_CURVES = {
    "eval_share": ("Share of the exact optimum", "share", ("the optimum", 1.0)),
    "eval_gold_return": ("Gold return", "reward", "gold"),
    "eval_kl": ("KL to the data policy", "nats per response", "kl"),
    "score": ("Reward model's score of the rollouts", "score", None),
}
TEXT_CURVES = {
    "score": ("Reward model's score of the rollouts", "score", None),
    "kl": ("KL to the SFT model", "nats per answer", None),
    "eval_score": ("Score on held-out prompts", "score", None),
    "length": ("Length of the answers", "tokens", None),
    "implicit_reward": ("RTO's dense reward", "reward per answer", None),
}
COLUMNS = {
    "gold_return": "gold return",
    "kl": "KL to the reference, nats",
    "J": "objective J",
    "share": "share of the optimum",
    "score": "reward model's score",
    "length": "length, tokens",
    "ended": "share ended by EOS",
}


def study_page(out: Path, config, arms: dict[str, Path], figures: Figures, seconds: dict[str, float], facts: dict) -> Path:
    """out/report.html of a study; `arms` are the RL runs and the names of their folders."""
    order = ["SFT", "DPO", *arms]
    policies = {name: figures[name] for name in order if name in figures and "kl" in figures[name][0]}
    is_gold = any("share" in runs[0] for runs in policies.values())
    report = Report(
        "RTO learning, on a world whose optimum is known" if is_gold else "RTO on a real language model",
        "Every arm has the same SFT model, reward model, critic, learning rates, prompts and number of rollouts; "
        "what differs is in its name.",
        methods=list(policies),
    )
    reference = {}
    if is_gold:
        world = gold.World()
        best = world.evaluate(world.solve().log_pistar)
        reference = {"gold": ("the optimum's", best["gold_return"]), "kl": ("the optimum's", best["kl"])}
    report.text("What came out", *verdict(policies, is_gold))

    runs = {name: [read_metrics(out / f"seed{s}" / folder) for s in range(config.seeds)] for name, folder in arms.items()}
    rollouts = config.ppo.batch_size
    for key, (title, unit, line) in (GOLD_CURVES if is_gold else TEXT_CURVES).items():
        having = {name: lines for name, lines in runs.items() if any(key in row for row in lines[0])}
        if having:
            x = series(next(iter(having.values())), key, rollouts)[0]
            report.curves(
                title, {name: series(lines, key)[1] for name, lines in having.items()}, x, xlabel="rollouts",
                ylabel=unit, reference=reference.get(line, line if isinstance(line, tuple) else None),
            )  # fmt: skip

    keys = [key for key in COLUMNS if any(key in runs[0] for runs in policies.values())]
    rows = [
        [name, *(with_error(runs, key, 1 if key == "length" else 3) if key in runs[0] else None for key in keys)]
        for name, runs in policies.items()
    ]
    if is_gold:
        optimum = best | {"share": 1.0}
        rows.append(["exact optimum", *(f"{optimum[key]:.{1 if key == 'length' else 3}f}" if key in optimum else None for key in keys)])
    seeds = f"mean ± standard deviation over {config.seeds} seeds, upstream stages repeated too" if config.seeds > 1 else "one seed"
    report.table("Methods", ("method", *(COLUMNS[key] for key in keys)), rows, note=f"{seeds.capitalize()}.")
    report.table(
        "Accuracy on held-out pairs", ACCURACY,
        accuracy_rows({name: figures[name] for name in ("reward model", "DPO")}),
    )  # fmt: skip
    draw_heatmap(report, out / "seed0" / "dpo")

    texts: dict[str, dict[str, str]] = {}
    for arm, folder in arms.items():
        for sample in read_samples(out / "seed0" / folder):
            for label, text in sample["texts"].items():
                found = texts.setdefault(sample["prompt"], {})
                found.setdefault(arm if label in ("PPO", "RTO") else label, text)
    samples = [(prompt, {name: found[name] for name in policies if name in found}) for prompt, found in texts.items()]
    if samples:
        report.samples("Sampled texts on held-out prompts", samples, note="The same random numbers for every method.")
    report.facts(
        {
            "command": facts["command"],
            "commit": f"{facts['git']['commit']}{' and uncommitted changes' if facts['git']['dirty'] else ''}",
            "hardware": hardware(),
            "seeds": facts["seeds"],
            "seconds": ", ".join([f"{facts['seconds']:.0f} in all", *(f"{k} {v:.0f}" for k, v in seconds.items())]),
            "peak memory": f"{facts['peak_memory_gib']} GiB",
        }
    )
    return report.write(out / "report.html")


def verdict(policies: Figures, is_gold: bool) -> list[str]:
    """What the figures say, whichever way."""
    key, name = ("share", "share of the exact optimum") if is_gold else ("score", "reward model's score on held-out prompts")
    said = {label: with_error(policies[label], key) for label in policies}
    gaps = [r[key] - p[key] for r, p in zip(policies["RTO"], policies["PPO"], strict=True)]
    mean = statistics.fmean(gaps)
    words = "higher" if mean > 0 else "lower"
    text = f"RTO's {name} is {abs(mean):.3f} {words} than PPO's ({said['RTO']} against {said['PPO']})"
    if len(gaps) > 1:
        text += f"; it is higher in {sum(g > 0 for g in gaps)} of {len(gaps)} seeds"
    more = [f"{other}: {said[other]}" for other in policies if other not in ("RTO", "PPO")]
    lines = [text + ".", *([f"Beside them: {'; '.join(more)}."] if more else [])]
    if is_gold:
        lines.append(
            "Share 0 is the policy that made the data and 1 the exact optimum of gold return - 0.5·KL. RTO's reward also "
            "pulls towards the DPO policy, which is a lower effective temperature: compare it with PPO at that temperature."
        )
    else:
        lines.append(
            "The score is that of the reward model that was optimised, so it says how well each arm optimises, not which "
            "texts are better. One seed, few steps: read the texts below."
        )
    return lines
