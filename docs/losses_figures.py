"""The figures of docs/losses.md, computed with the functions that they show. Written by `python -m docs.make_losses`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from rto_jax import losses

matplotlib.use("agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart with any colour vision; styles differ too.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "rto_jax",  # the same bytes every time
}
WIDTH = 4.3  # inches: a phone's width, at a readable size


def values_and_slopes(function, x):
    """f(x) and df/dx of an elementwise function."""
    x = jnp.asarray(x, jnp.float32)
    return function(x), jax.grad(lambda x: function(x).sum())(x)


def preference():
    margin = np.linspace(-6, 6, 481)
    zero = jnp.zeros(margin.shape)
    # Half of βh in either answer: only their difference counts, but for KTO.
    four = lambda x: (x / 2, -x / 2, zero, zero)  # noqa: E731
    curves = {
        "DPO": (lambda x: losses.dpo_loss(*four(x), beta=1), BLACK, "-"),
        "cDPO": (lambda x: losses.dpo_loss(*four(x), beta=1, label_smoothing=0.1), SKY, "-"),
        "robust DPO": (lambda x: losses.robust_dpo_loss(*four(x), beta=1, label_smoothing=0.1), BLUE, "--"),
        "IPO": (lambda x: losses.ipo_loss(*four(x), beta=1), RED, "-"),
        "hinge": (lambda x: losses.hinge_loss(*four(x), beta=1), GREEN, "-"),
        "Bradley-Terry, m = 1": (lambda x: losses.bradley_terry_loss(x, zero, margin=1.0), GREY, ":"),
        "KTO pair, z = 0": (lambda x: losses.kto_pair_loss(*four(x), beta=1), PINK, "-."),
    }
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(WIDTH, 5.2))
    for name, (function, colour, style) in curves.items():
        value, slope = values_and_slopes(function, margin)
        above.plot(margin, value, style, color=colour, label=name)
        below.plot(margin, slope, style, color=colour)
    above.set(title="loss", ylim=(-1, 6))
    below.set(title="its slope: below 0, the margin is pushed up", ylim=(-2.2, 0.8), xlabel="margin βh")
    below.axhline(0, color="black", linewidth=0.5)
    figure.legend(ncols=3, loc="outside lower center")
    return figure


def clipping():
    ratio = np.linspace(0.0213, 4, 400)  # not on the edges, where the slope is between the two
    curves = {
        "PPO, ε = 0.2": ({}, BLACK, "-"),
        "clip-higher, 0.28": ({"clip_high": 0.28}, ORANGE, "--"),
        "dual clip, c = 3": ({"dual_clip": 3}, BLUE, ":"),
    }
    figure, panels = plt.subplots(2, 2, sharex="col", figsize=(WIDTH, 4.4))
    for column, advantage, right in ((0, 1.0, 2.0), (1, -1.0, 4.0)):
        for name, (numbers, colour, style) in curves.items():
            value, slope = values_and_slopes(
                lambda logps, n=numbers, a=advantage: losses.ppo_policy_loss(
                    logps, jnp.zeros(logps.shape), jnp.full(logps.shape, a), **n
                ),
                np.log(ratio),
            )
            width = 2.4 if style == ":" else 1.6
            panels[0, column].plot(ratio, value, style, color=colour, linewidth=width, label=None if column else name)
            panels[1, column].plot(ratio, slope, style, color=colour, linewidth=width)
        panels[0, column].set(title="loss, A = 1" if advantage > 0 else "loss, A = −1", xlim=(0, right))
        panels[1, column].set(title="gradient in log π", xlabel="ratio π/π_old")
        panels[1, column].axhline(0, color="black", linewidth=0.5)
    figure.legend(ncols=3, loc="outside lower center", columnspacing=1)
    return figure


def kl():
    rng = np.random.default_rng(0)
    start, direction = (jnp.asarray(rng.normal(size=64), jnp.float32) for _ in range(2))
    ref = jax.nn.log_softmax(start)

    def moments(shift):
        """Of the three estimators at tokens of π: exact means and standard deviations, over the true KL."""
        logp = jax.nn.log_softmax(start + shift * direction)
        p = jnp.exp(logp)
        true = losses.token_kl(ref[None], logp[None])[0]  # of the two swapped: KL(π ‖ π_ref)
        estimates = jnp.stack([k(logp, ref) for k in (losses.kl_k1, losses.kl_k2, losses.kl_k3)])
        mean = estimates @ p
        return true, mean / true, jnp.sqrt(jnp.square(estimates - mean[:, None]) @ p) / true

    true, mean, deviation = jax.vmap(moments)(jnp.geomspace(0.05, 2.5, 60))

    line = jnp.arange(64.0)
    two_humps = jnp.logaddexp(-jnp.square(line - 16) / 32, jnp.log(0.7) - jnp.square(line - 46) / 32)
    two_humps = jax.nn.log_softmax(two_humps)

    def bell(parameters):
        return jax.nn.log_softmax(-jnp.square(line - parameters[0]) / 2 * jnp.exp(-2 * parameters[1]))

    def fitted(estimator):
        """The bell curve that the exact expected gradient of an estimator, as a loss, makes of a start between humps."""

        def loss(parameters):
            logp = bell(parameters)
            return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * estimator(logp, two_humps))  # tokens do not move

        def step(parameters, _):
            return parameters - jnp.array([2.0, 0.02]) * jax.grad(loss)(parameters), None

        return jnp.exp(bell(jax.lax.scan(step, jnp.array([24.0, 1.5]), length=3000)[0]))

    figure, (first, second, third) = plt.subplots(3, figsize=(WIDTH, 7.2))
    second.sharex(first)
    third.fill_between(line, jnp.exp(two_humps), color="#dddddd", label="π_ref")
    estimators = (losses.kl_k1, losses.kl_k2, losses.kl_k3)
    for i, (estimator, colour, style) in enumerate(
        zip(estimators, (ORANGE, BLUE, RED), ("-", "--", "-."), strict=True)
    ):
        first.plot(true, mean[:, i], style, color=colour)
        second.plot(true, deviation[:, i], style, color=colour)
        third.plot(line, fitted(estimator), style, color=colour, label=f"k{i + 1}")
    first.set(title="mean / true KL", ylim=(0.9, 1.5))
    second.set(xscale="log", yscale="log", xlabel="true KL(π ‖ π_ref), nats", title="standard deviation / true KL")
    third.set(title="as losses: where a bell curve ends up", xlabel="token", ylim=(0, None))
    figure.legend(ncols=4, loc="outside lower center")
    return figure


def placements():
    words = ["The", "lens", "is", "sharp", ".", "It", "costs", "a", "lot", "of", "money", ".", "<eos>"]
    log_ratios = np.array([[0.2, 0.6, 0.1, 1.4, 0.3, 0.1, -0.5, 0.2, -1.8, 0.1, 0.4, 0.2, 0.8]])
    tokens, mask = np.array([[words.index(w) for w in words]]), np.ones((1, len(words)), bool)
    ends = losses.segment_ends(tokens, mask, delimiters=[words.index(".")])
    figure, panels = plt.subplots(4, sharex=True, sharey=True, figsize=(WIDTH, 5.4))
    titles = {"token": "RTO", "segment": "Semi-RTO", "last": "DDPO", "shaping": "RS-PPO"}
    place = np.arange(len(words))
    for panel, (placement, title) in zip(panels, titles.items(), strict=True):
        terms = {
            "implicit": losses.RewardTerm(log_ratios, scale=0.05, placement=placement),
            "score": losses.RewardTerm(np.array([0.2])),
        }
        _, parts, totals = losses.compose_rewards(terms, mask, ends=ends)
        dense, score = np.asarray(parts["implicit"][0]), np.asarray(parts["score"][0])
        panel.bar(place, dense, color=np.where(dense < 0, RED, BLUE))
        panel.bar(place, score, bottom=np.maximum(dense, 0), color="#cccccc", edgecolor=GREY, linewidth=0.5)
        panel.axhline(0, color="black", linewidth=0.5)
        total = sum(float(x[0]) for x in totals.values())
        panel.set_title(f'{title}, placement="{placement}": total {total:.3f}')
    panels[-1].set_xticks(place, words, rotation=60, ha="right", rotation_mode="anchor")
    figure.supylabel("reward of the token", fontsize=9)
    return figure


def gae():
    length = 257
    rewards = jnp.zeros((1, length)).at[0, -1].set(1)
    values, mask = jnp.zeros((1, length)), jnp.ones((1, length), bool)
    back = np.arange(length)
    figure, panel = plt.subplots(figsize=(WIDTH, 3.0))
    for lam, colour, style in ((1.0, BLACK, "-"), (0.95, BLUE, "--"), (0.9, RED, "-.")):
        advantages, _ = losses.gae(rewards, values, mask, lam=lam)
        weight = np.asarray(advantages)[0, ::-1]
        panel.plot(back, weight, style, color=colour, label=f"λ = {lam:g}")
        if lam < 1:
            k = 100 if lam == 0.95 else 50
            panel.annotate(
                f"{weight[k]:.3f}", (k, weight[k]), (5, 3), textcoords="offset points", color=colour, fontsize=8
            )
            panel.plot(k, weight[k], "o", color=colour, markersize=3.5)
    panel.set(yscale="log", ylim=(1e-5, 2), xlabel="tokens before the end, k", title="share of the last reward")
    panel.legend(loc=(0.72, 0.55))
    return figure


FIGURES = {f.__name__: f for f in (preference, placements, gae, clipping, kl)}


def write(folder: Path, kind: str = "svg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw()
            figure.set_layout_engine("constrained")
            figure.savefig(folder / f"{name}.{kind}", metadata={"Date": None} if kind == "svg" else None, dpi=130)
            plt.close(figure)
