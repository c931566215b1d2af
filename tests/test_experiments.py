"""The stages end to end in a small gold world: chain, exact resume, dry runs, and bad input on the command line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from experiments import dpo, ppo, quickstart, reward_model, rto, sft
from experiments.common import GoldData, main
from rto_jax import programs
from rto_jax.checkpoint import restore_params
from rto_jax.errors import UserError
from rto_jax.metrics import MetricsLog
from rto_jax.models import SIZES
from rto_jax.sharding import MeshConfig, make_mesh

ROOT = Path(__file__).parents[1]
MODULES = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "ppo": ppo, "rto": rto}
TINY = dict(gold=GoldData(examples=512, pairs=256, test_pairs=64, rollouts=64), batch_size=32, eval_size=64)


def tiny(stage: str, base: Path, **extra):
    """The gold preset of a stage, cut down to seconds, in base/stage."""
    config = dataclasses.replace(MODULES[stage].PRESETS["gold"][1], out=str(base / stage), **TINY)
    if stage in ("reward_model", "dpo"):
        config = dataclasses.replace(config, init=str(base / "sft"), steps=6)
    elif stage == "sft":
        config = dataclasses.replace(config, steps=6)
    else:
        links = {"sft": str(base / "sft"), "reward_model": str(base / "reward_model")}
        links |= {"dpo": str(base / "dpo")} if stage == "rto" else {}
        config = dataclasses.replace(config, iterations=4, eval_every=2, **links)
    return dataclasses.replace(config, **extra)


def run(stage: str, config):
    return MODULES[stage].run(config)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """All stages, once."""
    base = tmp_path_factory.mktemp("chain")
    for stage in MODULES:
        run(stage, tiny(stage, base))
    return base


def params_of(folder: Path, head: str):
    mesh = make_mesh(sft.SftConfig(out="").mesh)
    return jax.device_get(restore_params(folder / "checkpoints", programs.abstract_params(SIZES["gold"], head, mesh)))


@pytest.mark.parametrize("stage", MODULES)
def test_a_stage_leaves_what_the_next_one_and_people_need(chain, stage):
    folder = chain / stage
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["batch_size"] == 32 and "commit" in config["git"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == list(range(0 if stage in ("ppo", "rto") else 1, {"ppo": 5, "rto": 5}.get(stage, 7)))
    assert json.loads((folder / "model.json").read_text())["tokenizer"] == "gold"
    assert list((folder / "tb").iterdir()) and json.loads((folder / "results.json").read_text())
    assert "<svg" in (folder / "report.html").read_text()
    if stage in ("ppo", "rto"):
        assert {"eval_share", "eval_kl"} <= lines[0].keys() and lines[-1]["eval_share"] <= 1
        assert all(abs(line["first_update_kl"]) < 1e-8 for line in lines[1:])
        assert (lines[1]["implicit_reward"] != 0) == (stage == "rto")


def test_training_lowers_the_loss(tmp_path):
    run("sft", tiny("sft", tmp_path, steps=40))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        ("sft", {}), pytest.param("dpo", {}, marks=pytest.mark.slow), ("rto", {}),
        pytest.param("rto", dict(advantage="grpo", group_size=4), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_resume_ends_with_the_same_bytes(chain, stage, extra, tmp_path, monkeypatch):
    """Stopped after its first checkpoint, resumed: every parameter and every logged metric as without the stop."""
    out = str(tmp_path / stage)
    straight = tiny(stage, chain, out=str(tmp_path / "straight"), save_every=2, **extra)
    config = tiny(stage, chain, out=out, save_every=2, **extra)
    run(stage, straight)
    push = MetricsLog.push

    def stop(self, step, metrics):
        if step == 4:
            raise Stopped
        return push(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "push", stop)
        with pytest.raises(Stopped):
            run(stage, config)
    run(stage, dataclasses.replace(config, resume=True))
    chex.assert_trees_all_equal(params_of(tmp_path / stage, "lm"), params_of(tmp_path / "straight", "lm"))

    def lines(folder):
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "time_s"} for row in rows]

    assert lines(stage) == lines("straight")


@pytest.mark.parametrize("extra", [{}, pytest.param(dict(advantage="rloo", group_size=4), marks=pytest.mark.slow)])
def test_ppo_is_rto_with_beta1_zero(chain, extra, tmp_path):
    """The same rollouts and, to the bit, the same policy: the arms differ in the DPO term alone."""
    one = run("ppo", tiny("ppo", chain, out=str(tmp_path / "ppo"), **extra))
    two = run("rto", tiny("rto", chain, out=str(tmp_path / "rto"), beta1=0.0, **extra))
    assert one["PPO"] == two["RTO"] and one["SFT"] == two["SFT"]
    chex.assert_trees_all_equal(params_of(tmp_path / "ppo", "lm"), params_of(tmp_path / "rto", "lm"))


@pytest.mark.slow  # tests/test_text.py writes one too
def test_quickstart_writes_one_page(tmp_path):
    config = quickstart.PRESETS["gold"][1]
    small = {name: dataclasses.replace(getattr(config, name), **TINY) for name in MODULES}
    for name in ("sft", "reward_model", "dpo"):  # the numbers of the chain, whose programs are compiled
        small[name] = dataclasses.replace(small[name], steps=6)
    for name in ("ppo", "rto"):
        small[name] = dataclasses.replace(small[name], iterations=4, eval_every=2)
    config = dataclasses.replace(config, out=str(tmp_path / "study"), seeds=2, **small)
    page = quickstart.run(config)
    text = page.read_text()
    assert all(word in text for word in ("RTO", "share", "<svg", "OPEN"))
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert len(results["figures"]["RTO"]) == 2
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "study").rglob("metrics.jsonl")}
    quickstart.run(dataclasses.replace(config, resume=True))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "study").rglob("metrics.jsonl")}


@pytest.mark.parametrize("preset", ["gold", "smollm2", "smollm2-long", "paper"])
@pytest.mark.parametrize("stage", MODULES)
def test_every_preset_builds_and_its_shapes_agree(stage, preset, capsys):
    """--dry-run: Llama-3-8B and all, abstractly, on the mesh that the preset asks for."""
    about, config = MODULES[stage].PRESETS[preset]
    assert about and hash(config) is not None
    mesh = config.mesh if preset in ("gold", "paper") else MeshConfig(data=1)  # batches of 8 are for one device
    run(stage, dataclasses.replace(config, dry_run=True, mesh=mesh))
    printed = capsys.readouterr().out
    if preset == "paper":
        assert "8,030,261,248 parameters" in printed or stage == "reward_model"
        assert "fsdp 64" in printed


def outcome(stage: str, argv: list[str], capsys) -> tuple[int, str]:
    """Exit status and standard error of a command."""
    module = MODULES[stage]
    with pytest.raises(SystemExit) as stop:
        main(module.PRESETS, module.run, module.__doc__, argv)
    return stop.value.code, capsys.readouterr().err


def test_a_device_without_memory_is_said(capsys):
    def run(config):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.04GiB with allocator GPU_0_bfc on device 0. [x='']"
        )

    with pytest.raises(SystemExit) as stop:
        main(sft.PRESETS, run, sft.__doc__, [])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "memory is too small (Out of memory while trying to allocate 8.04GiB" in said and "--micro-batches" in said

    def broken(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        main(sft.PRESETS, broken, sft.__doc__, [])


def small(stage: str, *flags: str) -> list[str]:
    common = "--gold.examples 512 --gold.pairs 256 --gold.test-pairs 64 --gold.rollouts 64 --batch-size 32 --eval-size 64"
    return [*common.split(), *flags]


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("sft", ["--preset", "bronze"], ["--preset bronze", "gold, smollm2"]),
        ("sft", ["--out", "{tmp}/new", "--mesh.tensor", "3"], ["--mesh.tensor 3", "8 device"]),
        ("sft", ["--out", "{tmp}/new", "--mesh.tensor", "8"], ["--mesh.tensor 8", "layers/attn"]),
        ("sft", ["--out", "{tmp}/new", "--batch-size", "12"], ["--batch-size 12", "8"]),
        ("sft", ["--out", "{tmp}/new", "--optim.learning-rate", "-1"], ["learning-rate"]),
        ("sft", ["--out", "{chain}/sft"], ["already holds a run", "--resume"]),
        ("sft", ["--out", "{tmp}/new", "--model", "{tmp}/nothing"], ["--model", "holds no model"]),
        ("dpo", ["--out", "{tmp}/new", "--init", "{tmp}/nothing"], ["--init", "holds no model", "stage before"]),
        ("ppo", ["--out", "{tmp}/new", "--sft", "{chain}/sft", "--reward-model", "{chain}/sft"], ["--reward-model"]),
        ("ppo", ["--ppo.minibatches", "3"], ["--ppo.minibatches 3"]),
        ("ppo", ["--ppo.clip", "0"], ["--ppo.clip"]),
        ("ppo", ["--advantage", "rloo"], ["--advantage rloo", "--group-size"]),
    ],
)
def test_bad_flags_end_in_one_sentence(stage, flags, words, chain, tmp_path, capsys):
    argv = small(stage, *[flag.format(tmp=tmp_path, chain=chain) for flag in flags])
    status, error = outcome(stage, argv, capsys)
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_unknown_flag_exits_2(capsys):
    status, error = outcome("rto", ["--beta9", "1"], capsys)
    assert status == 2 and "beta9" in error


def test_nan_loss_keeps_the_last_good_checkpoint(chain, tmp_path, capsys, monkeypatch):
    from rto_jax import steps

    original = steps.apply_gradients

    def poison(state, grads, optimizer):
        grads = jax.tree.map(lambda g: jax.numpy.where(state.step >= 4, jax.numpy.nan, g), grads)
        return original(state, grads, optimizer)

    monkeypatch.setattr(steps, "apply_gradients", poison)
    programs.pure_step.cache_clear()
    programs.supervised_step.cache_clear()
    argv = small("sft", "--out", str(tmp_path / "nan"), "--steps", "10", "--save-every", "2")
    status, error = outcome("sft", argv, capsys)
    programs.pure_step.cache_clear()
    programs.supervised_step.cache_clear()
    assert status == 2 and "NaN at step 6" in error and "checkpoints/4" in error, error
    params = params_of(tmp_path / "nan", "lm")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_checkpoint_of_another_shape_is_refused(chain, tmp_path, capsys):
    folder = tmp_path / "sft"
    subprocess.run(["cp", "-r", str(chain / "sft"), str(folder)], check=True)
    about = json.loads((folder / "model.json").read_text())
    about["config"]["mlp_width"] = 64
    (folder / "model.json").write_text(json.dumps(about))
    argv = small("dpo", "--out", str(tmp_path / "new"), "--init", str(folder))
    status, error = outcome("dpo", argv, capsys)
    assert status == 2 and "mlp" in error and "64" in error, error


def test_a_tokenizer_unlike_the_policys_is_refused(chain, tmp_path):
    from experiments.common import Model, same_tokenizer

    class Other:
        fingerprint = "f" * 64

    gold = Model("a", SIZES["gold"], "lm", None, None)
    other = Model("runs/b", SIZES["gold"], "lm", Other(), None)
    same_tokenizer(gold, ("--dpo", gold))
    with pytest.raises(UserError, match="tokenizer of --dpo runs/b"):
        same_tokenizer(gold, ("--dpo", other))


def test_help_names_the_presets_and_the_equation():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.rto", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert all(word in done.stdout for word in ("eq. 4.7", "smollm2-long", "--beta1", "--ppo.lam")), done.stdout


@pytest.mark.slow
def test_second_start_of_a_job_takes_its_programs_from_the_cache(tmp_path):
    cache = tmp_path / "cache"
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    held = []
    for name in ("first", "second"):
        flags = ["--out", str(tmp_path / name), "--steps", "2", *small("sft")]
        command = [sys.executable, "-m", "experiments.sft", *flags]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
        held.append({file.name for file in cache.iterdir() if file.name.endswith("-cache")})
    assert held[0] and held[0] == held[1]
