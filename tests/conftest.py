"""Strict settings for every test: 8 fake devices, rank promotion raises (warnings are errors: pyproject.toml)."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests' programs run once or twice: what they cost is their compilation.
fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{fast} {os.environ.get('XLA_FLAGS', '')}"
import jax  # noqa: E402 (after the settings that it reads)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Not the user's cache, which `experiments` would take.
cache = tempfile.mkdtemp(prefix="rto-jax-tests-")
atexit.register(shutil.rmtree, cache, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", cache)
