"""RTO's theory on problems small enough to be exact (arXiv 2404.18922, sections 3.3, 4.1, B and C). NumPy, float64.

**How many responses must be read to find the best one?** A judge π* gives each response of H tokens, of A kinds each,
its probability; the learner is told log π*(y) alone, or all the H token rewards log π*(y_h | y_<h). Let π*(y*) = A^−ξ,
and call a node *high* when its prefix has probability at least A^−ξ. N holds the nodes that are not high and whose
parent is (eq. 3.7), N* the high leaves; each response passes exactly one node of N ∪ N*.

*What Proposition 3.2 bounds is |N ∪ N*|, and A^(ξ+1) does not bound it.* High inner nodes are closed upwards and their
children are the rest of N ∪ N*: it is the leaves of a full A-ary tree, so

    |N ∪ N*| = 1 + (A − 1)·#{high inner nodes}.

At each of the depths 0 … H−1 probabilities sum to at most 1, so at most A^ξ nodes are high, and at depth 0 one:
|N ∪ N*| ≤ 1 + (A − 1)(1 + (H − 1)A^ξ) ≤ H·A^(ξ+1). The paper counts one depth for all. A factor of order H is really
missing: π* uniform over the first k tokens and certain of each token after them has ξ = k and
|N ∪ N*| = A^k (1 + (A − 1)(H − k)). The counter-example: A = 2, H = 10, π*(y*) = 0.9 with equal token
probabilities: A^(ξ+1) = 2/0.9 = 2.2, |N ∪ N*| = 11.

*No learner can do with 2.2 there:* the tokens off the path look alike, so a response that leaves y* at depth h tells
no more than that its h-th token is wrong. An adversary makes it 1 + H(A − 1) responses, a random y* 1 + H(A − 1)/2
in the mean (with y* itself read).

*The bound min(H·A^(ξ+1), A^H) is attained without knowing ξ* by `best_first`: an unread child has at most the prefix's
probability times what its read siblings leave. Before y* is read the largest such limit is at least π*(y*), afterwards
the search goes on only for a limit above it. So the parent of the child it reads has π* of at least that, all nodes
above are high, and the response's node of N ∪ N* lies at the child or below, where nothing was read: each response
reads a new node.

**Algorithm 1** (`fit_mle`, `pessimistic_rewards`, `soft_plan`) and its value-level variant (`value_level`) run on a
`TokenMdp`, deterministic and finite, where values, visits and suboptimality are sums.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TIE = 1 - 1e-9  # what rounding may do to a product of probabilities

# ---- one tree of tokens ----------------------------------------------------------------------------------------------


def planted_judge(target: np.ndarray, probability: float, actions: int) -> Callable[[np.ndarray], np.ndarray]:
    """π*(target) = probability, with equal token probabilities on its path and all else uniform.

    Returns response int [H] -> its token rewards log π*(y_h | y_<h), [H] (eq. 3.6).
    """
    on = probability ** (1 / len(target))

    def judge(response: np.ndarray) -> np.ndarray:
        rewards = np.full(len(target), -np.log(actions))
        wrong = np.flatnonzero(response != target)
        first = wrong[0] if len(wrong) else len(target)
        rewards[:first] = np.log(on)
        if len(wrong):
            rewards[first] = np.log((1 - on) / (actions - 1))
        return rewards

    return judge


def table_judge(conditionals: list[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The judge of a list over depths of π*(· | prefix), [A^h, A], prefixes in lexicographic order."""
    actions = conditionals[0].shape[-1]

    def judge(response: np.ndarray) -> np.ndarray:
        prefix, rewards = 0, np.zeros(len(response))
        for h, token in enumerate(response):
            rewards[h] = np.log(conditionals[h][prefix, token])
            prefix = prefix * actions + token
        return rewards

    return judge


def best_first(
    judge: Callable[[np.ndarray], np.ndarray], actions: int, horizon: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """(y*, how many responses were read), seeing token rewards: always through the most promising unread child.

    Needs no ξ and takes at most |N ∪ N*| responses (see above). Ties in the limit are broken at random only among
    the children of one prefix, and the rest of the response is random.
    """
    best, answer, queries, order = 0.0, np.zeros(horizon, int), 0, itertools.count()
    # Per read prefix: (−limit of an unread child, tie, its probability, a response through it, depth, its unread
    # children if more than that response passed it, the probability that they share)
    heap = [(-1.0, next(order), 1.0, answer, 0, list(rng.permutation(actions)), 1.0)]
    while heap and -heap[0][0] * TIE > best:
        _, _, above, through, depth, unread, left = heapq.heappop(heap)
        if unread is None:
            unread = [a for a in rng.permutation(actions) if a != through[depth]]
        response = rng.integers(actions, size=horizon)
        response[:depth] = through[:depth]
        response[depth] = unread.pop()
        queries += 1
        probabilities = np.exp(judge(response))
        left -= probabilities[depth]
        if unread:
            heapq.heappush(heap, (-above * left, next(order), above, through, depth, unread, left))
        prefix = above * np.cumprod(probabilities[depth:])
        rest = 1 - probabilities[depth + 1 :]
        rows = zip((-prefix[:-1] * rest).tolist(), prefix.tolist(), rest.tolist(), strict=False)
        for h, (limit, p, left) in enumerate(rows, depth + 1):
            heapq.heappush(heap, (limit, next(order), p, response, h, None, left))
        if prefix[-1] > best:
            best, answer = float(prefix[-1]), response
    return answer, queries


def read_all_until_sure(probabilities: np.ndarray, rng: np.random.Generator) -> int:
    """Responses read, seeing sentence rewards, in random order until those unread have together at most the best's.

    probabilities: [n], of all responses. It uses Σ π* = 1; without it only reading all n makes sure.
    """
    read = rng.permutation(probabilities)
    left, best = 1 - np.cumsum(read), np.maximum.accumulate(read)
    return int(np.argmax(left * TIE <= best + 1e-15)) + 1


def leaf_probabilities(conditionals: list[np.ndarray]) -> list[np.ndarray]:
    """π* of the prefixes by depth, 0 to H: [..., A^h], from conditionals [..., A^h, A]."""
    out = [np.ones((*conditionals[0].shape[:-2], 1))]
    for table in conditionals:
        children = out[-1][..., None] * table
        out.append(children.reshape(*children.shape[:-2], -1))
    return out


def count_separating(prefixes: list[np.ndarray]) -> np.ndarray:
    """|N ∪ N*| at A^−ξ = max π*, [...]: eq. 3.7, node by node. `prefixes` as `leaf_probabilities` gives them."""
    least = prefixes[-1].max(-1, keepdims=True) * TIE
    count = (prefixes[-1] >= least).sum(-1)
    for above, here in itertools.pairwise(prefixes):
        parent = np.repeat(above, here.shape[-1] // above.shape[-1], axis=-1)
        count = count + ((here < least) & (parent >= least)).sum(-1)
    return count


def planted_separating(actions: int, horizon: int, probability: float) -> int:
    """|N ∪ N*| of `planted_judge`, from the number of high inner nodes: exact Python integers, any size of tree."""
    on, high = probability ** (1 / horizon), horizon
    for h in range(1, horizon):  # the subtrees that leave the path with their h-th token
        p = on ** (h - 1) * (1 - on) / (actions - 1)
        for below in range(horizon - h):
            if p * actions**-below < probability * TIE:
                break
            high += (actions - 1) * actions**below
    return 1 + (actions - 1) * high


def stated_bound(actions: int, horizon: int, probability: float) -> float:
    """A^min(ξ+1, H), Proposition 3.2 as printed."""
    return min(actions / probability, float(actions) ** horizon)


def corrected_bound(actions: int, horizon: int, probability: float) -> float:
    """min(H·A^(ξ+1), A^H)."""
    return min(horizon * actions / probability, float(actions) ** horizon)


# ---- a deterministic token MDP ---------------------------------------------------------------------------------------


class TokenMdp(NamedTuple):
    """H tokens from A kinds; a state stands for all prefixes that lead to it. Prompts are equally likely."""

    following: np.ndarray  # int [S, A], the next state
    ref_logps: np.ndarray  # [S, A], log π_ref
    features: np.ndarray  # [S, A, d], φ
    prompts: np.ndarray  # int [P], the states that a response may begin in
    horizon: int
    beta: float  # of the KL penalty

    @property
    def actions(self) -> int:
        return self.following.shape[1]


def random_mdp(
    rng: np.random.Generator, *, states: int, actions: int, horizon: int, features: int, prompts: int, beta: float
) -> TokenMdp:
    """Random transitions, Gaussian logits of π_ref and Gaussian features, scaled so that max ‖φ‖ = 1 = L."""
    phi = rng.normal(size=(states, actions, features))
    phi /= np.linalg.norm(phi, axis=-1).max()
    return TokenMdp(
        rng.integers(states, size=(states, actions)), log_softmax(rng.normal(size=(states, actions))), phi,
        np.arange(prompts), horizon, beta,
    )  # fmt: skip


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - log_sum_exp(x)[..., None]


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1)
    return top + np.log(np.exp(x - top[..., None]).sum(-1))


def soft_plan(mdp: TokenMdp, rewards: np.ndarray) -> tuple[float, np.ndarray]:
    """(V*_β(ρ), log π*_β [H, S, A]) of rewards [S, A]: V = β log Σ_a π_ref exp(Q/β), Q = r + V(s'), eq. 3.3 and 3.4."""
    value, log_pi = np.zeros(len(mdp.following)), np.zeros((mdp.horizon, *mdp.following.shape))
    for h in reversed(range(mdp.horizon)):
        logits = mdp.ref_logps + (rewards + value[mdp.following]) / mdp.beta
        value = mdp.beta * log_sum_exp(logits)
        log_pi[h] = logits - value[:, None] / mdp.beta
    return float(value[mdp.prompts].mean()), log_pi


def visits(mdp: TokenMdp, log_pi: np.ndarray) -> np.ndarray:
    """d^π, [H, S, A]: the probability of the state and the token at each position, from a random prompt."""
    out, here = np.zeros(log_pi.shape), np.zeros(len(mdp.following))
    here[mdp.prompts] = 1 / len(mdp.prompts)
    for h in range(mdp.horizon):
        out[h] = here[:, None] * np.exp(log_pi[h])
        here = np.bincount(mdp.following.ravel(), out[h].ravel(), minlength=len(here))
    return out


def policy_value(mdp: TokenMdp, log_pi: np.ndarray, rewards: np.ndarray) -> float:
    """V_β^π(ρ), eq. 3.2."""
    return float((visits(mdp, log_pi) * (rewards - mdp.beta * (log_pi - mdp.ref_logps))).sum())


def sample_pairs(
    mdp: TokenMdp, log_pi: np.ndarray, theta: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """z of n preferences, [n, d]: Σ_h φ of the winner − Σ_h φ of the loser, two responses of the policy to one prompt.

    The first of the two wins with probability σ(z·θ), eq. 3.1.
    """
    state = np.repeat(rng.choice(mdp.prompts, size=(n, 1)), 2, axis=1)
    total = np.zeros((n, 2, mdp.features.shape[-1]))
    for h in range(mdp.horizon):
        chances = np.cumsum(np.exp(log_pi[h]), axis=-1)[state]
        token = np.minimum((rng.random((n, 2, 1)) > chances).sum(-1), mdp.actions - 1)
        total += mdp.features[state, token]
        state = mdp.following[state, token]
    z = total[:, 0] - total[:, 1]
    first_wins = rng.random(n) < 1 / (1 + np.exp(-z @ theta))
    return np.where(first_wins[:, None], z, -z)


def fit_mle(z: np.ndarray, bound: float) -> np.ndarray:
    """argmax over ‖θ‖ ≤ B of Σ log σ(z·θ), eq. 4.1: Newton's method, the multiplier of the ball by bisection.

    Where no data tell the length along a direction, the shortest θ (a ridge of 10⁻⁹ chooses it).
    """

    def fit(ridge, theta):
        for _ in range(100):
            p = 1 / (1 + np.exp(z @ theta))  # of the loser
            gradient = ridge * theta - z.T @ p
            step = np.linalg.solve((z * (p * (1 - p))[:, None]).T @ z + ridge * np.eye(len(theta)), gradient)
            # Damped where the logits would move by more than 1: the quadratic model is not the loss there.
            theta = theta - step / max(1.0, np.abs(z @ step).max())
            if np.abs(step).max() < 1e-9:
                break
        return theta

    zero = np.zeros(z.shape[1])
    # At ‖θ‖ = B the multiplier is at most the gradient's length there over B.
    low, high = 1e-9, np.linalg.norm(z, axis=1).sum() / bound
    theta = fit(high, zero)
    for _ in range(60):
        middle = np.sqrt(low * high)
        theta = fit(middle, theta)
        low, high = (middle, high) if np.linalg.norm(theta) > bound else (low, middle)
        if high < 1e-6 or high / low < 1 + 1e-10:
            break
    theta = fit(high, theta)
    return theta * min(1.0, bound / np.linalg.norm(theta))


def covariance(z: np.ndarray, regulariser: float) -> np.ndarray:
    """Σ_D = Σ z zᵀ + λI."""
    return z.T @ z + regulariser * np.eye(z.shape[1])


def centred(mdp: TokenMdp, log_pi: np.ndarray) -> TokenMdp:
    """The same problem with φ − E_π[Σ_h φ]/H for φ: any response's total is measured from a policy's mean.

    That changes no difference of two responses, so neither data, θ_MLE nor any optimal policy; but it changes the norms
    of φ, and with them what pessimism does and both theorems' bounds.
    """
    mean = np.einsum("hsa,sad->d", visits(mdp, log_pi), mdp.features)
    return mdp._replace(features=mdp.features - mean / mdp.horizon)


def norms(vectors: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """‖v‖ in Σ⁻¹ over the last axis."""
    return np.sqrt(np.einsum("...i,ij,...j->...", vectors, np.linalg.inv(sigma), vectors))


def pessimistic_rewards(mdp: TokenMdp, theta: np.ndarray, sigma: np.ndarray, varrho: float) -> np.ndarray:
    """r̂ = φ·θ_MLE − ϱ‖φ‖_{Σ_D⁻¹}, [S, A], eq. 4.2.

    z can't see what is common to all responses to a prompt, so the norm need not fall with |D|: with one feature per
    (s, a) of a tree, Σ_a ‖φ(s_1, a)‖² ≥ 1/λ at the first token whatever the data, and Theorem 4.2 says nothing.
    """
    return mdp.features @ theta - varrho * norms(mdp.features, sigma)


def lowest(g: np.ndarray, centre: np.ndarray, sigma: np.ndarray, varrho: float, bound: float) -> np.ndarray:
    """argmin g·θ over Θ = {‖θ‖ ≤ B, ‖θ − centre‖_Σ ≤ ϱ}; the centre is in the ball.

    With κ ≥ 0, {κ(‖θ‖² − B²) + ‖θ − centre‖²_Σ − ϱ² ≤ 0} is an ellipsoid around Θ; the best of them, by bisection on
    which constraint its own minimiser breaks, touches Θ there (Lagrange duality).
    """

    def at(kappa):
        m = sigma + kappa * np.eye(len(g))
        middle = np.linalg.solve(m, sigma @ centre)
        square = varrho**2 + kappa * bound**2 - centre @ sigma @ centre + middle @ m @ middle
        direction = np.linalg.solve(m, g)
        return middle - np.sqrt(max(square, 0.0) / (g @ direction)) * direction

    theta = at(0.0)
    if np.linalg.norm(theta) <= bound:
        return theta
    low, high = 1e-12, 1e12
    for _ in range(100):
        kappa = np.sqrt(low * high)
        theta = at(kappa)
        low, high = (kappa, high) if np.linalg.norm(theta) > bound else (low, kappa)
    return theta


def value_derivatives(mdp: TokenMdp, theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """V*_β(ρ; θ), its gradient E_{d^π_θ} φ and its Hessian E Cov_π_θ(Σ_h φ)/β, by the chain rule through soft planning."""
    states, _, d = mdp.features.shape
    value, slope, curve = np.zeros(states), np.zeros((states, d)), np.zeros((states, d, d))
    for _ in range(mdp.horizon):
        logits = mdp.ref_logps + (mdp.features @ theta + value[mdp.following]) / mdp.beta
        value = mdp.beta * log_sum_exp(logits)
        pi = np.exp(logits - value[:, None] / mdp.beta)[..., None]
        of_q = mdp.features + slope[mdp.following]
        slope = (pi * of_q).sum(1)
        off = of_q - slope[:, None]
        curve = (pi[..., None] * curve[mdp.following]).sum(1) + (pi * off).swapaxes(1, 2) @ off / mdp.beta
    return float(value[mdp.prompts].mean()), slope[mdp.prompts].mean(0), curve[mdp.prompts].mean(0)


def value_level(
    mdp: TokenMdp, centre: np.ndarray, sigma: np.ndarray, varrho: float, bound: float, *, gap: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(log π̂, θ̂, duality gap) of max_π min_{θ in Θ} {(E_{d^π} φ)·θ − β E KL(π‖π_ref)}, appendix B.

    The game is linear in θ and concave in d^π, so the order does not matter: θ̂ minimises V*_β(ρ; θ), which is convex,
    and π̂ is its optimal policy. Newton's method with logarithmic barriers for ball and ellipsoid. The duality gap,
    V*(θ̂) − the least value of π̂ over Θ, says how far from a saddle point the two are, however they were found.
    """
    identity = np.eye(len(centre))

    def slacks(theta):
        off = sigma @ (theta - centre)
        return bound**2 - theta @ theta, varrho**2 - (theta - centre) @ off, off

    def penalised(theta, t):
        ball, ellipsoid, _ = slacks(theta)
        if min(ball, ellipsoid) <= 0:
            return np.inf
        return t * soft_plan(mdp, mdp.features @ theta)[0] - np.log(ball) - np.log(ellipsoid)

    # Inside both: the centre may be on the ball.
    theta = centre * (1 - min(0.5, 0.5 * varrho / max(np.sqrt(centre @ sigma @ centre), 1e-300)))
    t = 100.0
    while True:
        for _ in range(100):
            _, mean, curve = value_derivatives(mdp, theta)
            ball, ellipsoid, off = slacks(theta)
            gradient = t * mean + 2 * theta / ball + 2 * off / ellipsoid
            hessian = t * curve + 2 * identity / ball + 2 * sigma / ellipsoid
            hessian += 4 * np.outer(theta, theta) / ball**2 + 4 * np.outer(off, off) / ellipsoid**2
            step = -np.linalg.solve(hessian, gradient)
            if -gradient @ step < 1e-6:
                break
            size, now = 1.0, penalised(theta, t)
            while penalised(theta + size * step, t) > now + 0.25 * size * (gradient @ step) and size > 1e-9:
                size /= 2
            theta = theta + size * step
        left = float(mean @ (theta - lowest(mean, centre, sigma, varrho, bound)))
        if left <= gap or t > 1e12:
            return soft_plan(mdp, mdp.features @ theta)[1], theta, left
        t *= 100


# ---- stochastic transitions (Proposition C.2) ------------------------------------------------------------------------


def best_markov(chances: np.ndarray, rewards: np.ndarray, horizon: int) -> float:
    """The optimal value from state 0 of transitions [S, A, S] and rewards [S, A], by trying every policy, by position.

    A^(S·H) policies: for the smallest of problems.
    """
    states, actions = rewards.shape
    values = []
    for table in itertools.product(itertools.product(range(actions), repeat=states), repeat=horizon):
        value = np.zeros(states)
        for choice in reversed(table):
            taken = np.arange(states), np.array(choice)
            value = rewards[taken] + chances[taken] @ value
        values.append(value[0])
    return float(max(values))


def best_sentence(chances: np.ndarray, rewards: np.ndarray, horizon: int) -> float:
    """The best value from state 0 of a sequence of actions chosen beforehand, by trying every one."""
    values = []
    for sentence in itertools.product(range(rewards.shape[1]), repeat=horizon):
        here, value = np.eye(len(rewards))[0], 0.0
        for action in sentence:
            value += here @ rewards[:, action]
            here = here @ chances[:, action]
        values.append(value)
    return float(max(values))


def proposition_c2() -> tuple[np.ndarray, np.ndarray, int]:
    """(transitions, rewards, H) of Proposition C.2: s_0 goes to s_1 or s_2 by a coin, where a_j pays 1 in s_j."""
    chances, rewards = np.zeros((3, 2, 3)), np.zeros((3, 2))
    chances[0, :, 1:] = 0.5
    chances[[1, 2], :, [1, 2]] = 1
    rewards[1, 0] = rewards[2, 1] = 1
    return chances, rewards, 2
