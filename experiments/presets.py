"""What the presets of the stages share: sizes, lengths, and where each stage leaves its run."""

from rto_jax.data import Lengths

ABOUT = {
    "gold": "the embedded world: minutes on a laptop, exact optimum, no data needed",
    "smollm2": "SmolLM2-135M and real preferences (--data): small step counts, about 30 minutes on 2 cores for all stages",
    "smollm2-long": "the same with more steps: 3 minutes on an H100, two hours or more on 2 cores, for all stages",
    "paper": "Llama-3-8B and UltraFeedback with the paper's settings: for a pod; try --dry-run first",
}

GOLD = dict(lengths=Lengths(prompt=4, response=24), eval_size=2_048)
SMOLLM2 = dict(
    lengths=Lengths(prompt=96, response=64), policy_size="smollm2-135m", reward_size="smollm2-135m",
    batch_size=8, micro_batches=2, eval_size=96,
)  # fmt: skip
LONG = SMOLLM2 | dict(eval_size=353)
# Lengths, batches and learning rates: the paper's appendices D and F; the mesh: a v5e 8x8 or 64 larger devices.
PAPER = dict(
    data="HuggingFaceH4/ultrafeedback_binarized", dtype="bfloat16", remat="full", policy_size="llama3-8b",
    reward_size="llama3.2-1b", lengths=Lengths(prompt=1024, response=1024), save_every=50,
)  # fmt: skip

DIGITS = "digits"  # --data that chooses the pictures of rto_jax/digits.py
