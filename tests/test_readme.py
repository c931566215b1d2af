"""What the README says can be run, is run; what it names, exists."""

import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from experiments import quickstart, rto
from tests.test_layering import TABLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    line.strip() for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()
]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment or None)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_with_the_losses_alone():
    (example,) = [block for language, block in BLOCKS if language == "python"]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    guard = "import sys\nfor name in ('flax', 'optax', 'orbax', 'transformers'):\n    sys.modules[name] = None\n"
    printed = run(sys.executable, "-c", guard + example)
    # Token 3 earns 0.05·log(0.8/0.8) - 0.01·log(0.9/0.8) + 1.5.
    assert "1.499" in printed and "0.009" in printed


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("python -m experiments.")}))
def test_module_commands_are_real(command, monkeypatch, capsys):
    """Each module starts, and knows the flags that the README gives it."""
    _, _, module, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that is imported already
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    help_text = capsys.readouterr().out
    assert end.value.code == 0 and "presets" in help_text
    for flag in (w for w in words if w.startswith("--") and w != "--preset"):
        assert flag in help_text


def test_dry_runs_print_what_they_would_do():
    tpu = next(c for c in COMMANDS if "tpu_vm.sh" in c)
    assert "experiments.rto --preset paper" in run(*shlex.split(tpu))
    slurm = next(c for c in COMMANDS if "slurm.sbatch" in c)
    assert "experiments.rto --preset paper" in run("bash", "-c", slurm)


def test_the_tables_are_of_the_code():
    for name in rto.PRESETS:
        assert f"| `{name}` |" in README
    assert set(quickstart.PRESETS) == set(rto.PRESETS) - {"paper"}
    rows = {int(n): set(re.findall(r"`([\w]+)/?`", cells)) for n, cells in re.findall(r"^\| (\d) \| (.*?) \|", README, re.M)}
    for name, (layer, _) in TABLE.items():
        word = name.removesuffix(".*").removeprefix("rto_jax.")
        assert word == "rto_jax" or word in rows[layer], f"{word} is missing in the README's layer {layer}"


def test_paths_exist():
    for path in re.findall(r"`((?:\./)?(?:rto_jax|launch|benchmarks|tests|docs)/[\w./-]*)", README):
        assert (ROOT / path).exists(), path


def test_no_figure_is_missing():
    assert "@" not in re.sub(r"\S+@\S+\.\S+", "", README)
