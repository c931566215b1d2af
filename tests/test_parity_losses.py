"""The losses against TRL, OpenRLHF, rlax, optax and torch: the same numbers and gradients, or what docs/parity.md says.

The libraries' own code runs, not a copy of it: where a formula sits in a trainer's method, the method is called on a
trainer that was never set up, with a model whose logits are given. Needs the [parity] extra, but for the first test.
"""

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
import types
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rto_jax import losses

ROOT = Path(__file__).parents[1]
parity = pytest.mark.parity

# 2·B answers, the B chosen ones first: a prompt of 1 to 3 tokens, an answer of 2 to 6, padding.
B, S, V = 4, 9, 7
PAIRS = np.arange(B)
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (2 * B, S))
PROMPTS, ENDS = np.array([1, 2, 3, 1, 2, 1, 3, 2]), np.array([7, 9, 5, 4, 8, 6, 5, 6])
COMPLETION = (np.arange(S) >= PROMPTS[:, None]) & (np.arange(S) < ENDS[:, None])
ATTENTION = np.arange(S) < ENDS[:, None]
MASK = COMPLETION[:, 1:]  # of what the logits at 0 .. S − 2 predict
LENGTHS = MASK.sum(-1)
LOGITS, REF, OLD = (RNG.normal(size=(2 * B, S, V)).astype(np.float32) for _ in range(3))
OLD = LOGITS + 0.4 * OLD  # ratios on both sides of the clip, and within it


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_a_row_for_every_function_and_for_nothing_else():
    page = (ROOT / "docs" / "parity.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    compared, named = set(), set()
    for functions, library, result, why in rows:
        names = re.findall(r"`(\w+)`", functions)
        assert names and set(names) <= set(losses.__all__), functions
        assert result.strip() in ("same", "differs", "none"), functions
        assert (result.strip() == "none") == (not library.strip()), functions
        assert why.strip() or result.strip() != "differs", functions
        named |= set(names)
        if library.strip() and "RTO" not in library:
            compared |= set(names)
    functions = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert functions <= named, functions - named
    # Whatever a row compares with a library is called below.
    called = set(re.findall(r"losses\.(\w+)", inspect.getsource(sys.modules[__name__])))
    assert compared <= called, compared - called
    for path in re.findall(r"`(tests/[\w/]+\.py)", page):
        assert (ROOT / path).exists(), path


# ---- the libraries ---------------------------------------------------------------------------------------------------


def load(name):
    """The module, or a skip. What its import warns of is not ours: a dependency's deprecation, an experimental API."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(name.split(".")[0], reason="needs the [parity] extra")
        return importlib.import_module(name) if "." in name else module


@pytest.fixture(scope="module")
def torch():
    return load("torch")


@pytest.fixture(scope="module")
def rlax():
    return load("rlax")


@pytest.fixture(scope="module")
def optax():
    return load("optax")


@pytest.fixture(scope="module")
def trainers(torch):
    """TRL's trainer classes, by name."""
    places = {
        "DPO": "trl.trainer.dpo_trainer",
        "KTO": "trl.trainer.kto_trainer",
        "GRPO": "trl.trainer.grpo_trainer",
        "RLOO": "trl.trainer.rloo_trainer",
        "Reward": "trl.trainer.reward_trainer",
        "CPO": "trl.experimental.cpo.cpo_trainer",
        "ORPO": "trl.experimental.orpo.orpo_trainer",
    }
    return {name: getattr(load(place), f"{name}Trainer") for name, place in places.items()}


@pytest.fixture(scope="module")
def openrlhf(torch):
    """OpenRLHF's formulas. Its packages also load ray, deepspeed and flash-attn, which no formula needs: left out."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        pytest.skip("needs `pip install --no-deps openrlhf==0.5.5.post2`")
    folder = Path(spec.submodule_search_locations[0])
    modules = {name: mock.MagicMock() for name in ("ray", "openrlhf.models.actor", "openrlhf.utils.remote_rm_utils")}
    for name in ("openrlhf", "openrlhf.models", "openrlhf.trainer", "openrlhf.utils"):
        modules[name] = types.ModuleType(name)
        modules[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        names = ("models.loss", "models.utils", "trainer.ppo_utils")
        loss, utils, ppo = (importlib.import_module(f"openrlhf.{name}") for name in names)
    return SimpleNamespace(loss=loss, utils=utils, ppo=ppo, maker=ppo.NaiveExperienceMaker)


class Model:
    """A language model for TRL whose logits are given: they are its hidden states, and its head is the identity."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, logits, temperature=1.0, unembedding=None):
        torch = load("torch")
        self.logits = torch.as_tensor(logits)
        weight = torch.eye(self.logits.shape[-1]) if unembedding is None else unembedding
        self.head = SimpleNamespace(weight=weight, bias=None)
        self.config = SimpleNamespace(get_text_config=lambda: self.config)
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
        load("trl.trainer.utils").add_fused_lm_head(self, temperature=temperature, outputs=outputs)

    def base_model(self, *_, **__):
        return SimpleNamespace(last_hidden_state=self.logits)

    def get_output_embeddings(self):
        return self.head

    def forward(self, *_, **__):
        return SimpleNamespace(logits=self.logits)

    def __call__(self, *args, **keywords):
        return self.forward(*args, **keywords)


def trainer(cls, **fields):
    """A trainer of TRL that holds no more than its loss reads."""

    def itself(x, **_):
        return x

    out = object.__new__(cls)
    vars(out).update(
        accelerator=SimpleNamespace(
            **dict.fromkeys(("gather", "gather_for_metrics", "reduce", "unwrap_model"), itself),
            **dict(device="cpu", autocast=contextlib.nullcontext, num_processes=1, process_index=0),
            **dict(is_main_process=False, sync_gradients=True),
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, center_rewards_coefficient=None),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        **dict(aux_loss_enabled=False, is_encoder_decoder=False, _total_train_tokens=0, _tp_size=1),
    )
    vars(out).update(fields)
    return out


def close(actual, desired, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(desired), rtol=tolerance, atol=tolerance)


def same(theirs, ours, *arrays):
    """One number of torch and one of ours, and their gradients in every array."""
    torch = load("torch")
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
    value = theirs(*inputs)
    our_value, our_gradients = jax.jit(jax.value_and_grad(ours, tuple(range(len(arrays)))))(*arrays)
    close(our_value, value.detach())
    for mine, gradient in zip(our_gradients, torch.autograd.grad(value, inputs), strict=True):
        assert gradient.abs().max() > 1e-3
        close(mine, gradient)


def token_logps(logits, temperature=1.0):
    return losses.token_logps(logits[:, :-1], IDS[:, 1:], temperature=temperature)


def sums(logits):
    """Σ_t log π(y_t|s_t) of the chosen and of the rejected answers, [B] each."""
    logps = losses.masked_sum(token_logps(logits), MASK, axis=-1)
    return logps[:B], logps[B:]


def four(logits):
    return *sums(logits), *sums(REF)


def tensors(torch, **arrays):
    return {name: torch.as_tensor(x).long() for name, x in arrays.items()}


# ---- TRL: pairs ------------------------------------------------------------------------------------------------------


@parity
@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
def test_trl_dpo(torch, trainers, kind):
    beta, numbers = 0.4, {}
    self = trainer(
        trainers["DPO"],
        **dict(loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=0.2, f_divergence_type="reverse_kl"),
        **dict(ld_alpha=None, precompute_ref_logps=False, ref_model=Model(REF), use_weighting=False),
    )
    batch = tensors(torch, input_ids=IDS, attention_mask=ATTENTION, completion_mask=COMPLETION)
    names = {"sigmoid": losses.dpo_loss, "robust": losses.robust_dpo_loss, "hinge": losses.hinge_loss}
    loss = names.get(kind, losses.ipo_loss)
    if kind == "robust":
        numbers = {"label_smoothing": 0.2}

    def ours(logits, means=kind == "ipo"):
        logps = four(logits)
        if means:  # as TRL's IPO has them
            logps = [x / n for x, n in zip(logps, 2 * [LENGTHS[:B], LENGTHS[B:]], strict=True)]
        return loss(*logps, beta=beta, **numbers).mean()

    same(lambda logits: self._compute_loss(Model(logits), batch, False), ours, LOGITS)
    if kind == "ipo":
        theirs = float(self._compute_loss(Model(LOGITS), batch, False))
        assert abs(theirs - ours(LOGITS, means=False)) > 1
    logged = {name: x[-1] for name, x in self._metrics["train"].items() if name.startswith("rewards/")}
    mine = {name: x.mean() for name, x in losses.preference_metrics(*four(LOGITS), beta=beta).items()}
    close(mine["chosen_reward"], logged["rewards/chosen"])
    close(mine["rejected_reward"], logged["rewards/rejected"])
    close(mine["margin"], logged["rewards/margins"])
    close(mine["accuracy"], logged["rewards/accuracies"])


def pair_batch(torch, rows):
    """TRL's batch of the pairs `rows`, for CPO and ORPO."""
    out = {}
    for side, index in (("chosen", rows), ("rejected", rows + B)):
        arrays = dict(input_ids=IDS, attention_mask=ATTENTION, labels=np.where(COMPLETION, IDS, -100))
        out |= tensors(torch, **{f"{side}_{name}": x[index] for name, x in arrays.items()})
    return out


def cpo(trainers, **fields):
    defaults = dict(loss_type="sigmoid", beta=0.4, alpha=0.0, cpo_alpha=0.0, label_smoothing=0.0, pad_token_id=0)
    return trainer(trainers["CPO"], **defaults | fields)


def of_pairs(self, torch, rows):
    """TRL's loss of the pairs `rows`, as a function of all logits."""
    both = np.concatenate([rows, rows + B])
    return lambda logits: self.get_batch_loss_metrics(Model(logits[both]), pair_batch(torch, rows))[0]


@parity
def test_trl_simpo(torch, trainers):
    self = cpo(trainers, loss_type="simpo", beta=2.5, simpo_gamma=0.5)

    def ours(logits):
        return losses.simpo_loss(*sums(logits), LENGTHS[:B], LENGTHS[B:], beta=2.5, gamma=0.5).mean()

    same(of_pairs(self, torch, PAIRS), ours, LOGITS)


@parity
@pytest.mark.parametrize("kind", ["cdpo", "hinge", "ipo"])
def test_trl_pairs_without_a_reference(torch, trainers, kind):
    """CPO's trainer again: cDPO, SLiC-HF's hinge and IPO with log π_ref = 0 (IPO of means, as above)."""
    self = cpo(trainers, loss_type="sigmoid" if kind == "cdpo" else kind, label_smoothing=0.2)
    zeros = jnp.zeros(B)

    def ours(logits):
        chosen, rejected = sums(logits)
        if kind == "cdpo":
            return losses.dpo_loss(chosen, rejected, zeros, zeros, beta=0.4, label_smoothing=0.2).mean()
        if kind == "hinge":
            return losses.hinge_loss(chosen, rejected, zeros, zeros, beta=0.4).mean()
        return losses.ipo_loss(chosen / LENGTHS[:B], rejected / LENGTHS[B:], zeros, zeros, beta=0.4).mean()

    same(of_pairs(self, torch, PAIRS), ours, LOGITS)


@parity
def test_trl_cpo(torch, trainers):
    self = cpo(trainers, cpo_alpha=0.7, label_smoothing=0.1)

    def ours(logits, rows=PAIRS, weight=0.7):
        chosen, rejected = (x[rows] for x in sums(logits))
        numbers = dict(beta=0.4, label_smoothing=0.1, nll_weight=weight)
        return losses.cpo_loss(chosen, rejected, LENGTHS[:B][rows], **numbers).mean()

    for row in (0, 2):  # one pair: the same
        same(of_pairs(self, torch, np.array([row])), partial(ours, rows=np.array([row])), LOGITS)

    def of_the_batch(logits):  # several: TRL's NLL is a mean over the tokens of all
        total, count = losses.token_mean(-token_logps(logits)[:B], MASK[:B])
        return ours(logits, weight=0) + 0.7 * total / count

    same(of_pairs(self, torch, PAIRS), of_the_batch, LOGITS)
    assert abs(ours(LOGITS) - of_the_batch(LOGITS)) > 1e-3


@parity
def test_trl_orpo(torch, trainers):
    self = trainer(trainers["ORPO"], beta=0.3, padding_value=0)

    def ours(logits, rows=PAIRS):
        chosen, rejected = (x[rows] for x in sums(logits))
        return losses.orpo_loss(chosen, rejected, LENGTHS[:B][rows], LENGTHS[B:][rows], lam=0.3).mean()

    def of_the_batch(logits, rows=PAIRS):  # TRL's NLL is a mean over the tokens of all, prompts too
        total, count = losses.token_mean(-token_logps(logits)[rows], ATTENTION[rows, 1:])
        means = sums(logits)[0][rows] / LENGTHS[rows]
        return ours(logits, rows) + means.mean() + total / count

    short, long = np.array([0]), np.array([2])  # prompts of one token, which nothing predicts, and of three
    same(of_pairs(self, torch, short), partial(ours, rows=short), LOGITS)
    same(of_pairs(self, torch, long), partial(of_the_batch, rows=long), LOGITS)
    assert abs(ours(LOGITS, long) - of_the_batch(LOGITS, long)) > 1e-3
    same(of_pairs(self, torch, PAIRS), of_the_batch, LOGITS)
    # The odds of a certain answer: TRL's gradient is NaN there.
    certain, other = torch.zeros(1, requires_grad=True), torch.tensor([-1.0])
    self.odds_ratio_loss(certain, other)[0].sum().backward()
    assert certain.grad.isnan().all()
    one = np.ones(1, np.float32)
    assert np.isfinite(jax.grad(lambda x: losses.orpo_loss(x, -one, one, one, lam=0.3).sum())(0 * one)).all()


@parity
def test_trl_kto(torch, trainers):
    numbers = dict(beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
    self = trainer(
        trainers["KTO"],
        **dict(calculate_KL=True, precompute_ref_logps=False, ref_model=Model(REF), loss_type="kto", **numbers),
    )
    label = np.array([1, 1, 0, 1, 0, 0, 1, 0], bool)
    ids, mask = (IDS + 1) % V, np.roll(COMPLETION, 1, axis=0)  # answers to other prompts
    batch = tensors(torch, input_ids=IDS, attention_mask=ATTENTION, completion_mask=COMPLETION, label=label)
    batch |= tensors(torch, KL_input_ids=ids, KL_attention_mask=ATTENTION, KL_completion_mask=mask)

    def others(logits):
        return losses.masked_sum(losses.token_logps(logits[:, :-1], ids[:, 1:]), mask[:, 1:], axis=-1)

    def ours(logits, ref):
        z = losses.kto_kl(others(logits), others(ref))
        return losses.kto_loss(*(jnp.concatenate(sums(x)) for x in (logits, ref)), label, z, **numbers).mean()

    same(lambda logits: self._compute_loss(Model(logits), batch, False), partial(ours, ref=REF), LOGITS)
    self.ref_model = Model(LOGITS)  # the other way round: z is above 0 in one of the two, and clamped in the other
    same(lambda logits: self._compute_loss(Model(logits), batch, False), partial(ours, ref=LOGITS), REF)
    z = [losses.kto_kl(others(x), others(y)) for x, y in ((LOGITS, REF), (REF, LOGITS))]
    close(z, self._metrics["train"]["kl"])
    assert min(z) == 0 < max(z)


@parity
@pytest.mark.parametrize("margin", [False, True])
def test_trl_reward_model(torch, trainers, margin):
    scores, margins = LOGITS[:, 0, 0], np.abs(REF[:B, 0, 0])
    batch = tensors(torch, attention_mask=ATTENTION) | ({"margin": torch.tensor(margins)} if margin else {})
    self = trainer(trainers["Reward"])

    def ours(scores):
        return losses.bradley_terry_loss(scores[:B], scores[B:], margin=margins if margin else 0).mean()

    def model(scores):
        return lambda **_: SimpleNamespace(logits=scores[:, None])

    same(lambda scores: self.compute_loss(model(scores), dict(batch)), ours, scores)


# ---- TRL: groups -----------------------------------------------------------------------------------------------------

PROMPT = 3  # tokens; the rest of a row is the answer
ANSWERS = np.arange(S - PROMPT) < np.array([6, 2, 4, 5, 3, 6, 1, 4])[:, None]
TURNS = np.tile(np.array([1, 1, 1, 0, 1, 1], bool), (2 * B, 1))  # the fourth token came from a tool
ADVANTAGES = np.float32([1, -1, 0.5, -2, 1.5, -0.5, 0.1, -0.8])
TEMPERATURE = 0.8


def answer(logits):
    return logits[:, PROMPT - 1 : -1]


def answer_logps(logits, temperature=TEMPERATURE):
    return losses.token_logps(answer(logits), IDS[:, PROMPT:], temperature=temperature)


def group_batch(torch, mask=ANSWERS):
    prompts = IDS[:, :PROMPT]
    ids = tensors(torch, prompt_ids=prompts, prompt_mask=np.ones_like(prompts), completion_ids=IDS[:, PROMPT:])
    return ids | tensors(torch, completion_mask=mask) | {"advantages": torch.tensor(ADVANTAGES)}


@parity
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo"])
def test_trl_grpo(torch, trainers, kind):
    """Clip-higher, two-sided clipping, k3 as a loss and an entropy bonus, under a mask with holes."""
    args = SimpleNamespace(delta=1.4, use_bias_correction_kl=False, steps_per_generation=1)
    self = trainer(
        trainers["GRPO"],
        **dict(args=args, loss_type=kind, beta=0.3, epsilon_low=0.2, epsilon_high=0.3, entropy_coef=0.1),
        **dict(top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token"),
        **dict(use_vllm=False, _entropy_bonus_enabled=True, use_adaptive_entropy=False),
        **dict(current_gradient_accumulation_steps=1),
    )
    old, ref = (np.asarray(answer_logps(x)) for x in (OLD, REF))
    batch = group_batch(torch) | tensors(torch, tool_mask=TURNS, num_items_in_batch=(ANSWERS & TURNS).sum())
    batch |= {"old_per_token_logps": torch.tensor(old), "ref_per_token_logps": torch.tensor(ref)}

    def ours(logits, mask=ANSWERS & TURNS, bonus=0.1):
        logps = answer_logps(logits)
        advantages = jnp.broadcast_to(ADVANTAGES[:, None], logps.shape)
        tokens = losses.ppo_policy_loss(logps, old, advantages, clip=0.2, clip_high=0.3, dual_clip=1.4)
        tokens = tokens + 0.3 * losses.kl_k3(logps, ref)
        total, count = (losses.sequence_mean if kind == "grpo" else losses.token_mean)(tokens, mask)
        entropies = losses.entropy(answer(logits), mask, temperature=TEMPERATURE)
        return total / count - bonus * losses.masked_mean(entropies, mask)

    def theirs(logits):
        return self._compute_loss(Model(logits, TEMPERATURE), batch)

    same(theirs, ours, LOGITS)
    assert 0.1 < self._metrics["train"]["clip_ratio/region_mean"][-1] < 0.9
    bad = ANSWERS & TURNS & (ADVANTAGES[:, None] < 0)
    assert (np.exp(answer_logps(LOGITS) - old)[bad] > 1.4).any()  # the second clip is at work
    if kind == "grpo":  # an answer without tokens: TRL counts it among the sequences, we do not
        rest = ANSWERS & (np.arange(2 * B) > 0)[:, None]
        batch |= tensors(torch, completion_mask=rest)
        self.entropy_coef = 0.0
        close(theirs(torch.tensor(LOGITS)), ours(LOGITS, rest & TURNS, bonus=0) * (2 * B - 1) / (2 * B))


@parity
def test_trl_rloo_clips_whole_answers(torch, trainers):
    self = trainer(trainers["RLOO"], epsilon_low=0.2, epsilon_high=0.3)

    def logps(logits):
        return losses.masked_sum(answer_logps(logits), ANSWERS, axis=-1)

    def ours(logits):  # [B] log-probabilities of answers, where PPO has tokens
        return losses.ppo_policy_loss(logps(logits), logps(OLD), ADVANTAGES, clip=0.2, clip_high=0.3).mean()

    batch = group_batch(torch) | {"old_logps": torch.tensor(np.asarray(logps(OLD)))}
    same(lambda logits: self._compute_loss(Model(logits, TEMPERATURE), batch), ours, LOGITS)


def advantages(trainers, name, torch, scores, **fields):
    """The advantages that TRL's trainer gives 2·B answers in groups of 4, and its `_generate` and rewards are given."""
    prompts = IDS[:, :PROMPT].tolist()
    answers = [row[real].tolist() for row, real in zip(IDS[:, PROMPT:], ANSWERS, strict=True)]
    generated = (prompts, answers, None, 2 * B * [""], None, {}, None, None)
    self = trainer(
        trainers[name],
        **dict(environment_factories=None, environments=None, tools=None, _is_vlm=False, log_multimodal=False),
        **dict(_generate=lambda _: generated if name == "GRPO" else (prompts, answers, 2 * B * [""])),
        **dict(_calculate_rewards=lambda *_: torch.tensor(scores)[:, None], reward_weights=torch.ones(1)),
        **dict(reward_funcs=["score"], reward_func_names=["score"], reward_clip_range=None, normalize_advantages=False),
        **dict(_tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None, mask_truncated_completions=False),
        **dict(use_vllm=False, num_iterations=1, num_generations=4, multi_objective_aggregation="sum_then_normalize"),
        **dict(_logs=dict(prompt=[], completion=[], advantages=[], rewards={"score": []})),
        **dict(_pending_extra_logs={}, _pending_metrics={}, model=Model(LOGITS), ref_model=Model(REF)),
        **fields,
    )
    vars(self.args).update(per_device_train_batch_size=2 * B, gradient_accumulation_steps=1, steps_per_generation=1)
    out = self._generate_and_score_completions([{"prompt": "?"}] * (2 * B))["advantages"]
    return out.numpy().reshape(-1, 4)


@parity
@pytest.mark.parametrize("scale", ["group", "none"])
def test_trl_grpo_advantages(torch, trainers, scale):
    for scores in (ADVANTAGES, np.float32([1, 0, 0, 1, 0.1, 0.1, 0.1, 0.1])):  # a group of one score
        theirs = advantages(trainers, "GRPO", torch, scores, beta=0.0, scale_rewards=scale)
        close(losses.grpo_advantages(scores.reshape(-1, 4), scale=scale == "group"), theirs)


@parity
def test_trl_rloo_advantages_with_its_penalty(torch, trainers):
    theirs = advantages(trainers, "RLOO", torch, ADVANTAGES, beta=0.3)
    k1 = losses.kl_k1(answer_logps(LOGITS, 1.0), answer_logps(REF, 1.0))
    scores = ADVANTAGES - 0.3 * losses.masked_sum(k1, ANSWERS, axis=-1)
    close(losses.rloo_advantages(scores.reshape(-1, 4)), theirs)


# ---- OpenRLHF, the base of the authors' code -------------------------------------------------------------------------

ROWS, T = 5, 7
RIGHT = np.arange(T) < np.array([7, 4, 1, 6, 3])[:, None]  # its own masks: padding behind the answer
HOLES = RIGHT & (np.arange(T) != 2)
REWARDS, VALUES, OLD_VALUES, RETURNS = (RNG.normal(size=(ROWS, T)).astype(np.float32) for _ in range(4))
POLICY, BASE = (-RNG.exponential(size=(ROWS, T)).astype(np.float32) for _ in range(2))
EARLIER = POLICY + 0.2 * OLD_VALUES
SCORES = np.float32([0.5, -3, 15, -20, 7])


@parity
@pytest.mark.parametrize(("smoothing", "ipo"), [(0.0, False), (0.2, False), (0.0, True)])
def test_openrlhf_dpo_cdpo_and_ipo(torch, openrlhf, smoothing, ipo):
    theirs = openrlhf.loss.DPOLoss(0.4, smoothing, ipo)
    arrays = [np.asarray(x) for x in four(LOGITS)]

    def ours(*logps):
        if ipo:  # of sums, as in the paper
            return losses.ipo_loss(*logps, beta=0.4).mean()
        return losses.dpo_loss(*logps, beta=0.4, label_smoothing=smoothing).mean()

    same(lambda *logps: theirs(*logps)[0], ours, *arrays)


@parity
def test_openrlhf_kto_of_pairs(torch, openrlhf):
    theirs, zeros = openrlhf.loss.VanillaKTOLoss(0.4), np.zeros(B, np.float32)

    def ours(chosen, rejected):
        return losses.kto_pair_loss(chosen, rejected, zeros, zeros, beta=0.4).mean()

    def of_pairs(chosen, rejected):
        return theirs(chosen, rejected, torch.tensor(zeros), torch.tensor(zeros))[0]

    up, down = np.float32([1, 2, -1, 3]), np.float32([-3, 1, -2, -1])
    same(of_pairs, ours, down, down[::-1].copy())  # both reference points are clamped at 0
    # Elsewhere the values are the same, and not the gradients: OpenRLHF's flow through the reference points.
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in (up, down))
    value = of_pairs(chosen, rejected)
    close(ours(up, down), value.detach())
    (gradient,) = torch.autograd.grad(value, chosen)
    assert np.abs(jax.grad(ours)(up, down) - gradient.numpy()).max() > 1e-3


@parity
def test_openrlhf_reward_model(torch, openrlhf):
    arrays = ADVANTAGES[:B], ADVANTAGES[B:], np.float32([0, 0.5, 1, 2])
    same(openrlhf.loss.PairWiseLoss(), lambda w, l, m: losses.bradley_terry_loss(w, l, margin=m).mean(), *arrays)


@parity
@pytest.mark.parametrize("mask", [RIGHT, HOLES], ids=["right", "holes"])
def test_openrlhf_ppo_losses(torch, openrlhf, mask):
    def mean(tokens):
        total, count = losses.sequence_mean(tokens, mask)
        return total / count

    policy, value = openrlhf.loss.PolicyLoss(0.2), openrlhf.loss.ValueLoss(0.2)
    rest = [torch.tensor(x) for x in (EARLIER, REWARDS, mask)]
    same(
        lambda logps: policy(logps, *rest),
        lambda logps: mean(losses.ppo_policy_loss(logps, EARLIER, REWARDS, clip=0.2)),
        POLICY,
    )
    same(
        lambda values: value(values, *(torch.tensor(x) for x in (OLD_VALUES, RETURNS, mask))),
        lambda values: mean(losses.ppo_value_loss(values, OLD_VALUES, RETURNS, clip=0.2)),
        VALUES,
    )
    nothing = torch.tensor(mask & (np.arange(ROWS) > 0)[:, None])  # in the first answer
    assert policy(torch.tensor(POLICY), *rest[:2], nothing).isnan()
    # The mean over tokens is another number.
    tokens = losses.ppo_value_loss(VALUES, OLD_VALUES, RETURNS, clip=0.2)
    assert abs(losses.masked_mean(tokens, mask) - mean(tokens)) > 1e-3


@parity
def test_openrlhf_token_rewards(torch, openrlhf):
    """PPO's reward: RTO's code adds its dense term to this, here 0."""
    for mask in (RIGHT, HOLES):
        policy, base, score, m = (torch.tensor(x) for x in (POLICY, BASE, SCORES, mask))
        kl = openrlhf.utils.compute_approx_kl(policy, base, m)
        close(np.where(mask, losses.kl_k1(POLICY, BASE), 0), kl)
        theirs = openrlhf.utils.compute_reward(score, 0.3, kl, m, reward_clip_range=(-10, 10))
        numbers = dict(beta1=1, beta2=0.3, official_parity=True)
        close(losses.rto_token_rewards(BASE, BASE, POLICY, SCORES, mask, **numbers), theirs)
        terms = {
            "kl": losses.RewardTerm(BASE - POLICY, scale=0.3),
            "score": losses.RewardTerm(SCORES, clip=10.0),
        }
        close(losses.compose_rewards(terms, mask).rewards, theirs)
    # An answer without tokens: OpenRLHF puts the score on the row's end, we nowhere.
    nothing = torch.zeros(ROWS, T, dtype=torch.bool)
    theirs = openrlhf.utils.compute_reward(score, 0.3, 0 * kl, nothing)
    assert (theirs[:, -1] == score).all()
    assert not losses.rto_token_rewards(BASE, BASE, POLICY, SCORES, nothing.numpy(), **numbers).any()


@parity
def test_openrlhf_kl_estimators_and_controllers(openrlhf, torch):
    policy, base = torch.tensor(POLICY), torch.tensor(BASE)
    close(losses.kl_k3(POLICY, BASE), openrlhf.utils.compute_approx_kl(policy, base, use_kl_estimator_k3=True))
    adaptive, fixed = openrlhf.ppo.AdaptiveKLController(0.15, 6.0, 10_000), openrlhf.ppo.FixedKLController(0.15)
    mine = 0.15
    for kl in (3.0, 6.1, 9.0, 5.8):
        adaptive.update(kl, 256)
        fixed.update(kl, 256)
        mine = losses.adaptive_kl(mine, kl, samples=256)
        close(mine, adaptive.value, 1e-6)
        close(losses.fixed_kl(0.15, kl), fixed.value)


@parity
def test_openrlhf_gae_and_its_holes(torch, openrlhf):
    def theirs(mask):
        arrays = (torch.tensor(x) for x in (VALUES, REWARDS, mask))
        return [x.numpy() for x in openrlhf.maker.get_advantages_and_returns(None, *arrays, 0.9, 0.8)]

    for function in (losses.gae, losses.gae_associative):
        for mine, other in zip(function(REWARDS, VALUES, RIGHT, gamma=0.9, lam=0.8), theirs(RIGHT), strict=True):
            close(mine, np.where(RIGHT, other, 0))
    # A hole is a state worth 0 for OpenRLHF, and no state for us: the answer without it.
    mine, _ = losses.gae(REWARDS, VALUES, HOLES, gamma=0.9, lam=0.8)
    zero = [np.where(HOLES, x, 0) for x in (REWARDS, VALUES)]
    close(losses.gae(*zero, RIGHT, gamma=0.9, lam=0.8)[0], np.where(RIGHT, theirs(HOLES)[0], 0))
    assert np.abs(np.where(HOLES, mine - theirs(HOLES)[0], 0)).max() > 0.1


def normalised(openrlhf, rows, mask):
    """`rows` as OpenRLHF's replay buffer normalises advantages."""
    items = [SimpleNamespace(advantages=row, action_mask=m) for row, m in zip(rows, mask, strict=True)]
    openrlhf.ppo.NaiveReplayBuffer.normalize(items, "advantages", SimpleNamespace(all_reduce=lambda x, _: x))
    return np.stack([item.advantages.numpy() for item in items])


@parity
def test_openrlhf_whitening_and_reinforce(torch, openrlhf):
    mask, rewards = torch.tensor(RIGHT), torch.tensor(REWARDS)
    returns = openrlhf.maker.get_cumulative_returns(None, rewards, mask, 0.9)
    close(losses.monte_carlo_returns(REWARDS, RIGHT, gamma=0.9), np.where(RIGHT, returns, 0))
    holes = openrlhf.maker.get_cumulative_returns(None, rewards, torch.tensor(HOLES), 0.9)
    assert np.abs(np.where(HOLES, losses.monte_carlo_returns(REWARDS, HOLES, gamma=0.9) - holes.numpy(), 0)).max() > 0.1
    mine = losses.reinforce_pp_advantages(REWARDS, RIGHT, gamma=0.9)
    close(mine, np.where(RIGHT, normalised(openrlhf, returns, mask), 0))
    close(losses.whiten(REWARDS, RIGHT), np.where(RIGHT, normalised(openrlhf, rewards * mask, mask), 0))
    # Its mean sums masked positions too: what stands there matters.
    junk = normalised(openrlhf, torch.where(mask, rewards, 5.0), mask)
    assert np.abs(np.where(RIGHT, losses.whiten(REWARDS, RIGHT) - junk, 0)).max() > 0.1
    close(losses.whiten(np.where(RIGHT, REWARDS, 5), RIGHT), losses.whiten(REWARDS, RIGHT))
    # σ² is raised to 10⁻⁸, where we add 10⁻⁸.
    small = np.float32(1e-4) * REWARDS
    ratio = (losses.whiten(small, RIGHT) / normalised(openrlhf, torch.tensor(small) * mask, mask))[RIGHT]
    variance = losses.masked_var(small, RIGHT)
    close(ratio, np.full(ratio.shape, np.sqrt(max(variance, 1e-8) / (variance + 1e-8))), 1e-4)


# ---- rlax ------------------------------------------------------------------------------------------------------------

SPREAD = np.array([[c == "1" for c in row] for row in ("1111000", "0001111", "1010101", "0110110", "1100011")])


def compact(function):
    """`function` of each row without its masked positions, back in place, and 0 elsewhere."""

    def spread(*arrays):
        kept = jax.vmap(function)(*(jnp.asarray(x)[SPREAD].reshape(ROWS, -1) for x in arrays))
        return jnp.zeros((ROWS, T)).at[SPREAD].set(kept.ravel())

    return spread


def both(ours, theirs, *arrays):
    """Values and gradients, in every array, of two functions of JAX; the latter of a weighted sum."""

    def weighted(function):
        def total(*arrays):
            out = function(*arrays)
            return jnp.sum(jnp.cos(jnp.arange(out.size)) * out.ravel()), out

        return jax.jit(jax.value_and_grad(total, tuple(range(len(arrays))), has_aux=True))

    mine, other = (weighted(function)(*(jnp.asarray(x) for x in arrays)) for function in (ours, theirs))
    jax.tree.map(close, mine, other)
    assert all(np.abs(x).max() > 1e-3 for x in other[1])


@parity
def test_rlax_advantages_and_returns(rlax):
    gamma, lam = 0.9, 0.8

    def ahead(values):
        return jnp.append(values[1:], 0)

    def discounts(rewards):
        return jnp.full(rewards.shape, gamma)

    def gae(rewards, values):
        values = jnp.append(values, 0)
        return rlax.truncated_generalized_advantage_estimation(rewards, discounts(rewards), lam, values)

    def lambda_returns(rewards, values):
        return rlax.lambda_returns(rewards, discounts(rewards), ahead(values), lam)

    def returns(rewards):
        return rlax.discounted_returns(rewards, discounts(rewards), 0.0)

    numbers = dict(gamma=gamma, lam=lam)
    for ours, theirs in [
        (lambda *x: losses.gae(*x, SPREAD, **numbers)[0], gae),
        (lambda *x: losses.gae_associative(*x, SPREAD, **numbers)[0], gae),
        (lambda *x: losses.lambda_returns(*x, SPREAD, **numbers), lambda_returns),
    ]:
        both(ours, compact(theirs), REWARDS, VALUES)
    both(lambda x: losses.monte_carlo_returns(x, SPREAD, gamma=gamma), compact(returns), REWARDS)


@parity
def test_rlax_policy_and_value_losses(rlax):
    def one(ratio, advantage):  # it returns a mean
        return rlax.clipped_surrogate_pg_loss(ratio[None], advantage[None], 0.2)

    both(
        lambda logps: losses.ppo_policy_loss(logps, EARLIER, REWARDS, clip=0.2),
        lambda logps: jax.vmap(jax.vmap(one))(jnp.exp(logps - EARLIER), jnp.asarray(REWARDS)),
        POLICY,
    )
    both(
        lambda values: losses.ppo_value_loss(values, OLD_VALUES, RETURNS, clip=np.inf),
        lambda values: rlax.l2_loss(values - RETURNS),
        VALUES,
    )


# rlax announces that it will drop its names for distrax's distributions, which it calls.
@parity
@pytest.mark.filterwarnings("ignore:Rlax .* will be deprecated:PendingDeprecationWarning")
def test_rlax_distributions(rlax):
    theirs, temperature = rlax.softmax(TEMPERATURE), dict(temperature=TEMPERATURE)
    both(lambda x: losses.entropy(x, **temperature), theirs.entropy, LOGITS)
    both(lambda x: losses.token_logps(x, IDS, **temperature), lambda x: theirs.logprob(IDS, x), LOGITS)
    both(lambda x, ref: losses.token_kl(x, ref, **temperature), lambda x, ref: theirs.kl(ref, x), LOGITS, REF)


# ---- torch and optax -------------------------------------------------------------------------------------------------


@parity
def test_trl_fused_head(torch, trainers):
    """Log-probabilities from hidden states: gradients in these and in the unembedding, as TRL's chunked head has them."""
    unembedding = np.random.default_rng(1).normal(size=(11, V)).astype(np.float32)
    ids = IDS % 11

    def theirs(hidden, unembedding):
        out = Model(hidden, TEMPERATURE, unembedding)(labels=torch.tensor(ids), fused_lm_head=True)
        return (out.log_probs**2).sum()

    def ours(hidden, unembedding):
        options = dict(temperature=TEMPERATURE, chunk=4)
        return (losses.linear_token_logps(hidden[:, :-1], unembedding, ids[:, 1:], **options) ** 2).sum()

    same(theirs, ours, LOGITS, unembedding)


@parity
def test_torch_distributions(torch):
    temperature = dict(temperature=TEMPERATURE)

    def their(logits):
        return torch.distributions.Categorical(logits=logits / TEMPERATURE)

    def kl(logits, ref):
        return torch.distributions.kl_divergence(their(ref), their(logits))

    def square(x):  # so that every entry has its own gradient
        return (x**2).sum()

    def statistics(x):
        return losses.linear_statistics(x, np.eye(V), REF, np.eye(V), IDS, chunk=4, **temperature)

    ids, real = torch.tensor(IDS), torch.tensor(ATTENTION)
    for theirs, ours, *arrays in [
        (lambda x: their(x).log_prob(ids), lambda x: losses.token_logps(x, IDS, **temperature), LOGITS),
        (lambda x: their(x).entropy(), lambda x: losses.entropy(x, **temperature), LOGITS),
        (kl, lambda x, ref: losses.token_kl(x, ref, **temperature), LOGITS, REF),
        (
            lambda x, ref: (kl(x, ref) * real).sum(-1),
            lambda x, ref: losses.sequence_kl(x, ref, ATTENTION, **temperature),
            *(LOGITS, REF),
        ),
        # The head is the identity: hidden states are logits.
        (
            lambda x: their(x).log_prob(ids) + their(x).entropy() + kl(x, torch.tensor(REF)),
            lambda x: sum(getattr(statistics(x), name) for name in ("logps", "entropy", "kl")),
            LOGITS,
        ),
        (lambda x: 0.3 * torch.logsumexp(x, -1), lambda x: losses.soft_values(x, beta=0.3), LOGITS),
        (
            lambda x, ref: -0.3 * kl(TEMPERATURE * x, TEMPERATURE * ref),
            lambda x, ref: losses.expected_implicit_rewards(x, ref, beta=0.3),
            *(LOGITS, REF),
        ),
    ]:
        same(
            lambda *x, theirs=theirs: square(theirs(*x)),
            lambda *x, ours=ours: square(ours(*x)),
            *arrays,
        )


@parity
def test_optax_pairs(optax):
    h = np.asarray(sum(x * sign for x, sign in zip(four(LOGITS), (1, -1, -1, 1), strict=True)))
    zeros, ones, cross_entropy = jnp.zeros(B), jnp.ones(B), optax.sigmoid_binary_cross_entropy
    both(
        lambda h: losses.dpo_loss(h, zeros, zeros, zeros, beta=0.4, label_smoothing=0.2),
        lambda h: cross_entropy(0.4 * h, 0.8 * ones),
        h,
    )
    both(
        lambda h: losses.hinge_loss(h, zeros, zeros, zeros, beta=0.4),
        lambda h: optax.losses.hinge_loss(0.4 * h, ones),
        h,
    )
    both(lambda h: losses.bradley_terry_loss(h, zeros, margin=0.3), lambda h: cross_entropy(h - 0.3, ones), h)


@parity
def test_optax_rankings(optax):
    """Plackett–Luce is a softmax over those still left, once for every place."""
    exist = (np.arange(V) + np.arange(2 * B)[:, None]) % 3 > 0
    exist[:, -1] = True  # optax's gradient is NaN where none is left

    def theirs(rewards):
        total = 0
        for k in range(V):
            left = exist & (np.arange(V) >= k)
            place = optax.losses.ranking_softmax_loss(rewards, jnp.arange(V) == k, where=left, reduce_fn=None)
            total = total + jnp.where(exist[:, k], place, 0)
        return total

    both(lambda x: losses.plackett_luce_loss(x, exist), theirs, LOGITS[:, 0])


@parity
def test_optax_tokens(optax):
    both(
        lambda x: -losses.token_logps(x, IDS),
        lambda x: optax.softmax_cross_entropy_with_integer_labels(x, IDS),
        LOGITS,
    )
    kl, logp = optax.losses.kl_divergence_with_log_targets, jax.nn.log_softmax
    both(losses.token_kl, lambda x, ref: kl(logp(x), logp(ref)), LOGITS, REF)
