"""Strict settings for every test: 8 fake devices, rank promotion raises (warnings are errors: pyproject.toml)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
