"""Composed, placed, segmented and shaped token rewards: worked by hand, tied to each other, and the authors' quirks."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rto_jax.losses import (
    RewardTerm,
    bradley_terry_loss,
    compose_rewards,
    dpo_loss,
    gae,
    implicit_token_rewards,
    masked_sum,
    monte_carlo_returns,
    place_rewards,
    prefix_sums,
    rto_token_rewards,
    segment_ends,
    shape_rewards,
)

B, T = 6, 9
RNG = np.random.default_rng(0)
MASK = RNG.random((B, T)) < 0.6
MASK[0], MASK[1], MASK[:, 4] = True, False, False  # a full row, a row without tokens, a hole in every row
DPO, REF, POLICY = (-RNG.exponential(size=(B, T)).astype(np.float32) for _ in range(3))
SCORE = np.array([7.0, -3.0, 15.0, -20.0, 0.4, 20.0], np.float32)
TOKENS = RNG.integers(0, 5, (B, T))
ENDS = np.asarray(segment_ends(TOKENS, MASK, delimiters=(1, 3)))
PLACEMENTS = ("token", "segment", "last", "shaping")
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(desired, np.float64), rtol=rtol, atol=atol)


def array(*numbers):
    return jnp.array(numbers, jnp.float32)


def oracle_place(rewards, mask, ends, placement):
    """A row, position by position."""
    out, held, real = np.zeros(len(mask)), 0.0, np.flatnonzero(mask)
    for t in real:
        at_end = t == real[-1]
        if placement in ("token", "shaping"):
            out[t] = rewards[t]
        held += rewards[t]
        if placement == "segment" and (ends[t] or at_end):
            out[t], held = held, 0.0
        if placement == "last" and at_end:
            out[t] = held
        if placement == "shaping" and at_end:
            out[t] -= held
    return out


# ---- RTO and its ablations -------------------------------------------------------------------------------------------

# One response of four tokens, the second a full stop. log π_dpo/π_ref = (2, −1, 3, 0), log π/π_ref = (1, 0, −1, 2),
# β₁ = 0.5, β₂ = 0.1, score 1. Dense: (1, −0.5, 1.5, 0), sum 2; KL: (−0.1, 0, 0.1, −0.2); the score joins the last.
# Under a clip of 1 the dense term is (1, −0.5, 1, 0), sum 1.5: the clip holds each token, not what is gathered.
BY_HAND = {
    ("token", None): [0.9, -0.5, 1.6, 0.8],
    ("segment", None): [-0.1, 0.5, 0.1, 2.3],  # 1 − 0.5 at the full stop, 1.5 + 0 at the end
    ("last", None): [-0.1, 0, 0.1, 2.8],
    ("shaping", None): [0.9, -0.5, 1.6, -1.2],  # the last token pays 2 back
    ("token", 1.0): [0.9, -0.5, 1.1, 0.8],
    ("segment", 1.0): [-0.1, 0.5, 0.1, 1.8],
    ("last", 1.0): [-0.1, 0, 0.1, 2.3],
    ("shaping", 1.0): [0.9, -0.5, 1.1, -0.7],
}
WHERE = ("0001111", "1111000", "0110011", "1010101")  # where the response stands in its row


def spread(values, where):
    """The values at the ones of `where`, NaN elsewhere."""
    out = np.full(len(where), np.nan, np.float32)
    out[[c == "1" for c in where]] = values
    return out


@pytest.mark.parametrize(("placement", "clip"), BY_HAND)
def test_rto_semi_rto_ddpo_and_rs_ppo_by_hand(placement, clip):
    for where in WHERE:
        mask = np.array([c == "1" for c in where])
        ratio, kl, ref = (spread(x, where) for x in ([2, -1, 3, 0], [1, 0, -1, 2], [-1, -2, -3, -4]))
        tokens = np.nan_to_num(spread([11, 7, 12, 13], where), nan=7).astype(int)  # full stops in the padding
        rewards = rto_token_rewards(
            *(ref + ratio, ref, ref + kl, 1.0, mask),
            **dict(beta1=0.5, beta2=0.1, dpo_clip=clip, placement=placement),
            ends=segment_ends(tokens, mask, delimiters=[7]),
        )
        close(rewards, np.nan_to_num(spread(BY_HAND[placement, clip], where)))


def test_the_placement_moves_rewards_and_rs_ppo_takes_them_back():
    totals = {key: sum(rewards) for key, rewards in BY_HAND.items()}
    kl = -0.2
    for placement in ("token", "segment", "last"):
        close([totals[placement, None], totals[placement, 1.0]], [2 + kl + 1, 1.5 + kl + 1])
    close([totals["shaping", None], totals["shaping", 1.0]], [kl + 1, kl + 1])


def oracle_rto(dpo, ref, policy, score, mask, ends, *, beta1, beta2, beta3, clip, placement):
    """A row in float64: the dense term clipped, then placed; KL where it is; the score at the last token."""
    dense = beta1 * (dpo - ref)
    if clip is not None:
        dense = np.minimum(np.maximum(dense, -clip), clip)
    out = oracle_place(dense, mask, ends, placement)
    for t in np.flatnonzero(mask):
        out[t] += -beta2 * (policy[t] - ref[t]) + (0 if mask[t + 1 :].any() else beta3 * score)
    return out


@every_placement
@pytest.mark.parametrize("clip", [None, 0.3])
def test_rto_equals_the_loops_in_numpy(placement, clip):
    numbers = dict(beta1=0.5, beta2=0.1, beta3=0.7, placement=placement)
    rewards = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, dpo_clip=clip, ends=ENDS)
    rows = zip(*(x.astype(np.float64) for x in (DPO, REF, POLICY, SCORE)), MASK, ENDS, strict=True)
    close(rewards, np.stack([oracle_rto(*row, **numbers, clip=clip) for row in rows]))


@pytest.mark.parametrize("clip", [None, 0.3, 0.01])
def test_rs_ppo_earns_the_score_whatever_the_clip_and_the_mask(clip):
    rewards = rto_token_rewards(
        *(DPO, REF, POLICY, SCORE, MASK), beta1=0.5, beta2=0.1, beta3=0.7, dpo_clip=clip, placement="shaping"
    )
    kl = implicit_token_rewards(POLICY, REF, MASK, beta=0.1)
    score = np.where(MASK.any(-1), 0.7 * SCORE, 0)  # a row without tokens earns nothing
    close((rewards + kl).sum(-1), score)
    plain = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, beta1=0, beta2=0.1, beta3=0.7)
    assert np.abs(rewards - plain).max() > 0.005  # the tokens differ from PPO's


def test_rs_ppo_is_ppos_reward_shaped_by_what_the_prefix_has_earned():
    """Φ(s_t) = Σ_{i<t} of the dense term, clipped: Ng et al.'s shaping, so the optimal policy is PPO's."""
    numbers = dict(beta1=0.5, beta2=0.1, dpo_clip=0.3)
    dense = np.clip(implicit_token_rewards(DPO, REF, MASK, beta=0.5), -0.3, 0.3)
    ppo = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, beta1=0, beta2=0.1)
    rs_ppo = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, placement="shaping")
    before = prefix_sums(dense, MASK) - dense
    close(shape_rewards(ppo, before, MASK), rs_ppo, atol=1e-5)
    # So a critic that knows the prefix loses nothing: V − Φ in RS-PPO gives PPO's advantages.
    value = DPO * POLICY
    close(gae(rs_ppo, value - before, MASK)[0], gae(ppo, value, MASK)[0], atol=1e-5)


def test_undiscounted_returns_agree_where_a_segment_starts():
    """Semi-RTO delays what RTO pays to the segment's end, and no further; DDPO's agree at the first token only."""
    token, segment, last = (
        monte_carlo_returns(place_rewards(DPO, MASK, ENDS, placement=p), MASK) for p in ("token", "segment", "last")
    )
    starts, whole = np.zeros_like(MASK), np.zeros_like(MASK)
    for row, real in enumerate(MASK):
        real = np.flatnonzero(real)
        starts[row, real[:1]] = whole[row, real[:1]] = True
        starts[row, real[1:][ENDS[row, real[:-1]]]] = True
    assert starts.sum() > whole.sum() + 3
    close(token[starts], segment[starts], atol=1e-5)
    close(token[whole], last[whole], atol=1e-5)
    assert np.abs(token - segment)[MASK & ~starts].min() > 1e-3
    assert np.abs(token - last)[MASK & ~whole].min() > 1e-3


@every_placement
def test_what_stands_at_masked_positions_changes_nothing(placement):
    @jax.jit
    def everything(dpo, ref, policy, score, dpo_ref):
        def rewards(*arrays):
            return rto_token_rewards(
                *arrays[:4],
                MASK,
                **dict(beta1=0.5, beta2=0.1, dpo_clip=0.3, placement=placement, ends=ENDS, dpo_ref_logps=arrays[4]),
            )

        out, pullback = jax.vjp(rewards, dpo, ref, policy, score, dpo_ref)
        return out, pullback(POLICY * DPO)

    arrays = DPO, REF, POLICY, SCORE, REF - 1
    clean, gradients = everything(*arrays)
    assert np.isfinite(clean).all() and all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in gradients[:4])
    for junk in (np.nan, np.inf, 1e30):
        dirty = [np.where(MASK if x.ndim == 2 else MASK.any(-1), x, np.float32(junk)) for x in arrays]
        jax.tree.map(np.testing.assert_array_equal, everything(*dirty), (clean, gradients))
    assert not clean[~MASK].any() and not any(g[~MASK].any() for g in gradients if g.ndim == 2)


@every_placement
def test_gradients_are_those_of_finite_differences(placement):
    @jax.jit
    def function(*arrays):
        return rto_token_rewards(*arrays, MASK, beta1=0.5, beta2=0.1, placement=placement, ends=ENDS)

    check_grads(function, (DPO, REF, POLICY, SCORE), order=1, modes=("fwd", "rev"), atol=5e-3, rtol=5e-3)


# ---- composition -----------------------------------------------------------------------------------------------------


def four_terms(score=SCORE, dense=DPO - REF):
    return {
        "implicit": RewardTerm(dense, scale=0.5, clip=0.3, placement="shaping"),
        "length": RewardTerm(jnp.ones(MASK.shape), scale=-1.1),
        "kl": RewardTerm(REF - POLICY, scale=0.1),
        "score": RewardTerm(score, scale=0.7, clip=10),
    }


def test_a_sum_of_terms_by_hand():
    out = compose_rewards(
        {
            "score": RewardTerm(array(30), scale=0.5, clip=10),  # 15, held at 10
            "dense": RewardTerm(array(1, -4, 2)[None], scale=-0.5, clip=1.5),  # −0.5, 2 held at 1.5, −1
            "length": RewardTerm(np.ones((1, 3)), scale=-0.25),
        },
        np.array([[True, True, False]]),
    )
    close(out.parts["score"], [[0, 10, 0]])
    close(out.parts["dense"], [[-0.5, 1.5, 0]])
    close(out.parts["length"], [[-0.25, -0.25, 0]])
    close(out.rewards, [[-0.75, 11.25, 0]])
    close(out.totals["score"], [10])
    close(out.totals["dense"], [1])
    close(out.totals["length"], [-0.5])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["op by op", "jit"])
def test_the_parts_add_up_to_the_rewards_bit_for_bit(transform):
    """In the order of the dict, which jit sorts by name; with constant terms too, which XLA would add up first."""
    out = transform(lambda score, dense: compose_rewards(four_terms(score, dense), MASK))(SCORE, DPO - REF)
    total = np.zeros_like(DPO)
    for part in out.parts.values():
        total += part
    np.testing.assert_array_equal(out.rewards, total)
    for name, part in out.parts.items():
        close(out.totals[name], part.sum(-1))
    assert set(out.parts) == set(out.totals) == {"implicit", "kl", "score", "length"}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(out))


def test_what_each_term_earns():
    totals = compose_rewards(four_terms(), MASK).totals
    close(totals["length"], -1.1 * MASK.sum(-1))
    close(totals["score"], np.where(MASK.any(-1), np.clip(0.7 * SCORE, -10, 10), 0))
    close(totals["kl"], 0.1 * masked_sum(REF - POLICY, MASK, axis=-1))
    close(totals["implicit"], np.zeros(B))  # shaping


def test_rto_is_a_sum_of_three_terms():
    numbers = dict(beta1=0.5, beta2=0.1, beta3=0.7)
    for placement in PLACEMENTS:
        terms = {
            "implicit": RewardTerm(DPO - REF, 0.5, 0.3, placement),
            "kl": RewardTerm(REF - POLICY, 0.1),
            "score": RewardTerm(SCORE, 0.7),
        }
        rto = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, dpo_clip=0.3, placement=placement, ends=ENDS)
        np.testing.assert_array_equal(compose_rewards(terms, MASK, ends=ENDS).rewards, rto)


@pytest.mark.parametrize("placement", [*PLACEMENTS, "whole"])
def test_a_scale_of_zero_switches_a_term_off_even_nan(placement):
    whole = placement == "whole"
    junk = np.full_like(SCORE if whole else DPO, np.nan)

    @jax.jit
    def rewards(junk, scale):
        off = RewardTerm(junk, scale, 0.3) if whole else RewardTerm(junk, scale, 0.3, placement)
        return compose_rewards({"off": off, "score": RewardTerm(SCORE)}, MASK, ends=ENDS).rewards

    without = compose_rewards({"score": RewardTerm(SCORE)}, MASK).rewards
    np.testing.assert_array_equal(rewards(junk, 0.0), without)
    assert not np.asarray(jax.grad(lambda x: rewards(x, 0.0).sum())(junk)).any()
    assert np.isnan(rewards(junk, 1.0)).any()


def test_scales_and_clips_may_be_traced_and_mapped_over():
    grid = list(itertools.product([-1.0, 0.0, 0.5], [0.1, 1e3]))

    def rewards(scale, clip):
        return compose_rewards({"a": RewardTerm(DPO, scale, clip, "last"), "b": RewardTerm(SCORE, scale)}, MASK).rewards

    mapped = jax.jit(jax.vmap(rewards))(*jnp.array(grid).T)
    for out, (scale, clip) in zip(mapped, grid, strict=True):
        close(out, rewards(scale, clip))


def test_terms_of_more_leading_dimensions_and_of_none():
    cube = compose_rewards(
        {"dense": RewardTerm(DPO.reshape(2, 3, T), placement="last"), "score": RewardTerm(SCORE.reshape(2, 3))},
        MASK.reshape(2, 3, T),
    )
    flat = compose_rewards({"dense": RewardTerm(DPO, placement="last"), "score": RewardTerm(SCORE)}, MASK)
    jax.tree.map(lambda a, b: close(a, b.reshape(a.shape)), cube, flat)
    row = compose_rewards({"dense": RewardTerm(DPO[0], placement="last"), "score": RewardTerm(SCORE[0])}, MASK[0])
    jax.tree.map(lambda a, b: close(a, b[0]), row, flat)


# ---- placement -------------------------------------------------------------------------------------------------------


@every_placement
def test_placement_equals_the_loops_in_numpy(placement):
    placed = place_rewards(DPO, MASK, ENDS, placement=placement)
    expected = [oracle_place(*row, placement) for row in zip(DPO.astype(np.float64), MASK, ENDS, strict=True)]
    close(placed, expected)
    total = np.zeros(B) if placement == "shaping" else masked_sum(DPO, MASK, axis=-1)
    close(placed.sum(-1), total, atol=1e-5)
    close(place_rewards(placed, MASK, ENDS, placement=placement), placed)  # placed once is placed


def test_semi_rto_lies_between_ddpo_and_rto():
    nowhere, everywhere = np.zeros_like(MASK), np.ones_like(MASK)
    segment = partial(place_rewards, DPO, MASK, placement="segment")
    close(segment(nowhere), place_rewards(DPO, MASK, placement="last"))
    np.testing.assert_array_equal(segment(everywhere), place_rewards(DPO, MASK, placement="token"))
    loose = np.isin(TOKENS, (1, 3))
    assert (loose & ~MASK).any()
    np.testing.assert_array_equal(segment(loose), segment(ENDS))  # an end in a hole is none


def test_segments_keep_their_digits_on_a_long_row():
    """4,096 tokens: a first segment worth 10⁶, then segments of 16 tokens near ±10⁻³."""
    length, every = 4096, 16
    rewards = np.random.default_rng(1).normal(size=length).astype(np.float32) * 1e-3
    rewards[:every] = 1e6 / every
    ends = np.arange(length) % every == every - 1
    expected = rewards.astype(np.float64).reshape(-1, every).sum(1)
    placed = jax.jit(partial(place_rewards, placement="segment"))(rewards, np.ones(length, bool), ends)
    close(placed[ends], expected, rtol=1e-5, atol=1e-9)
    assert not placed[~ends].any()
    # Differences of a float32 prefix sum, whose steps near 10⁶ are 1/16, hold nothing of them.
    prefix = np.cumsum(rewards, dtype=np.float32)[ends]
    assert np.abs(np.diff(prefix, prepend=np.float32(0)) - expected).max() > 2e-3 < np.abs(expected[1:]).max()


def test_segment_ends_by_hand():
    tokens = np.array([[5, 7, 9, 7, 5, 9], [7, 5, 5, 5, 7, 9], [7, 7, 7, 7, 7, 7], [5, 7, 5, 5, 5, 5]])
    mask = np.array([[1, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]], bool)
    expected = [[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1]]
    np.testing.assert_array_equal(segment_ends(tokens, mask, delimiters=[7]), np.array(expected, bool))
    expected[0][2] = 1  # 9 is another delimiter; those behind the response don't count
    np.testing.assert_array_equal(segment_ends(tokens, mask, delimiters=(7, 9)), np.array(expected, bool))
    only_last = segment_ends(tokens, mask, delimiters=[])
    np.testing.assert_array_equal(only_last, np.array([[0, 0, 0, 0, 1, 0], expected[1], [0] * 6, [0] * 5 + [1]], bool))
    jitted = jax.jit(partial(segment_ends, delimiters=(7, 9)))
    np.testing.assert_array_equal(jitted(jnp.asarray(tokens), mask), np.array(expected, bool))


# ---- shaping and prefixes --------------------------------------------------------------------------------------------


def test_shaping_by_hand():
    rewards, potential = array(1, 2, 3), array(0.5, 1, -1)
    # 1 + 1 − 0.5, 2 − 1 − 1, 3 + 0 + 1; at γ = 0.5: 1 + 0.5 − 0.5, 2 − 0.5 − 1, 3 + 1.
    close(shape_rewards(rewards, potential, jnp.ones(3, bool)), [1.5, 0, 4])
    close(shape_rewards(rewards, potential, jnp.ones(3, bool), gamma=0.5), [1, 0.5, 4])
    # The next *token*'s potential, over a hole and with padding on both sides.
    mask = np.array([False, True, True, False, False, True, False])
    nan = np.nan
    holes = shape_rewards(array(nan, 1, 2, nan, nan, 3, nan), array(nan, 0.5, 1, nan, nan, -1, nan), mask)
    close(holes, [0, 1.5, 0, 0, 0, 4, 0])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_moves_the_total_by_a_constant_and_no_advantage(gamma):
    shaped = shape_rewards(DPO, REF, MASK, gamma=gamma)
    first = np.array([REF[row, np.flatnonzero(real)[0]] if real.any() else 0 for row, real in enumerate(MASK)])
    start = np.zeros_like(MASK)
    start[np.arange(B), MASK.argmax(-1)] = MASK.any(-1)
    discounted = [monte_carlo_returns(x, MASK, gamma=gamma)[start] for x in (shaped, DPO)]
    close(discounted[0], discounted[1] - first[MASK.any(-1)], atol=1e-5)
    if gamma == 1:
        close(shaped.sum(-1), masked_sum(DPO, MASK, axis=-1) - first, atol=1e-5)
    for lam in (0.0, 0.95, 1.0):
        plain, _ = gae(DPO, POLICY, MASK, gamma=gamma, lam=lam)
        moved, _ = gae(shaped, POLICY - REF, MASK, gamma=gamma, lam=lam)
        close(moved, plain, atol=1e-5)
    assert np.abs(gae(shaped, POLICY, MASK, gamma=gamma)[0] - plain).max() > 0.1  # the critic must move along


def test_shaping_is_undone_by_the_opposite_potential():
    close(shape_rewards(shape_rewards(DPO, REF, MASK), -REF, MASK), np.where(MASK, DPO, 0))


def test_prefix_sums_by_hand():
    mask = np.array([False, True, True, False, True, False])
    close(prefix_sums(array(9, 1, 2, np.nan, -4, 9), mask), [0, 1, 3, 0, -1, 0])


def test_prefix_sums_are_the_implicit_rewards_of_the_prefixes():
    rewards = implicit_token_rewards(DPO, REF, MASK, beta=0.3)
    sums = prefix_sums(rewards, MASK)
    cut = MASK & np.tri(T, dtype=bool)[:, None]  # [T, B, T]: the responses up to each position

    def everywhere(x):
        return np.broadcast_to(x, cut.shape)

    prefixes = implicit_token_rewards(everywhere(DPO), everywhere(REF), cut, beta=0.3).sum(-1).T
    close(sums, np.where(MASK, prefixes, 0), atol=1e-5)
    # The last is the implicit reward of the answer, on which DPO's pairs are Bradley–Terry pairs.
    answers = np.stack([sums[row, np.flatnonzero(MASK[row])[-1]] for row in (0, 2)])
    chosen, rejected, ref_chosen, ref_rejected = (masked_sum(x[row], MASK[row]) for x in (DPO, REF) for row in (0, 2))
    dpo = dpo_loss(*(x[None] for x in (chosen, rejected, ref_chosen, ref_rejected)), beta=0.3)
    close(bradley_terry_loss(answers[:1], answers[1:]), dpo, atol=1e-5)


# ---- the reference of the DPO model ----------------------------------------------------------------------------------


def test_a_reference_of_its_own_for_the_dpo_model():
    numbers = dict(beta1=0.5, beta2=0.1)
    plain = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers)
    own = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, dpo_ref_logps=REF - 2)
    close(own, plain + np.where(MASK, np.float32(1), 0), atol=1e-5)  # 0.5 · 2, and the KL keeps its reference
    same = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, dpo_ref_logps=REF)
    np.testing.assert_array_equal(same, plain)


# ---- what the authors' code computes ---------------------------------------------------------------------------------


def authors_rewards(dpo, ref, old, score, mask, scale, clip, kl_coef):
    """Their computation, in float64: multiply by the mask, scatter the score to the last action token, add up."""
    action = mask.astype(np.float64)
    token = (dpo - ref) * action
    if scale != 1 and scale > 0:
        token = scale * token
    if clip is not None and clip > 0:
        token = np.clip(token, -clip, clip)
    kl_coef = kl_coef if kl_coef > 0 else 0.0
    reward = token + -kl_coef * ((old - ref) * action)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    reward[np.arange(len(mask)), last] += np.clip(score, -10, 10)
    return reward


SOME = MASK.any(-1)  # theirs pays the score of a response without tokens at the end of its row
ROWS = [x[SOME] for x in (DPO, REF, POLICY, SCORE, MASK)]


@pytest.mark.parametrize("clip", [None, 0, -1, 0.05])
@pytest.mark.parametrize("traced", [False, True])
def test_official_parity_over_a_grid(clip, traced):
    exact = [x.astype(np.float64) for x in ROWS[:4]]

    def rewards(beta1, beta2, dpo_clip):
        return rto_token_rewards(*ROWS, beta1=beta1, beta2=beta2, dpo_clip=dpo_clip, official_parity=True)

    def no_clip(beta1, beta2, _):
        return rewards(beta1, beta2, None)

    run = jax.jit(no_clip if clip is None else rewards) if traced else rewards
    for scale, kl in itertools.product([0, -1, 0.05, 1], [-0.1, 0, 0.01]):
        close(run(scale, kl, clip), authors_rewards(*exact, ROWS[4], scale, clip, kl), atol=1e-5)


def test_without_a_quirk_both_modes_agree():
    numbers = dict(beta1=0.05, beta2=0.01, dpo_clip=0.05)
    small = SCORE / 4
    default = rto_token_rewards(DPO, REF, POLICY, small, MASK, **numbers)
    close(rto_token_rewards(DPO, REF, POLICY, small, MASK, **numbers, official_parity=True), default)


def quirk(name, **changed):
    return pytest.param(dict(beta1=0.05, beta2=0.01) | changed, id=name)


@pytest.mark.parametrize(
    "numbers",
    [
        quirk("a scale of 0 is 1", beta1=0),
        quirk("the score is clamped", score=SCORE),
        quirk("the DPO model's reference is not looked at", dpo_ref_logps=REF - 2),
    ],
)
def test_each_quirk_differs_from_the_default(numbers):
    score = numbers.pop("score", SCORE / 4)
    default, theirs = (
        rto_token_rewards(DPO, REF, POLICY, score, MASK, **numbers, official_parity=parity) for parity in (False, True)
    )
    assert np.abs(default - theirs).max() > 0.05


@pytest.mark.parametrize(
    ("argument", "numbers"),
    [("beta1", dict(beta1=-1)), ("beta2", dict(beta2=-0.1)), ("dpo_clip", dict(dpo_clip=0))],
)
def test_what_the_authors_code_takes_and_the_default_does_not(argument, numbers):
    numbers = dict(beta1=0.05, beta2=0.01) | numbers
    rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, official_parity=True)
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers)


def test_official_parity_never_reads_the_dpo_reference_and_has_no_beta3():
    numbers = dict(beta1=0.05, beta2=0.01, official_parity=True)
    plain = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers)
    junk = np.full_like(REF, np.nan)
    np.testing.assert_array_equal(
        rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, dpo_ref_logps=junk), plain
    )
    for one in (1, 1.0, np.float32(1)):
        np.testing.assert_array_equal(rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, beta3=one), plain)
    for other in (0, 0.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="^beta3 must be 1 with official_parity"):
            rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, beta3=other)


# ---- errors ----------------------------------------------------------------------------------------------------------

ONE, REAL = np.ones((2, 3)), np.ones((2, 3), bool)


def composed(*term, mask=REAL, **keywords):
    return lambda: compose_rewards({"mine": RewardTerm(*term, **keywords)}, mask)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("terms is empty", lambda: compose_rewards({}, REAL)),
        ("mask must be boolean", composed(ONE, mask=np.ones((2, 3)))),
        (r"mask has shape \(\)", composed(1.0, mask=np.bool_(True))),
        (r"mask has shape \(0, 3\)", composed(np.ones((0, 3)), mask=np.ones((0, 3), bool))),
        (r"mask has shape \(2, 3\), but mine has shape \(2, 4\)", composed(np.ones((2, 4)))),
        (r"mine has shape \(3,\), but mask has shape \(2, 3\)", composed(np.ones(3))),
        ("scale of mine must be", composed(ONE, float("nan"))),
        (r"scale of mine must be a number, but it has shape \(2,\)", composed(ONE, np.ones(2))),
        ("clip of mine must be above 0, but it is 0", composed(ONE, clip=0)),
        ("clip of mine must be above 0, but it is -1", composed(ONE, clip=-1)),
        ("placement must be one of token, segment, last, shaping, but it is 'eos'", composed(ONE, placement="eos")),
        ('ends must be given for placement="segment"', composed(ONE, placement="segment")),
        (
            "ends must be boolean",
            lambda: place_rewards(ONE, REAL, np.ones((2, 3)), placement="segment"),
        ),
        (
            r"ends has shape \(2, 2\), but rewards has shape \(2, 3\)",
            lambda: place_rewards(ONE, REAL, np.ones((2, 2), bool), placement="segment"),
        ),
        (
            r"mask has shape \(2, 3\), but rewards has shape \(2, 2\)",
            lambda: place_rewards(ONE[:, :2], REAL, placement="token"),
        ),
        ("tokens must be integers", lambda: segment_ends(ONE, REAL, delimiters=[1])),
        (
            r"mask has shape \(2, 3\), but tokens has shape \(2, 2\)",
            lambda: segment_ends(np.ones((2, 2), int), REAL, delimiters=[1]),
        ),
        (
            r"potentials has shape \(2, 2\), but rewards has shape \(2, 3\)",
            lambda: shape_rewards(ONE, ONE[:, :2], REAL),
        ),
        ("gamma must be at least 0, at most 1, but it is 1.1", lambda: shape_rewards(ONE, ONE, REAL, gamma=1.1)),
        (r"mask has shape \(2, 3\), but x has shape \(2, 2\)", lambda: prefix_sums(ONE[:, :2], REAL)),
        (
            r"dpo_ref_logps has shape \(2, 2\), but dpo_logps has shape \(2, 3\)",
            lambda: rto_token_rewards(ONE, ONE, ONE, ONE[:, 0], REAL, beta1=1, beta2=1, dpo_ref_logps=ONE[:, :2]),
        ),
        (
            "placement must be one of",
            lambda: rto_token_rewards(ONE, ONE, ONE, ONE[:, 0], REAL, beta1=1, beta2=1, placement="sentence"),
        ),
        (
            "beta1 must be",
            lambda: rto_token_rewards(
                ONE, ONE, ONE, ONE[:, 0], REAL, beta1=float("nan"), beta2=1, official_parity=True
            ),
        ),
    ],
)
def test_a_wrong_argument_is_named(message, call):
    with pytest.raises(ValueError, match=f"^{message}"):
        jax.eval_shape(call)
