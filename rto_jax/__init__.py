"""Token-level RLHF in JAX: RTO (arXiv 2404.18922) and From r to Q* (arXiv 2404.12358).

Read upwards; a module imports only from the layers below it:
  0  types, errors, rng, hlo
  1  losses/        the formulas: arrays and numbers in, unreduced float32 arrays out; evaluation, heatmap
  2  models/ (Flax), data/, gold, digits, sharding, hosts, optim, checkpoint (Orbax), metrics, report
  3  train_state, sampling, scoring, proxy_tuning
  4  steps, rollout, search
  5  programs, loops
  6  plan, experiments/   configuration, presets and command lines
"""

__version__ = "0.1.0"
