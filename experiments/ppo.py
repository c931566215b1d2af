"""PPO: the reward model's score at the last token and a KL penalty at every token (RTO eq. 2.3).

    python -m experiments.ppo                      the embedded world, half a minute on a laptop
    python -m experiments.ppo --preset smollm2 --data DIR
"""

from experiments.common import main
from experiments.presets import ABOUT, GOLD, LONG, PAPER, SMOLLM2
from experiments.rl import PpoRunConfig, run
from rto_jax.optim import OptimConfig
from rto_jax.sharding import MeshConfig
from rto_jax.steps import PpoConfig

# What PPO and RTO have in common: everything but the DPO term. One table, so that no arm is tuned more than another.
COMMON = {
    "gold": dict(
        sft="runs/gold/sft", reward_model="runs/gold/reward_model", iterations=60, batch_size=256, beta2=0.5,
        ppo=PpoConfig(minibatches=4), policy_optim=OptimConfig(learning_rate=2e-3),
        critic_optim=OptimConfig(learning_rate=3e-3), **GOLD,
    ),
    "smollm2": SMOLLM2 | dict(
        sft="runs/smollm2/sft", reward_model="runs/smollm2/reward_model", iterations=8, batch_size=16, micro_batches=1,
        ppo=PpoConfig(minibatches=4), policy_optim=OptimConfig(learning_rate=1e-5),
        critic_optim=OptimConfig(learning_rate=2e-5), critic_head="reward", reward_clip=10.0, eval_every=4,
        eval_size=32,
    ),
    "smollm2-long": LONG | dict(
        sft="runs/smollm2-long/sft", reward_model="runs/smollm2-long/reward_model", iterations=60, batch_size=16,
        micro_batches=1, ppo=PpoConfig(minibatches=4), policy_optim=OptimConfig(learning_rate=1e-5),
        critic_optim=OptimConfig(learning_rate=2e-5), critic_head="reward", reward_clip=10.0, eval_every=10,
        eval_size=128,
    ),
    # Llama-3-8B: appendix D of the paper. Its PPO has an actor learning rate of 8e-7 and an 8B reward model; here the
    # arms are alike, with RTO's 5e-7 and its 1B reward model.
    "paper": PAPER | dict(
        sft="OpenRLHF/Llama-3-8b-sft-mixture", reward_model="runs/paper/reward_model", iterations=58, batch_size=1024,
        micro_batches=1, beta2=0.01, ppo=PpoConfig(minibatches=8), policy_optim=OptimConfig(learning_rate=5e-7),
        critic_optim=OptimConfig(learning_rate=9e-6), critic_head="reward", reward_clip=10.0,
        mesh=MeshConfig(fsdp=64), save_every=5,
    ),
}  # fmt: skip

PRESETS = {name: (ABOUT[name], PpoRunConfig(out=f"runs/{name}/ppo", **common)) for name, common in COMMON.items()}

if __name__ == "__main__":
    main(PRESETS, run, __doc__)
