"""Hand-worked values of the preference losses and of the divergences that they take, and what ties them together."""

from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rto_jax.losses import (
    bradley_terry_loss,
    cpo_loss,
    dpo_loss,
    entropy,
    expected_implicit_rewards,
    hinge_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    kto_pair_loss,
    masked_sum,
    orpo_loss,
    plackett_luce_loss,
    preference_metrics,
    r_dpo_loss,
    robust_dpo_loss,
    sequence_kl,
    simpo_loss,
    tdpo_loss,
    token_kl,
    token_logps,
)

LOG2, LOG3 = np.log(2), np.log(3)


def array(*numbers):
    return jnp.array(numbers, jnp.float32)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def gradients(loss, *arrays):
    """Of the batch's sum, in every array."""
    return jax.grad(lambda *arrays: loss(*arrays).sum(), tuple(range(len(arrays))))(*arrays)


# Log-ratios +1 (chosen) and −0.5 (rejected): h = 1.5, and βh = 0.15 at β = 0.1.
ONE_PAIR = array(-10), array(-12), array(-11), array(-11.5)
# A batch of them, with either order and h from −4.5 to 4.5.
BATCH = tuple(array(*x) for x in ((-9, -12, -10, -7), (-8, -11, -12, -9.5), (-10, -10, -11, -9), (-8, -11.5, -10, -7)))
H = np.array([1, -2.5, 3, 4.5])
LENGTHS = array(4, 7, 5, 1), array(3, 7, 9, 2)
ZERO = jnp.zeros(4)


def at(h):
    """The four sums of pairs with these log-odds."""
    h = jnp.atleast_1d(jnp.asarray(h, jnp.float32))
    return h - 3, jnp.full_like(h, -5), jnp.full_like(h, -3), jnp.full_like(h, -5)


def slope(loss, h):
    """dL/dh."""
    return gradients(loss, *at(h))[0]


def test_the_log_odds_of_the_batch_are_those_written_here():
    chosen, rejected, ref_chosen, ref_rejected = BATCH
    close((chosen - ref_chosen) - (rejected - ref_rejected), H)
    close(preference_metrics(*at(H), beta=1)["margin"], H)


# ---- pairs and rankings of scores ------------------------------------------------------------------------------------


def test_bradley_terry_pulls_by_the_probability_that_it_gave_to_the_wrong_order():
    # r_w − r_l = log 3: P = 3/4, so the pull is 1/4 each way; with a margin of log 3 it is 1/2.
    for margin, pull in ((0, 1 / 4), (LOG3, 1 / 2)):
        chosen, rejected = gradients(partial(bradley_terry_loss, margin=margin), array(LOG3), array(0))
        close(chosen, [-pull])
        close(rejected, [pull])


def test_plackett_luce_by_hand():
    nan = np.nan
    rewards = [
        [LOG3, LOG2, 0],  # weights e^r of 3, 2, 1: 3/6 · 2/3 · 1 = 1/3
        [0, LOG2, LOG3],  # the worst first: 1/6 · 2/5 · 1 = 1/15
        [LOG3 + 50, LOG2 + 50, 50],  # differences are all that counts
        [LOG3, nan, 0],  # without the one in the middle: 3/4
        [nan, 7, nan],  # nothing to rank
        [nan, nan, nan],
    ]
    mask = ~np.isnan(rewards)
    value, pullback = jax.vjp(lambda r: plackett_luce_loss(r, mask), jnp.array(rewards, jnp.float32))
    close(value, [LOG3, np.log(15), LOG3, np.log(4 / 3), 0, 0], 1e-4)
    # dL/dr_k = (its share of the weight, summed over the choices that it was part of) − 1, without the −1 for the last:
    # 3/6 − 1, 2/6 + 2/3 − 1, 1/6 + 1/3. In the second row 1/6 − 1, 2/6 + 2/5 − 1, 3/6 + 3/5.
    (gradient,) = pullback(jnp.ones(6))
    close(gradient[:2], [[-1 / 2, 0, 1 / 2], [-5 / 6, -4 / 15, 11 / 10]])
    close(gradient[3:], [[-1 / 4, 0, 1 / 4], [0, 0, 0], [0, 0, 0]])
    close(plackett_luce_loss(jnp.array(rewards[:2], jnp.float32)), value[:2])
    assert plackett_luce_loss(array(5)) == 0


def test_plackett_luce_is_a_distribution_over_rankings():
    rewards = np.array([0.3, -1.2, 2.0, 0.7])
    orders = np.array(list(permutations(range(4))))
    probability = np.exp(-plackett_luce_loss(rewards[orders]))
    close(probability.sum(), 1)
    # The best is drawn by a softmax: the rankings that begin with k add up to its share.
    first = [probability[orders[:, 0] == k].sum() for k in range(4)]
    close(first, np.exp(rewards) / np.exp(rewards).sum())
    # And leaving out answer 3 is summing over the places it might have had.
    of_three = np.exp(-plackett_luce_loss(array(0.3, -1.2, 2.0)))
    close(probability[[[k for k in order if k != 3] == [0, 1, 2] for order in orders]].sum(), of_three)


def test_plackett_luce_of_two_is_bradley_terry_and_of_implicit_rewards_dpo():
    chosen, rejected, ref_chosen, ref_rejected = BATCH
    close(plackett_luce_loss(jnp.stack([chosen, rejected], axis=-1)), bradley_terry_loss(chosen, rejected))
    implicit = 0.2 * jnp.stack([chosen - ref_chosen, rejected - ref_rejected], axis=-1)
    close(plackett_luce_loss(implicit), dpo_loss(*BATCH, beta=0.2))


# ---- DPO's relatives -------------------------------------------------------------------------------------------------


def test_robust_dpo_by_hand():
    # log(1 + e^0.15) = log(1 + e^−0.15) + 0.15 = 0.770957, so [0.9 · 0.620957 − 0.1 · 0.770957] / 0.8 = 0.602207.
    close(robust_dpo_loss(*ONE_PAIR, beta=0.1, label_smoothing=0.1), [0.602207])
    close(robust_dpo_loss(*at(0), beta=0.1, label_smoothing=0.3), [LOG2])
    # Far on the right side it falls by ε/(1 − 2ε) per unit of βh, 1/8: −1000/8.
    close(robust_dpo_loss(*at(1000), beta=1, label_smoothing=0.1), [-125])
    close(robust_dpo_loss(*BATCH, beta=0.1, label_smoothing=0), dpo_loss(*BATCH, beta=0.1))


def test_noisy_labels_leave_robust_dpo_unbiased_and_cdpo_not():
    a, b, c, d = BATCH
    flip, clean = 0.3, dpo_loss(*BATCH, beta=0.5)

    def noisy(loss):
        loss = partial(loss, beta=0.5, label_smoothing=flip)
        return (1 - flip) * loss(a, b, c, d) + flip * loss(b, a, d, c)

    close(noisy(robust_dpo_loss), clean)
    # cDPO's is off by 2ε(1 − ε)βh = 0.21 h: it still counts each flipped label as one.
    close(noisy(dpo_loss) - clean, 0.21 * H)


def test_the_gradient_of_robust_dpo_never_dies():
    weight = -0.2 * (sigmoid(-0.2 * H) + 0.1 / 0.8)
    chosen, rejected, *_ = gradients(partial(robust_dpo_loss, beta=0.2, label_smoothing=0.1), *BATCH)
    close(chosen, weight)
    close(rejected, -weight)


def test_ipo_by_hand():
    # The gap asked for is 1/(2 · 0.1) = 5: (1.5 − 5)² = 12.25, and its slope 2(1.5 − 5) = −7.
    close(ipo_loss(*ONE_PAIR, beta=0.1), [12.25])
    close(gradients(partial(ipo_loss, beta=0.1), *ONE_PAIR), [[-7], [7], [7], [-7]])
    close(ipo_loss(*at(0), beta=0.1), [25])  # 1/(4β²)
    # At the gap it stops, and beyond it pulls back; DPO goes on.
    close(slope(partial(ipo_loss, beta=0.1), [5, 6]), [0, 2])
    close(slope(partial(dpo_loss, beta=0.1), [5, 6]), -0.1 * sigmoid([-0.5, -0.6]))
    close(ipo_loss(*BATCH, beta=0.1), (preference_metrics(*BATCH, beta=0.1)["margin"] / 0.1 - 5) ** 2)


def test_where_ipo_and_dpo_stop_when_labels_disagree():
    """With the order right 3 times in 4, DPO ends at the log-odds of that over β, IPO at (2p − 1)/(2β)."""
    for loss, end in ((dpo_loss, LOG3 / 0.2), (ipo_loss, 0.5 / 0.4)):
        right, wrong = slope(partial(loss, beta=0.2), [end, -end])
        assert abs(right) > 0.01
        close(0.75 * right - 0.25 * wrong, 0)


def test_hinge_by_hand():
    close(hinge_loss(*ONE_PAIR, beta=0.1), [0.85])  # 1 − 0.15
    close(hinge_loss(*at([0, -10, 12]), beta=0.1), [1, 2, 0])
    # β until the margin 1/β = 10, nothing past it.
    close(slope(partial(hinge_loss, beta=0.1), [-1e4, 0, 9.9, 10.1, 1e4]), [-0.1, -0.1, -0.1, 0, 0])


def test_hinge_without_a_reference_is_slic():
    """max(0, δ − log π(y_w) + log π(y_l)), δ = 1.5."""
    chosen, rejected = BATCH[:2]
    out = 1.5 * hinge_loss(chosen, rejected, ZERO, ZERO, beta=1 / 1.5)
    close(out, [2.5, 2.5, 0, 0])  # 1.5 + 1, 1.5 + 1, 1.5 − 2, 1.5 − 2.5
    # The corner of Bradley–Terry, seen from afar: log(1 + e^k(1 − βh))/k is within log(2)/k of it.
    soft = bradley_terry_loss(1000 / 1.5 * chosen, 1000 / 1.5 * rejected, margin=1000) / 1000
    close(1.5 * soft, out, atol=1.5 * LOG2 / 1000)


def test_r_dpo_by_hand():
    # βh = 0.15, and 0.05 for each of 5 − 2 tokens: log(1 + e^−0.3) = log 1.740818 = 0.554355.
    close(r_dpo_loss(*ONE_PAIR, array(5), array(2), beta=0.1, alpha=0.05), [0.554355])
    close(r_dpo_loss(*ONE_PAIR, array(2), array(5), beta=0.1, alpha=0.05), [LOG2])  # 0.15 − 0.15


def test_r_dpo_is_dpo_with_the_charge_for_length_paid_back():
    np.testing.assert_array_equal(r_dpo_loss(*BATCH, *LENGTHS, beta=0.1, alpha=0), dpo_loss(*BATCH, beta=0.1))
    metrics = preference_metrics(*BATCH, beta=0.1)
    # β log π/π_ref = r − α|y|, so r is that plus α|y|.
    quality = [metrics[f"{side}_reward"] + 0.05 * n for side, n in zip(("chosen", "rejected"), LENGTHS, strict=True)]
    close(r_dpo_loss(*BATCH, *LENGTHS, beta=0.1, alpha=0.05), bradley_terry_loss(*quality))


def test_r_dpo_pulls_less_towards_a_longer_answer():
    lengths = array(1, 10, 100, 1000)
    loss = partial(r_dpo_loss, beta=0.1, alpha=0.01)
    pull = -gradients(lambda *sums: loss(*sums, lengths, jnp.full(4, 10.0)), *at(np.full(4, 1.5)))[0]
    close(pull, 0.1 * sigmoid([-0.06, -0.15, -1.05, -10.05]))  # −(0.15 + 0.01 · (|y_w| − 10))
    assert (np.diff(pull) < 0).all()


def test_simpo_by_hand():
    # Means −10/4 and −12/6: 2 · (−2.5 + 2) − 0.5 = −1.5; log(1 + e^1.5) = log 5.481689 = 1.701413.
    close(simpo_loss(array(-10), array(-12), array(4), array(6), beta=2, gamma=0.5), [1.701413])
    close(simpo_loss(array(-10), array(0), array(4), array(0), beta=2, gamma=0), [np.log1p(np.exp(5))])  # empty: mean 0


def test_simpo_of_single_tokens_is_dpo_without_a_reference():
    chosen, rejected = BATCH[:2]
    one = jnp.ones(4)
    close(simpo_loss(chosen, rejected, one, one, beta=0.3, gamma=0), dpo_loss(chosen, rejected, ZERO, ZERO, beta=0.3))
    means = [0.3 * x / n for x, n in zip((chosen, rejected), LENGTHS, strict=True)]
    close(simpo_loss(chosen, rejected, *LENGTHS, beta=0.3, gamma=0.4), bradley_terry_loss(*means, margin=0.4))


def test_simpo_does_not_care_how_often_an_answer_repeats_itself():
    """1, 2, 4 and 8 tokens of −1.5 against one of −1: SimPO's pull is that on one token, DPO's grows with them."""
    mask = np.arange(8) < np.array([[1], [2], [4], [8]])
    logps, rejected, lengths = jnp.full((4, 8), -1.5), jnp.full(4, -1.0), mask.sum(-1)

    def simpo(logps):
        return simpo_loss(masked_sum(logps, mask, axis=-1), rejected, lengths, jnp.ones(4), beta=2, gamma=0.5)

    def dpo(logps):
        return dpo_loss(masked_sum(logps, mask, axis=-1), rejected, ZERO, ZERO, beta=2)

    close(simpo(logps), np.full(4, simpo(logps)[0]))
    # −βσ(γ − β(−1.5 + 1)) = −2σ(1.5) in all, and each token its share; DPO: −2σ(2(1.5n − 1)) to each token.
    close(gradients(simpo, logps)[0], np.where(mask, -2 * sigmoid(1.5) / lengths[:, None], 0))
    close(gradients(dpo, logps)[0].sum(-1), [-2 * n * sigmoid(2 * (1.5 * n - 1)) for n in (1, 2, 4, 8)])


def test_tdpo_by_hand():
    # h = 1.5, D_w = 0.4, D_l = 1. TDPO1: 0.1 · (1.5 − 0.6) = 0.09, log(1 + e^−0.09) = 0.649159.
    # TDPO2 with α = 0.5: 0.1 · (1.5 − 0.3) = 0.12, log(1 + e^−0.12) = 0.634946.
    kl = array(0.4), array(1)
    close(tdpo_loss(*ONE_PAIR, *kl, beta=0.1, variant=1), [0.649159])
    close(tdpo_loss(*ONE_PAIR, *kl, beta=0.1, variant=2), [0.634946])
    close(tdpo_loss(*ONE_PAIR, *kl, beta=0.1), [0.634946])


KL = array(0.5, 2, 0, 1), array(1, 0.3, 0.7, 0)


@pytest.mark.parametrize("variant", [1, 2])
def test_tdpo_without_a_divergence_is_dpo(variant):
    close(tdpo_loss(*BATCH, ZERO, ZERO, beta=0.1, variant=variant), dpo_loss(*BATCH, beta=0.1))
    close(tdpo_loss(*BATCH, *KL, beta=0.1, alpha=0), dpo_loss(*BATCH, beta=0.1))


def test_tdpo1_is_bradley_terry_on_the_rewards_that_its_authors_log():
    metrics = preference_metrics(*BATCH, beta=0.1)
    logged = [metrics[f"{side}_reward"] + 0.1 * d for side, d in zip(("chosen", "rejected"), KL, strict=True)]
    close(tdpo_loss(*BATCH, *KL, beta=0.1, variant=1), bradley_terry_loss(*logged))
    # TDPO2 with α = 1 has the same value; its gradient is what differs.
    close(tdpo_loss(*BATCH, *KL, beta=0.1, alpha=1), bradley_terry_loss(*logged))


@pytest.mark.parametrize(("variant", "alpha"), [(1, 1), (2, 0.5), (2, 1)])
def test_the_gradient_of_tdpo(variant, alpha):
    chosen, rejected, _, _, chosen_kl, rejected_kl = gradients(
        partial(tdpo_loss, beta=0.2, alpha=alpha, variant=variant), *BATCH, *KL
    )
    weight = 0.2 * sigmoid(-0.2 * (H - alpha * (KL[1] - KL[0])))
    close(chosen, -weight)
    close(rejected, weight)
    close(rejected_kl, alpha * weight)
    close(chosen_kl, -weight if variant == 1 else ZERO)


# ---- KTO -------------------------------------------------------------------------------------------------------------

BOTH = jnp.array([True, False])


def test_kto_by_hand():
    # ℓ − z = log 3 at β = 1: σ = 3/4, so a good answer costs 1/4 and a bad one 3/4; times the weights 2 and 4.
    logps, ref, kl = array(LOG3 - 7, LOG3 - 7), array(-7.5, -7.5), 0.5
    close(kto_loss(logps, ref, BOTH, kl, beta=1), [1 / 4, 3 / 4])
    weights = dict(desirable_weight=2, undesirable_weight=4)
    close(kto_loss(logps, ref, BOTH, array(0.5, 0.5), beta=1, **weights), [1 / 2, 3])
    # Far away it costs nothing or its weight, at π = π_ref (z = 0) half of it.
    far = partial(kto_loss, ref_logps=array(0, 0), desirable=BOTH, kl=0.0, beta=0.1, **weights)
    close(far(array(1e4, 1e4)), [0, 4])
    close(far(array(-1e4, -1e4)), [2, 0])
    close(far(array(0, 0)), [1, 2])


def test_kto_is_the_probability_that_bradley_terry_gives_to_the_wrong_order():
    policy, z = BATCH[0], jnp.full(4, 0.7)
    every = jnp.ones(4, bool)
    good, bad = (kto_loss(policy, BATCH[2], kind, 0.7, beta=0.3) for kind in (every, ~every))
    close(good, 1 - np.exp(-bradley_terry_loss(0.3 * (policy - BATCH[2]), 0.3 * z)))
    close(good + bad, np.ones(4))


def test_the_gradient_of_kto_saturates_on_both_sides_and_spares_z():
    gain = np.array([-30, -1, 0, 2])
    desirable = jnp.array([True, True, False, False])

    def loss(logps, kl):
        return kto_loss(logps, ZERO, desirable, kl, beta=0.5, desirable_weight=2)

    by_logps, by_kl = gradients(loss, jnp.asarray(gain / 0.5 + 3, jnp.float32), jnp.full(4, 3.0))
    close(by_logps, 0.5 * np.array([-2, -2, 1, 1]) * sigmoid(gain) * sigmoid(-gain))  # λβσ(1 − σ)
    close(by_kl, ZERO)


def test_ktos_reference_point_by_hand():
    close(kto_kl(array(1, -0.5, 2.5), array(0, 0, 0)), 1)
    close(kto_kl(array(-10, -11), array(-9, -13)), 0.5)  # −1 and 2
    assert kto_kl(array(1, -0.5, -2.5), array(0, 0, 0)) == 0  # a KL is never negative, its estimate −2/3 would be
    close(gradients(kto_kl, array(1, 2), array(0, 0)), np.zeros((2, 2)))


def test_kto_on_pairs_by_hand():
    # β = log 2, so that σ(βk) = 2^k/(1 + 2^k). Chosen log-ratios 1, 3: z_w = 2; rejected −1, 0: z_l = max(0, −½) = 0.
    # First pair: 1 − σ(1β) = 1/3 and 1 − σ(3β) = 1/9; second: 1 − σ(3β) = 1/9 and 1 − σ(2β) = 1/5.
    pairs = array(-4, -2), array(-6, -5), array(-5, -5), array(-5, -5)
    close(kto_pair_loss(*pairs, beta=LOG2), [2 / 9, 7 / 45])
    close(kto_pair_loss(*BATCH[2:], *BATCH[2:], beta=0.1), np.full(4, 0.5))
    # The reference points are constants: no pair's loss moves another pair's answers.
    jacobian = np.asarray(jax.jacobian(lambda chosen: kto_pair_loss(chosen, *pairs[1:], beta=LOG2))(pairs[0]))
    close(jacobian, np.diag([-LOG2 / 2 * 2 / 9, -LOG2 / 2 * 8 / 81]))  # ½βσ(1 − σ): σ = 2/3, 8/9


def test_kto_on_pairs_is_kto_with_the_other_sides_mean():
    chosen, rejected, ref_chosen, ref_rejected = BATCH
    every = jnp.ones(4, bool)
    good = kto_loss(chosen, ref_chosen, every, kto_kl(rejected, ref_rejected), beta=0.3)
    bad = kto_loss(rejected, ref_rejected, ~every, kto_kl(chosen, ref_chosen), beta=0.3)
    close(kto_pair_loss(*BATCH, beta=0.3), (good + bad) / 2)


def test_ktos_means_go_on_over_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    here, whole = PartitionSpec("data"), PartitionSpec()

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=here, out_specs=(whole, here, here))
    def spread(chosen, rejected, ref_chosen, ref_rejected):
        pairs = chosen, rejected, ref_chosen, ref_rejected
        together, alone = (kto_pair_loss(*pairs, beta=0.3, axis_name=name) for name in ("data", None))
        return kto_kl(chosen, ref_chosen, axis_name="data"), together, alone

    z, together, alone = spread(*BATCH)
    close(z, kto_kl(BATCH[0], BATCH[2]))
    close(together, kto_pair_loss(*BATCH, beta=0.3))
    assert np.abs(alone - together).max() > 0.01  # each device its own mean


# ---- no reference ----------------------------------------------------------------------------------------------------

# Mean token probabilities 1/2 (3 tokens) and 1/4 (2 tokens): odds 1 and 1/3.
HALF_AND_QUARTER = array(3 * np.log(1 / 2)), array(2 * np.log(1 / 4)), array(3), array(2)


def test_orpo_by_hand():
    # The odds ratio is 3, −log σ(log 3) = log(4/3): log 2 + 0.5 · 0.287682 = 0.836988.
    close(orpo_loss(*HALF_AND_QUARTER, lam=0.5), [0.836988])
    close(orpo_loss(*HALF_AND_QUARTER, lam=0), [LOG2])  # SFT
    swapped = [HALF_AND_QUARTER[i] for i in (1, 0, 3, 2)]
    close(orpo_loss(*swapped, lam=1), [2 * LOG2 + np.log(4)])  # log 4 − log σ(−log 3)


def test_orpo_is_sft_and_bradley_terry_on_log_odds():
    chosen, rejected = BATCH[:2]
    p = [np.exp(np.float64(x) / n) for x, n in zip((chosen, rejected), LENGTHS, strict=True)]
    log_odds = [np.log(x / (1 - x)) for x in p]
    expected = -np.log(p[0]) + 0.5 * np.asarray(bradley_terry_loss(*log_odds), np.float64)
    close(orpo_loss(chosen, rejected, *LENGTHS, lam=0.5), expected)


def test_the_gradient_of_orpo():
    # Its section 4.3: δ = 1/(1 + odds ratio) = 1/4, times 1/(1 − P): chosen −1 − λ/4 · 2, rejected λ/4 · 4/3; per mean,
    # so a third of the one and half of the other per sum.
    chosen, rejected, *_ = gradients(partial(orpo_loss, lam=0.6), *HALF_AND_QUARTER)
    close(chosen, [-1.3 / 3])
    close(rejected, [0.2 / 2])


def test_orpo_at_certainty_is_capped():
    # log-odds at the cap: log(1/10⁻⁶) = 13.8155. Certain and right, certain and wrong (against 1/2), both certain.
    sums = array(0, -LOG2, 0), array(-LOG2, 0, -1e-9), jnp.ones(3), jnp.ones(3)
    close(orpo_loss(*sums, lam=1), [0, LOG2 + 13.8155, LOG2], atol=2e-5)
    chosen, rejected, *_ = gradients(partial(orpo_loss, lam=1), *sums)
    close(chosen, [-1, -3, -1], atol=1e-5)  # SFT alone; in the middle also −1/(1 − ½)
    close(rejected, [0, 0, 0], atol=1e-5)
    # Before the cap the pull on a rejected answer is as large as 1/(1 − P) says: 10⁵ at log P = −10⁻⁵.
    close(gradients(partial(orpo_loss, lam=1), array(-1), array(-1e-5), array(1), array(1))[1], [1e5], 1e-3)


def test_cpo_by_hand():
    # d = 2: log(1 + e^−0.2) = 0.598139, and 10/4 per token of the chosen answer.
    args = array(-10), array(-12), array(4)
    close(cpo_loss(*args, beta=0.1), [3.098139])
    close(cpo_loss(*args, beta=0.1, nll_weight=0.2), [1.098139])
    close(cpo_loss(*args, beta=0.1, label_smoothing=0.1), [3.118139])  # 0.1 · 0.2 more, as in cDPO
    close(gradients(partial(cpo_loss, beta=0.1), *args)[0], [-0.1 * sigmoid(-0.2) - 1 / 4])


def test_cpo_is_dpo_with_a_uniform_reference_and_sft():
    chosen, rejected = BATCH[:2]
    preference = dpo_loss(chosen, rejected, ZERO, ZERO, beta=0.2, label_smoothing=0.1)
    sft = orpo_loss(chosen, rejected, *LENGTHS, lam=0)
    out = cpo_loss(chosen, rejected, LENGTHS[0], beta=0.2, label_smoothing=0.1, nll_weight=0.7)
    close(out, preference + 0.7 * sft)


# ---- what is logged --------------------------------------------------------------------------------------------------


def test_preference_metrics_by_hand():
    metrics = {name: float(x[0]) for name, x in preference_metrics(*ONE_PAIR, beta=0.1).items()}
    assert metrics == pytest.approx({"chosen_reward": 0.1, "rejected_reward": -0.05, "margin": 0.15, "accuracy": 1})
    accuracy = preference_metrics(*at([-1, 0, 1]), beta=0.1)["accuracy"]
    assert accuracy.tolist() == [0, 0, 1] and accuracy.dtype == jnp.float32  # a tie is not right


def test_the_margin_is_what_dpo_is_a_function_of():
    metrics = preference_metrics(*BATCH, beta=0.3)
    close(metrics["margin"], 0.3 * H)
    close(jax.nn.softplus(-metrics["margin"]), dpo_loss(*BATCH, beta=0.3))
    close(bradley_terry_loss(metrics["chosen_reward"], metrics["rejected_reward"]), dpo_loss(*BATCH, beta=0.3))


# ---- divergences over the vocabulary ---------------------------------------------------------------------------------

# Probabilities 1/4, 3/4 against 1/2, 1/2, as logits with a constant that no softmax shows.
QUARTERS, HALVES = jnp.log(array(1, 3))[None] + 5, jnp.log(array(1, 1))[None] - 2
B, T, V = 3, 7, 11
Z, REF = 2 * normal(B, T, V), 2 * normal(B, T, V, seed=2)
MASK = np.random.default_rng(0).random((B, T)) < 0.7


def test_entropy_and_kl_by_hand():
    # KL(½, ½ ‖ ¼, ¾) = ½ log 2 + ½ log ⅔ = ½ log 4/3 = 0.143841; the other way ¼ log ½ + ¾ log 3/2 = 0.130812.
    close(token_kl(QUARTERS, HALVES), [0.143841])
    close(token_kl(HALVES, QUARTERS), [0.130812])
    close(entropy(QUARTERS), [0.562335])  # ¼ log 4 + ¾ log 4/3
    close(entropy(jnp.full((2, 50), 3.0)), np.full(2, np.log(50)))  # uniform
    # At temperature ½ the odds 1 : 3 are 1 : 9: ½ log 5 + ½ log 5/9 = log 5/3.
    close(token_kl(QUARTERS, HALVES, temperature=0.5), [np.log(5 / 3)])
    close(entropy(QUARTERS, temperature=0.5), [0.1 * np.log(10) + 0.9 * np.log(10 / 9)])
    two_states = jnp.concatenate([QUARTERS, HALVES]), jnp.concatenate([HALVES, QUARTERS])
    close(sequence_kl(*two_states, jnp.ones(2, bool)), 0.143841 + 0.130812)
    close(sequence_kl(*two_states, jnp.array([False, True])), 0.130812)


def test_kl_is_the_exact_expectation_of_the_log_ratio():
    tokens = np.broadcast_to(np.arange(V)[:, None, None], (V, B, T))  # each of the vocabulary in every state

    @jax.jit
    def everything(z, ref):
        logps = [token_logps(jnp.broadcast_to(x, (V, B, T, V)), tokens) for x in (z, ref)]
        kl = token_kl(z, ref), token_kl(ref, z), token_kl(jnp.zeros_like(z), z), sequence_kl(z, ref, MASK)
        return logps, kl, (entropy(z), entropy(ref)), expected_implicit_rewards(z, ref, beta=0.3)

    logps, (kl, swapped, to_uniform, summed), (h, ref_h), implicit = everything(Z, REF)
    policy, ref = np.float64(logps)
    p, q = np.exp(policy), np.exp(ref)
    close(kl, (q * (ref - policy)).sum(0))
    close(swapped, (p * (policy - ref)).sum(0))
    close(h, -(p * policy).sum(0))
    # Cross-entropy = entropy + KL; and the KL to a uniform distribution is what the entropy lacks to log V.
    close(-(q * policy).sum(0), ref_h + kl)
    close(to_uniform, np.log(V) - h)
    close(implicit, -0.3 * kl)
    close(summed, np.where(MASK, kl, 0).sum(-1))


def test_kl_is_positive_but_between_equals():
    assert (token_kl(Z, REF) > 0.1).all()  # Gibbs
    close(token_kl(Z, Z + 3), np.zeros((B, T)), atol=1e-6)
    near = token_kl(Z, Z + 1e-2 * REF)
    assert (near > 0).all() and (near < 1e-3).all()


def test_chunks_change_neither_numbers_nor_gradients():
    """And both gradients are those of the formulas, p − q and q(log q/p − KL), −p(log p + H), over a mask."""
    weight = normal(B, T, seed=3)
    policy, ref = (np.float64(jax.nn.log_softmax(x / 0.7)) for x in (Z, REF))
    p, q = np.exp(policy), np.exp(ref)
    kl, h = (q * (ref - policy)).sum(-1), -(p * policy).sum(-1)
    outer = np.where(MASK, weight / 0.7, 0)[..., None]
    expected = (
        (np.where(MASK, kl, 0), (outer * (p - q), outer * q * (ref - policy - kl[..., None]))),
        (np.where(MASK, h, 0), (outer * -p * (policy + h[..., None]),)),
    )

    @jax.jit
    def everything(z, ref):
        def both(function, *logits):
            out, pullback = jax.vjp(function, *logits)
            return out, pullback(weight)

        settings = [dict(temperature=0.7, chunk=chunk) for chunk in (1, 2, 3, 7, 128)]
        return [
            (
                both(lambda z, ref, numbers=numbers: token_kl(z, ref, MASK, **numbers), z, ref),
                both(lambda z, numbers=numbers: entropy(z, MASK, **numbers), z),
            )
            for numbers in settings
        ]

    for out in everything(Z, REF):
        jax.tree.map(partial(close, atol=2e-6), out, expected)


def test_chunks_keep_float32_logits_out_of_memory():
    """The largest temporary of the gradient's compiled program, for bfloat16 logits and a vocabulary of 32,768."""
    shape = (2, 64, 32_768)
    logits, mask = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[:-1], bool)

    def temporaries(loss):
        compiled = (
            jax.jit(jax.grad(lambda z, ref, mask: loss(z, ref, mask).sum())).lower(logits, logits, mask).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes / (4 * np.prod(shape))

    def plain(z, ref, mask):
        z, ref = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (z, ref))
        return masked_sum(jnp.sum(jnp.exp(ref) * (ref - z), axis=-1), mask)

    assert temporaries(plain) > 1  # several whole arrays in float32
    assert temporaries(partial(sequence_kl, chunk=2)) < 0.15  # two positions of 64, of a few arrays
    assert temporaries(lambda z, _, mask: entropy(z, mask, chunk=2)) < 0.15


def test_minus_infinity_forbids_a_token():
    both = jnp.concatenate([QUARTERS, jnp.full((1, 1), -jnp.inf)], axis=-1)
    ref = jnp.concatenate([HALVES, jnp.full((1, 1), -jnp.inf)], axis=-1)
    close(token_kl(both, ref), [0.143841])
    close(entropy(both), [0.562335])
    by_policy, by_ref = gradients(token_kl, both, ref)
    close(by_policy, [[-1 / 4, 1 / 4, 0]])  # p − q
    # q(log q/p − KL): ½(log 2 − ½ log 4/3) = ¼ log 3, and the reverse.
    close(by_ref, [[LOG3 / 4, -LOG3 / 4, 0]])
    close(gradients(entropy, both)[0], [[3 / 16 * LOG3, -3 / 16 * LOG3, 0]])  # −¼(log ¼ + H), H = log 4 − ¾ log 3
    # A token that the reference never draws costs nothing; one that the policy never draws, everything.
    open_policy = jnp.concatenate([QUARTERS, jnp.full((1, 1), jnp.log(4) + 5)], axis=-1)  # 1/8, 3/8, 1/2
    close(token_kl(open_policy, ref), [0.143841 + LOG2])
    assert token_kl(ref, open_policy) == jnp.inf
    assert np.isfinite(gradients(token_kl, ref, open_policy)[0]).all()


def test_tdpo_from_logits_starts_as_dpo_does():
    """At π = π_ref it is log 2, and D has no slope there; a step on, D counts and the two variants differ."""
    tokens = np.random.default_rng(4).integers(0, V, (2, B, T))
    start = np.stack([REF, REF])

    def loss(z, variant):
        sums = [
            masked_sum(token_logps(x, y), MASK, axis=-1)
            for x, y in zip((*z, REF, REF), (*tokens, *tokens), strict=True)
        ]
        kl = [sequence_kl(x, REF, MASK) for x in z]
        return tdpo_loss(*sums, *kl, beta=0.1, variant=variant) if variant else dpo_loss(*sums, beta=0.1)

    @jax.jit
    def both(z):
        pulled = [jax.vjp(partial(loss, variant=variant), z) for variant in (0, 1, 2)]
        return [(out, pullback(jnp.ones(B))[0]) for out, pullback in pulled]

    (dpo, slope), *variants = both(start)
    close(dpo, np.full(B, LOG2))
    for out, gradient in variants:
        close(out, dpo)
        close(gradient, slope)
    (_, first), (_, second) = both(start - 10 * slope)[1:]
    assert np.abs(first - second).max() > 1e-3
