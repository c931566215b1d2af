"""The examples, run as a user runs them: warnings are errors, and what they print must improve."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOG2 = 0.693  # what a loss over pairs starts from


def run(name: str, *imports: str) -> str:
    for module in imports:
        tried = subprocess.run(
            [sys.executable, "-W", "error", "-c", f"import {module}"], capture_output=True, text=True
        )
        if tried.returncode:
            pytest.skip(f"{module} itself does not import here: {tried.stderr.strip().splitlines()[-1]}")
    command = [sys.executable, "-W", "error", f"examples/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(printed: str, word: str) -> list[float]:
    found = [float(x) for x in re.findall(rf"{word} (-?[\d.]+)", printed)]
    assert len(found) > 2, printed
    return found


def test_dpo_in_flax_nnx():
    printed = run("nnx_dpo", "flax.nnx")
    loss = numbers(printed, "loss")
    assert loss[0] == LOG2 and loss[-1] < 0.2
    assert numbers(printed, "accuracy")[-1] > 0.9


def test_rto_in_flax_linen():
    score = numbers(run("linen_rto", "flax.linen"), "score")
    assert score[0] < 0.5 and score[-1] > 0.9


@pytest.mark.slow
def test_a_reward_model_and_grpo_in_bare_optax():
    printed = run("optax_grpo", "optax")
    loss, reward = numbers(printed, "loss"), numbers(printed, "reward")
    assert loss[0] == LOG2 and loss[-1] < 0.5
    assert abs(reward[0]) < 0.5 and reward[-1] > 4


def test_every_example_is_tested():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))
