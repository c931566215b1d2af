"""What the papers' tables share: runs that are kept by their configuration, seeds, intervals, and how results are drawn.

A table names its `Arm`s: a stage, its configuration, and the arms whose runs it starts from. `runs` trains each once per
seed, upstream arms too, so arms that tables share are trained once, and a study that was stopped goes on where it was.
What a table needs goes into results/TABLE/PRESET.json, and is drawn from there alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import dpo, judges, ppo, reward_model, rl, rto, sft
from experiments.common import Stage, main, open_model, set_up, split_preset, write_json
from experiments.judges import JudgeConfig
from experiments.pages import hardware, read_metrics
from experiments.tasks import make_task, sample_rows, take
from rto_jax.errors import UserError
from rto_jax.evaluation import Interval, bootstrap_interval
from rto_jax.metrics import git_commit, progress
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


class Arm(NamedTuple):
    """One run per seed. Two arms of the same stage, configuration and upstream arms are one."""

    stage: str  # module
    config: Stage
    upstream: Mapping[str, "Arm"] = {}  # flag of the configuration -> the arm whose run it takes

    @property
    def folder(self) -> str:
        fields = dataclasses.asdict(dataclasses.replace(self.config, out="", seed=0, resume=False, data=""))
        what = [self.stage, type(self.config).__name__, fields, {k: a.folder for k, a in self.upstream.items()}]
        digest = sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        name = "rto" if self.is_rto else self.stage.rpartition(".")[2]
        return f"{name}-{digest}"

    @property
    def is_rto(self) -> bool:
        return isinstance(self.config, rl.RtoRunConfig)

    def changed(self, **fields) -> "Arm":
        """The same arm but for some fields of its configuration."""
        return self._replace(config=dataclasses.replace(self.config, **fields))

    def after(self, **arms: "Arm") -> "Arm":
        """The same arm over other upstream arms."""
        return self._replace(upstream={**self.upstream, **arms})


@functools.cache
def base_arms(preset: str) -> dict[str, Arm]:
    """The arms that every table starts from: the stages as their presets have them, and the controls of PPO."""
    config = {module: module.PRESETS["smollm2-long" if preset == "smollm2" else preset][1] for module in (sft, reward_model, dpo, ppo, rto)}
    if preset == "smollm2":  # an accelerator is as fast with more rows
        rows = lambda module: dict(batch_size=64, iterations=40, eval_every=20) if module in (ppo, rto) else dict(batch_size=32)  # noqa: E731
        config = {module: dataclasses.replace(c, micro_batches=1, dtype="bfloat16", **rows(module)) for module, c in config.items()}
    arms = {"SFT": Arm(sft.__name__, config[sft])}
    arms["reward model"] = Arm(reward_model.__name__, config[reward_model], {"init": arms["SFT"]})
    arms["DPO"] = Arm(dpo.__name__, config[dpo], {"init": arms["SFT"]})
    common = {field.name: getattr(config[ppo], field.name) for field in dataclasses.fields(config[ppo])}
    own = {name: getattr(config[rto], name) for name in ("beta1", "dpo_clip", "placement")}
    before = {"sft": arms["SFT"], "reward_model": arms["reward model"]}
    arms["PPO"] = Arm(rl.__name__, config[ppo], before)
    arms["RTO"] = Arm(rl.__name__, rl.RtoRunConfig(**common | own), before | {"dpo": arms["DPO"]})
    return arms


def controls(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """What RTO against PPO, two of the arms, needs beside it: PPO at λ = 1, and at RTO's effective temperature β2/(1 + β1/β2)."""
    lam = dataclasses.replace(arms["PPO"].config.ppo, lam=1.0)
    beta2, beta1 = arms["PPO"].config.beta2, arms["RTO"].config.beta1
    return {
        "PPO, λ = 1": arms["PPO"].changed(ppo=lam),
        "PPO, RTO's temperature": arms["PPO"].changed(beta2=beta2 / (1 + beta1 / beta2)),
    }


# ---------------------------------------------------------------------------------------------- running


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    runs: str = ""
    """where the runs lie; default: runs/study-PRESET; finished ones are kept"""
    results: str = "results"
    """where results/TABLE/PRESET.json goes"""
    data: str = ""
    """--data of every stage"""
    seeds: int = 5
    """how often everything is repeated, upstream stages too"""
    jobs: int = 2
    """runs at a time, each in a process"""
    draw: bool = False
    """draw tables and figures from the JSON that is there, and train nothing"""
    cheap: bool = False
    """one seed and hardly any steps: to see that it runs; nothing can be concluded from it"""
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    """who judges text"""
    drop_weights: bool = False
    """(smollm2) delete a run's checkpoints once it is judged and no other arm of the table starts from it: a seed of all
    three tables needs 80 GB with them"""

    def __post_init__(self):
        if self.seeds < 1 or self.jobs < 1:
            raise UserError("--seeds and --jobs must be at least 1.")

    @property
    def repeats(self) -> int:
        return 1 if self.cheap else self.seeds

    def base(self, preset: str) -> Path:
        return Path(self.runs or f"runs/study-{preset}")

    def arms(self, table: "Table", preset: str) -> dict[str, Arm]:
        """The table's, with hardly any steps if they are to be cheap."""
        arms = table.arms(preset)
        return {name: cut_down(arm, preset) for name, arm in arms.items()} if self.cheap else arms


def cut_down(arm: Arm, preset: str) -> Arm:
    """The arm with hardly any steps."""
    small: dict[str, Any] = {"eval_size": 32} if preset == "gold" else {"eval_size": arm.config.batch_size}
    if preset == "gold":
        small |= {"gold": dataclasses.replace(arm.config.gold, examples=256, pairs=128, test_pairs=128, rollouts=128), "batch_size": 128}
    small |= {"iterations": 2, "eval_every": 1} if hasattr(arm.config, "iterations") else {"steps": 3}
    return arm.changed(**small)._replace(upstream={name: cut_down(other, preset) for name, other in arm.upstream.items()})


def numbers(seeds: int) -> range:
    """The seeds of a study. Not 0: settings were chosen on it."""
    return range(1, seeds + 1)


def in_order(arms: Iterable[Arm]) -> list[Arm]:
    """The arms and all that they start from, each once, upstream first."""
    found: dict[str, Arm] = {}

    def add(arm: Arm) -> None:
        for other in arm.upstream.values():
            add(other)
        found.setdefault(arm.folder, arm)

    for arm in arms:
        add(arm)
    return list(found.values())


def _finished(arm: Arm, base: Path, seed: int) -> bool:
    return (base / f"seed{seed}" / arm.folder / "results.json").exists()


def run_arm(arm: Arm, base: Path, seed: int, data: str) -> Path:
    """The arm's run directory, trained unless it is finished."""
    out = base / f"seed{seed}" / arm.folder
    if not _finished(arm, base, seed):
        before = {flag: str(base / f"seed{seed}" / other.folder) for flag, other in arm.upstream.items()}
        config = dataclasses.replace(arm.config, out=str(out), seed=seed, resume=True, data=data or arm.config.data, **before)
        importlib.import_module(arm.stage).run(config)
    return out


class Task(NamedTuple):
    """One run of a study."""

    arm: Arm
    seed: int
    data: str  # --data


Judging = Callable[[Arm, int], None]  # of an arm that is trained, and its seed


def _do(task: Task, base: Path, judging: Judging | None) -> None:
    run_arm(task.arm, base, task.seed, task.data)
    if judging:
        judging(task.arm, task.seed)


def _do_quietly(task: Task, base: Path, judging: Judging | None) -> None:
    """In a process of its own; what is printed goes to a log beside the run."""
    log = base / f"seed{task.seed}" / f"{task.arm.folder}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        _do(task, base, judging)


def _cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _start(shares) -> None:
    """Of a process of `run_all`: it takes its share of the cores, else the compiled programs' threads get in each other's way."""
    share = shares.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)
    set_up()


def run_all(arms: Sequence[Arm], base: Path, config: StudyConfig, judging: Judging | None = None, beside: Sequence[Task] = ()) -> None:
    """Trains what is missing, a run to a process as soon as those that it starts from are finished, with a bar.

    judging: called after each; beside: more to train at the same time.
    """
    base.mkdir(parents=True, exist_ok=True)
    tasks = [*beside, *(Task(arm, seed, config.data) for seed in numbers(config.repeats) for arm in in_order(arms))]
    waiting = [task for task in tasks if judging or not _finished(task.arm, base, task.seed)]
    if not waiting:
        return
    jobs = min(config.jobs, len(waiting))
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(len(tasks), "runs", initial=len(tasks) - len(waiting)))
        if jobs == 1:
            for task in waiting:
                _do(task, base, judging)
                bar.update()
            return
        # Programs this small gain nothing from a second core, but another run does; on a GPU the processes share its memory.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=false {os.environ.get('XLA_FLAGS', '')}"
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        spawn = multiprocessing.get_context("spawn")
        shares, cores = spawn.SimpleQueue(), _cores()
        for number in range(jobs):
            shares.put(cores[number::jobs] or cores)
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(jobs, spawn, _start, (shares,)))
        running: set[concurrent.futures.Future] = set()
        while waiting or running:
            ready = (task for task in waiting if all(_finished(arm, base, task.seed) for arm in task.arm.upstream.values()))
            for task in list(itertools.islice(ready, jobs - len(running))):
                waiting.remove(task)
                running.add(pool.submit(_do_quietly, task, base, judging))
            if not running:
                raise RuntimeError(f"{waiting[0].arm.folder} cannot start: a run that it starts from ended without results.json")
            ended, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                future.result()  # raises what it raised
                bar.update()


# ---------------------------------------------------------------------------------------------- what runs are worth


KEYS = ("gold_return", "kl", "J", "share", "length")


def figures(arm: Arm, base: Path, seed: int) -> dict[str, Any]:
    """What the stage wrote at its end, of its own policy; of best of n bounds, where only those are known."""
    found = json.loads((base / f"seed{seed}" / arm.folder / "results.json").read_text())
    if arm.stage == rl.__name__:
        return found["RTO" if arm.is_rto else "PPO"]
    return {key.removesuffix("_bound"): x for key, x in found.items()}


def runs(arms: Mapping[str, Arm], base: Path, seeds: int) -> dict[str, list[dict[str, float]]]:
    """KEYS of every arm, a dict per seed."""
    return {
        name: [{key: found[key] for key in KEYS} for found in (figures(arm, base, seed) for seed in numbers(seeds))]
        for name, arm in arms.items()
    }


def runs_against(sft: Arm, arms: Mapping[str, Arm], base: Path, seeds: int) -> dict:
    """`runs` with each arm's `wins` against the SFT model, and the number of answers that these are of."""
    rows = runs(arms, base, seeds)
    for index, seed in enumerate(numbers(seeds)):
        theirs = gold_returns(sft, base, seed)
        for name, arm in arms.items():
            rows[name][index] |= wins(gold_returns(arm, base, seed), theirs)
    return {"answers": len(theirs), "arms": rows}


def column(rows: Mapping[str, list[dict[str, float]]], name: str, key: str) -> list[float]:
    """One figure of an arm, a number per seed."""
    return [run[key] for run in rows[name]]


def gold_returns(arm: Arm, base: Path, seed: int, temperature: float = 1.0) -> np.ndarray:
    """[n]: the gold returns of an answer to each of n held-out prompts, with the same random numbers for every arm."""
    folder = base / f"seed{seed}" / arm.folder
    file = folder / f"returns-{temperature:g}.npy"
    if not file.exists():
        stage = dataclasses.replace(arm.config, out="", seed=seed)
        mesh = make_mesh(stage.mesh)
        model = open_model(str(folder), stage, "--runs")
        task = make_task(stage, mesh, model)
        prompts = take(task.prompts("test"), stage.gold.rollouts, seed)
        sampling = SamplingConfig(task.world.horizon, temperature=temperature)
        seqs = sample_rows(task, model.config, model.load(mesh), prompts, seed, sampling)
        np.save(file, task.returns(seqs))
    return np.load(file)


def curve(arm: Arm, base: Path, seeds: int, key: str) -> dict[str, list]:
    """One of the metrics of an RL arm against the number of rollouts, a row per seed."""
    lines = [read_metrics(base / f"seed{seed}" / arm.folder) for seed in numbers(seeds)]
    x = [arm.config.batch_size * line["step"] for line in lines[0] if key in line]
    return {"rollouts": x, "runs": [[line[key] for line in run if key in line] for run in lines]}


def wins(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How often the gold reward prefers our answer, a tie counting half, and how often it is a tie."""
    return {"win_rate": float(np.mean(0.5 + 0.5 * np.sign(ours - theirs))), "ties": float(np.mean(ours == theirs))}


# ---------------------------------------------------------------------------------------------- results and drawings


def interval(values: Sequence[float], paired: Sequence[float] | None = None) -> Interval:
    """Mean over the seeds, or mean of the differences of paired seeds, with its 95 % bootstrap interval."""
    if len(values) == 1:
        value = values[0] - (paired[0] if paired else 0.0)
        return Interval(value, float("nan"), float("nan"))
    return bootstrap_interval(values, paired=paired)


def shown(found: Interval, digits: int = 2) -> str:
    """The estimate and its interval; of one seed there is none."""
    value, low, high = (f"{x:.{digits}f}".replace("-", "−") for x in found)
    return value if np.isnan(found[1]) else f"{value} [{low}, {high}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def over_seeds(seeds: int) -> str:
    """What stands below a table of intervals."""
    return f"\n\nMeans over {seeds} seeds, 95 % bootstrap intervals over the seeds, paired in the differences."


def over_seeds_and_answers(found: dict) -> str:
    """The same below a table of `runs_against`."""
    return (
        f"\n\nMeans over {len(found['arms']['PPO'])} seeds and 95 % bootstrap intervals over the seeds, paired in the "
        f"differences; win rates of {found['answers']} answers a seed, judged by the gold reward, ties counted half."
    )


# Okabe and Ito's colours, told apart with any colour vision; styles and markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#7A4A1E")
MARKERS = "osD^vPX*h"
STYLE = {
    "figure.facecolor": "white", "savefig.facecolor": "white", "font.size": 9, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 8, "lines.linewidth": 1.6, "svg.hashsalt": "rto_jax",
}  # fmt: skip


@contextlib.contextmanager
def drawing(path: Path, columns: int = 1, width: float = 4.3, height: float = 3.2):
    """A figure with so many panels, written as SVG to `path`; the same bytes for the same data."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained")
        yield list(axes[0])
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def draw_curves(axes, curves: Mapping[str, dict[str, list]], label: str) -> None:
    """Means over the seeds against rollouts, with the seeds' range as a band."""
    for number, (name, found) in enumerate(curves.items()):
        runs, colour = np.array(found["runs"], float), COLOURS[number % len(COLOURS)]
        axes.plot(found["rollouts"], runs.mean(0), color=colour, label=name, marker=MARKERS[number % len(MARKERS)], markevery=0.2, ms=4)
        axes.fill_between(found["rollouts"], runs.min(0), runs.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="rollouts", ylabel=label)
    axes.locator_params(axis="x", nbins=5)
    axes.legend()


class Table(NamedTuple):
    """A table or figure of a paper."""

    name: str  # of its folder in results/
    arms: Callable[[str], dict[str, Arm]]  # preset -> all of its arms by name
    collect: Callable[[dict[str, Arm], Path, int], dict]  # gold's arms, runs, number of seeds -> what goes into the JSON
    draw: Callable[[dict, Path], str]  # gold's JSON, folder -> figures in the folder, and the table as Markdown
    paper: Mapping[str, tuple[float, float]] = {}  # arm -> the paper's AlpacaEval 2 (LC) and Arena-Hard (SC), per cent
    draw_text: Callable[[dict, Path], str] | None = None  # smollm2's, where it is not study.draw_text


class TextStudy(NamedTuple):
    """A table's runs on text: where they lie, and what is known of them."""

    preset: str
    arms: dict[str, Arm]
    config: StudyConfig

    def base_arm(self, name: str) -> Arm:
        arm = base_arms(self.preset)[name]
        return cut_down(arm, self.preset) if self.config.cheap else arm

    def run_of(self, arm: Arm, seed: int) -> judges.Trained:
        data = self.config.judges.data if seed == judges.JUDGE_SEED else self.config.data
        stage = dataclasses.replace(arm.config, out="", seed=seed, data=data or arm.config.data)
        return self.config.base(self.preset) / f"seed{seed}" / arm.folder, stage

    def judged_by(self, seed: int) -> tuple[judges.Trained, judges.Trained, JudgeConfig]:
        """The SFT model and the judge of a seed, as `judges` takes them."""
        judge = self.run_of(self.base_arm("reward model"), judges.JUDGE_SEED)
        return self.run_of(self.base_arm("SFT"), seed), judge, self.config.judges

    def judge(self, arm: Arm, seed: int) -> None:
        """Of one of the table's arms."""
        if arm.folder not in {own.folder for own in self.arms.values()}:
            return
        run, kept = self.run_of(arm, seed), {other.folder for own in self.arms.values() for other in in_order(own.upstream.values())}
        judges.judge_run(run, *self.judged_by(seed))
        if self.config.drop_weights and arm.folder not in kept:
            shutil.rmtree(run[0] / "checkpoints", ignore_errors=True)


def train_text(preset: str, arms: dict[str, Arm], config: StudyConfig) -> None:
    """smollm2: first the judge and what other arms start from, then each arm, judged as soon as it is trained."""
    found, base = TextStudy(preset, arms, config), config.base(preset)
    if preset == "paper":
        return run_all(list(arms.values()), base, config)
    upstream = [other for arm in arms.values() for other in arm.upstream.values()]
    beside = [Task(arm, judges.JUDGE_SEED, config.judges.data) for arm in in_order([found.base_arm("reward model")])]
    run_all(upstream, base, config, beside=beside)
    run_all(list(arms.values()), base, config, judging=found.judge)


def collect_text(table: Table, preset: str, arms: dict[str, Arm], config: StudyConfig) -> dict:
    """smollm2: `judges.judged` of every seed, and the reward model's score along training. paper: files for other judges."""
    found, base, seeds = TextStudy(preset, arms, config), config.base(preset), numbers(config.repeats)
    if preset == "paper":
        judges.write_answers({name: found.run_of(arm, 1) for name, arm in arms.items()}, config.judges, Path(config.results) / table.name / preset)
        return {"arms": judges.read_results(list(arms), config.judges)}
    rows: dict[str, list] = {name: [] for name in arms}
    for seed in seeds:
        verdicts = judges.judged({name: found.run_of(arm, seed) for name, arm in arms.items()}, *found.judged_by(seed))
        for name, row in verdicts["arms"].items():
            rows[name].append(row)
    curves = {name: curve(arm, base, len(seeds), "score") for name, arm in arms.items() if arm.stage == rl.__name__}
    accuracies = {
        name: [json.loads((found.run_of(found.base_arm(arm), seed)[0] / "results.json").read_text()) for seed in of]
        for name, arm, of in (("judge", "reward model", [judges.JUDGE_SEED]), ("reward model", "reward model", seeds), ("DPO", "DPO", seeds))
    }
    return {"arms": rows, "answers": verdicts["answers"], "reviews": verdicts["reviews"], "accuracy": accuracies, "curves": {"score": curves}}


TEXT_COLUMNS = {
    "judge": ("judge's score", 2), "win_rate": ("win rate against SFT", 3), "gap": ("win rate − PPO's", 3), "sentiment_win_rate": ("win rate in sentiment", 3),
    "sentiment": ("sentiment", 3), "kl": ("KL to SFT, nats", 2), "length": ("length, tokens", 1),
}  # fmt: skip


def draw_text(table: Table, found: dict, folder: Path, preset: str) -> str:
    """The table, and for smollm2 a figure, of what `collect_text` found."""
    rows = found["arms"]
    if preset == "paper":
        head = ("method", "AlpacaEval 2, LC %", "win rate, %", "Arena-Hard, %", "the paper's AlpacaEval 2, LC %", "its Arena-Hard, %")
        cells = {name: [run[0].get(key) for key in ("alpaca_lc", "alpaca", "arena")] for name, run in rows.items()}
        text = [[name, *(f"{x:.1f}" if x is not None else "–" for x in (*row, *table.paper.get(name, (None, None))))] for name, row in cells.items()]
        return markdown(head, text) + "\n\nOne seed. –: not judged yet, or not in the paper."
    keys = [key for key in TEXT_COLUMNS if key in next(iter(rows.values()))[0] or (key == "gap" and "PPO" in rows)]

    def cell(name: str, key: str) -> str:
        if key != "gap":
            return shown(interval(column(rows, name, key)), TEXT_COLUMNS[key][1])
        return "" if name == "PPO" else shown(interval(column(rows, name, "win_rate"), column(rows, "PPO", "win_rate")), TEXT_COLUMNS[key][1])

    text = [[name, *(cell(name, key) for key in keys)] for name in rows]
    with drawing(folder / f"{preset}.svg", 2, 3.8) as (left, right):
        for number, name in enumerate(rows):
            values, style = column(rows, name, "win_rate"), dict(color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)])
            left.plot(values, [number] * len(values), ls="", ms=3, alpha=0.5, **style)
            left.plot([np.mean(values)], [number], ls="", ms=7, **style)
        left.axvline(0.5, color="#777777", ls=":", lw=1)
        left.set(xlabel="win rate against SFT, judged by a held-out reward model", yticks=range(len(rows)), yticklabels=list(rows))
        left.invert_yaxis()
        draw_curves(right, found["curves"]["score"], "training's reward model's score")
    note = f"\n\n{found['answers']} held-out prompts a seed, ties counted half; a win rate's standard error over prompts is at most {0.5 / found['answers'] ** 0.5:.3f}."
    note += f" Sentiment: VADER's, of {found['reviews']} continued reviews." * bool(found["reviews"])
    if "accuracy" in found:
        said = (f"{name} {shown(interval([run['test']['accuracy'] for run in rows]), 3)}" for name, rows in found["accuracy"].items())
        note += f" Accuracy on held-out pairs: {', '.join(said)}; always the longer answer {found['accuracy']['judge'][0]['test']['longer_answer']:.3f}."
    return markdown(("method", *(TEXT_COLUMNS[key][0] for key in keys)), text) + over_seeds(len(column(rows, next(iter(rows)), "kl"))) + note


def facts(config: StudyConfig, preset: str, table: Table, arms: Mapping[str, Arm], seconds: float) -> dict:
    return {
        "command": f"python -m experiments.{table.name} --preset {preset} --seeds {config.repeats}" + " --cheap" * config.cheap,
        "git": git_commit(), "hardware": hardware(), "cores": len(_cores()), "preset": preset,
        "seeds": config.repeats, "seconds": round(seconds), "cheap": config.cheap, "jax": jax.__version__,
        "configs": {name: dataclasses.asdict(arm.config) | {"stage": arm.stage} for name, arm in arms.items()},
    }  # fmt: skip


def make(table: Table, preset: str, config: StudyConfig) -> str:
    """Runs, collects and draws one table; returns its Markdown."""
    folder = Path(config.results) / table.name
    file = folder / f"{preset}.json"
    if not config.draw:
        if preset == "smollm2" and not config.judges.data:
            raise UserError("--judges.data is missing: preferences for the reward model that judges, which no arm is trained on.")
        arms, base, began = config.arms(table, preset), config.base(preset), time.time()
        if preset == "gold":
            run_all(list(arms.values()), base, config)
            found = table.collect(arms, base, config.repeats)
        else:
            train_text(preset, arms, config)
            found = collect_text(table, preset, arms, config)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"facts": facts(config, preset, table, arms, time.time() - began), **found})
    if not file.exists():
        raise UserError(f"--draw: there is no {file}; run without it first.")
    return draw(table, file)


def draw(table: Table, file: Path) -> str:
    """The figures beside a JSON file, and TABLE.md with the table and where it comes from."""
    found = json.loads(file.read_text())
    said, git = found["facts"], found["facts"]["git"]
    own = table.draw if file.stem == "gold" else table.draw_text if file.stem == "smollm2" else None
    text = own(found, file.parent) if own else draw_text(table, found, file.parent, file.stem)
    commit = (git["commit"] or "none")[:7] + (" with changes" if git["dirty"] else "")
    text += f"\n\n`{said['command']}`, commit `{commit}`, {said['hardware']}, {said['cores']} cores, {said['seconds']} s"
    text += ", runs of other tables used again where they are the same.\n"
    if said["cheap"]:
        text += "\n**A run of hardly any steps, to see that the command works: nothing can be concluded from it.**\n"
    file.with_suffix(".md").write_text(text)
    return text


PRESETS = {
    "gold": ("the embedded world, 5 seeds", StudyConfig()),
    "smollm2": ("SmolLM2-135M on --data, judged by a reward model of --judges.data; for an accelerator", StudyConfig(seeds=3, jobs=1)),
    "paper": ("the paper's scale, for a pod: answer files for AlpacaEval 2 and Arena-Hard, and what these say", StudyConfig(seeds=1, jobs=1)),
}


def command(table: Table, description: str, presets: Mapping[str, tuple[str, StudyConfig]] = PRESETS) -> None:
    """The table's command line."""
    main(presets, lambda config: print(make(table, split_preset(sys.argv[1:], presets)[0], config)), description)
