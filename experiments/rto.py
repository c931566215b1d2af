"""RTO: PPO on beta1·log(pi_dpo/pi_ref) - beta2·log(pi/pi_ref) + [last token] beta3·score (RTO eq. 4.7).

    python -m experiments.rto                      the embedded world, half a minute on a laptop
    python -m experiments.rto --preset smollm2 --data DIR
    python -m experiments.rto --preset paper --dry-run
"""

from experiments.common import main
from experiments.ppo import COMMON
from experiments.presets import ABOUT
from experiments.rl import RtoRunConfig, run

# beta1: in the gold world half the beta that DPO was trained with, in units of its reward; else the paper's 0.05.
PRESETS = {
    name: (
        ABOUT[name],
        RtoRunConfig(out=f"runs/{name}/rto", dpo=f"runs/{name}/dpo", beta1=0.25 if name == "gold" else 0.05, **common),
    )
    for name, common in COMMON.items()
}

if __name__ == "__main__":
    main(PRESETS, run, __doc__)
