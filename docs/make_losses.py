"""Writes docs/losses.md from the docstrings of `rto_jax.losses` and the names of its tests, and the page's figures.

python -m docs.make_losses               both
python -m docs.make_losses --text-only   the page alone: no matplotlib needed, a few seconds
"""

import argparse
import ast
import functools
import inspect
import re
import textwrap
from pathlib import Path

from rto_jax import losses

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "losses.md"
COMMAND = "python -m docs.make_losses"

# In the order of the page: what to read first, and the figures.
MODULES = {
    "preference": "Losses over preference pairs and rankings",
    "token_rewards": "What PPO is paid per token, as named terms",
    "advantages": "From rewards to advantages",
    "ppo": "Policy and value losses, KL estimators, controllers",
    "logprobs": "Log-probabilities, entropy, exact KL",
    "linear": "The same from hidden states, without logits",
    "q_star": "A language model as an optimal Q-function",
    "selection": "Choosing answers, and whose turn it is",
    "masking": "Sums, means and whitening under a mask",
}
FIGURES = {
    "preference": {
        "preference": "What each preference loss does with the margin βh (β = 1, ε = 0.1), and how hard it pushes. DPO "
        "never stops; cDPO and IPO turn back at a set margin; the hinge stops at one; robust DPO pushes even pairs that "
        "it has learnt; KTO lets go of pairs that are hopelessly wrong as well."
    },
    "token_rewards": {
        "placements": "One answer, one dense reward, four placements (β₁ = 0.05; the log-ratios are made up for the "
        "picture). Blue and red: the dense term; grey: the score of 0.2, on the last token. Only RS-PPO leaves the total "
        "to the score alone."
    },
    "advantages": {
        "gae": "How much of a reward at the end reaches a token k steps earlier, with a critic that knows nothing: λᵏ. "
        "This is why a dense reward helps at λ = 0.95, and why λ = 1 is the control."
    },
    "ppo": {
        "clipping": "The surrogate and its gradient in log π against the ratio, for a good token and a bad one. "
        "Clip-higher moves the upper edge only; the dual clip stops a bad token from dominating.",
        "kl": "The three estimators of KL(π ‖ π_ref), exact expectations over 64 tokens. k1 and k3 are unbiased; k2 and "
        "k3 are far less noisy while the two are near; far apart, k3 is the noisiest. As losses (below: a bell curve "
        "that starts between two humps) k1 does nothing, k2 descends KL(π ‖ π_ref) and takes one hump, k3 descends "
        "KL(π_ref ‖ π) and spreads over both.",
    },
}

# What the docstrings cite: the words there -> short name, title, address.
SOURCES = {
    "arXiv 2404.18922": ("RTO", "DPO Meets PPO: Reinforced Token Optimization for RLHF"),
    "arXiv 2404.12358": ("r to Q*", "From r to Q*: Your Language Model is Secretly a Q-Function"),
    "arXiv 2305.18290": ("DPO", "Direct Preference Optimization: Your Language Model is Secretly a Reward Model"),
    "arXiv 2307.09288": ("Llama 2", "Llama 2: Open Foundation and Fine-Tuned Chat Models"),
    "arXiv 2403.00409": ("Robust DPO", "Provably Robust DPO: Aligning Language Models with Noisy Feedback"),
    "arXiv 2310.12036": ("IPO", "A General Theoretical Paradigm to Understand Learning from Human Preferences"),
    "arXiv 2309.06657": ("RSO", "Statistical Rejection Sampling Improves Preference Optimization"),
    "arXiv 2305.10425": ("SLiC-HF", "SLiC-HF: Sequence Likelihood Calibration with Human Feedback"),
    "arXiv 2403.19159": ("R-DPO", "Disentangling Length from Quality in Direct Preference Optimization"),
    "arXiv 2405.14734": ("SimPO", "SimPO: Simple Preference Optimization with a Reference-Free Reward"),
    "arXiv 2404.11999": ("TDPO", "Token-level Direct Preference Optimization"),
    "arXiv 2402.01306": ("KTO", "KTO: Model Alignment as Prospect Theoretic Optimization"),
    "arXiv 2403.07691": ("ORPO", "ORPO: Monolithic Preference Optimization without Reference Model"),
    "arXiv 2401.08417": (
        "CPO",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    ),
    "arXiv 1506.02438": (
        "GAE",
        "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    ),
    "arXiv 2402.14740": (
        "RLOO",
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
    ),
    "arXiv 2502.01456": ("PRIME", "Process Reinforcement through Implicit Rewards"),
    "arXiv 2310.10505": (
        "ReMax",
        "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models",
    ),
    "arXiv 2402.03300": (
        "GRPO",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    ),
    "arXiv 2503.20783": ("Dr. GRPO", "Understanding R1-Zero-Like Training: A Critical Perspective"),
    "arXiv 2501.03262": (
        "REINFORCE++",
        "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models",
    ),
    "arXiv 2503.14476": ("DAPO", "DAPO: An Open-Source LLM Reinforcement Learning System at Scale"),
    "arXiv 1707.06347": ("PPO", "Proximal Policy Optimization Algorithms"),
    "arXiv 1912.09729": (
        "Dual-clip PPO",
        "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
    ),
    "arXiv 1909.08593": ("Ziegler et al.", "Fine-Tuning Language Models from Human Preferences"),
    "arXiv 2307.04964": ("MOSS", "Secrets of RLHF in Large Language Models Part I: PPO"),
    "arXiv 2009.01325": ("Stiennon et al.", "Learning to Summarize from Human Feedback"),
    "arXiv 2401.01879": ("Beirami et al.", "Theoretical Guarantees on the Best-of-n Alignment Policy"),
    "arXiv 2304.06767": ("RAFT", "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment"),
    "arXiv 2308.12050": (
        "Conditional SFT",
        "Aligning Language Models with Offline Reinforcement Learning from Human Feedback",
    ),
    "Mitchell 2023": (
        "cDPO",
        "A Note on DPO with Noisy Preferences & Relationship to IPO",
        "https://ericmitchell.ai/cdpo.pdf",
    ),
    'Schulman, "Approximating KL divergence" (2020)': (
        "Schulman",
        "Approximating KL Divergence",
        "http://joschu.net/blog/kl-approx.html",
    ),
    '"The N Implementation Details of RLHF with PPO"': (
        "N details",
        "The N Implementation Details of RLHF with PPO",
        "https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo",
    ),
    "Sutton and Barto": (
        "Sutton and Barto",
        "Reinforcement Learning: An Introduction, second edition (2018)",
        "http://incompleteideas.net/book/the-book-2nd.html",
    ),
    "Williams 1992": (
        "REINFORCE",
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
        "https://doi.org/10.1007/BF00992696",
    ),
    "Ng et al. 1999": (
        "Ng et al.",
        "Policy Invariance Under Reward Transformations: Theory and Application to Reward Shaping",
        "https://people.eecs.berkeley.edu/~pabbeel/cs287-fa09/readings/NgHaradaRussell-shaping-ICML1999.pdf",
    ),
    "Chan et al.": (
        "Chan et al.",
        "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
        "https://doi.org/10.1007/978-3-642-51461-6_3",
    ),
    "OpenAI baselines": (
        "OpenAI baselines",
        "OpenAI Baselines, high-quality implementations of reinforcement learning algorithms",
        "https://github.com/openai/baselines",
    ),
    "OpenRLHF's mean": (
        "OpenRLHF",
        "OpenRLHF: An Easy-to-use, Scalable and High-performance RLHF Framework",
        "https://arxiv.org/abs/2405.11143",
    ),
}

INTRO = """\
# The losses

Every public function of `rto_jax.losses`: what it computes, where that comes from, and which tests hold it. The package \
loads jax and numpy only; a [comparison with other libraries](parity.md) is a page of its own, and \
[three examples](../examples) put these functions into a Flax NNX, a Flax Linen and a bare optax loop. This page is \
written by `{command}` from the docstrings.

- **Arrays in, unreduced float32 out**, whatever the dtype that comes in. `masked_mean` gives the scalar to \
differentiate; `token_mean` and `sequence_mean` give a sum and a count that add up over micro-batches and devices.
- **Shapes.** B stands for any leading dimensions, also none (so batches and `vmap` both work), T for tokens, V for the \
vocabulary, K and N for answers to one prompt. Log-probabilities, KL and token rewards are in nats.
- **Alignment.** Index t is the token at t, its log-probability, its reward, and the value of the state *before* it. \
Nothing is shifted inside: the logits for t are those that a decoder emits one position earlier.
- **Masks** are boolean, True = a real token of the answer. A masked position is no transition: values, advantages and \
rewards pass over it, it gets 0, and what stands there (NaN too) changes neither the values nor the gradients of the rest.
- **Rewards and advantages are data.** Gradients flow through everything, so compute them outside of the gradient.
- **Errors.** A wrong shape, a mask that is not boolean or a number out of its range is a ValueError when the function \
is traced; it names the argument. Numbers may be traced, and mapped over; then their range is not checked.

```python
import jax
import jax.numpy as jnp
from rto_jax.losses import dpo_loss, masked_sum, token_logps

tokens = jnp.array([[3, 1, 2], [4, 2, 0]])  # a chosen and a rejected answer,
mask = jnp.array([[True, True, True], [True, True, False]])  # which is one token shorter


def loss(logits):  # [2, 3, 5]: of the distribution that each token was drawn from
    policy = masked_sum(token_logps(logits, tokens), mask, axis=-1)  # sums, nats
    reference = jnp.log(0.2) * mask.sum(-1)  # a uniform model
    return dpo_loss(policy[0], policy[1], reference[0], reference[1], beta=0.1)


value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 3, 5)))
print(value, gradient[1, 2])  # log 2 where π = π_ref, and zeros at the padding
```

## All functions

A source of "–" means that the formula is a definition. Each function has proofs of three kinds. **By hand**: a value \
worked out on paper, in a test whose name says so. **Identity**: a law that ties it to another function or to theory. \
**Oracle**: plain float64 loops in NumPy, written from the formula; for the cases in `tests/losses_cases.py`, \
`tests/test_losses.py` also checks gradients against finite differences, jit, vmap and shard_map, dtypes, errors and, \
under a mask, padding, holes and junk. The links lead to the most specific test; each section names more.
"""


# ---- tests -----------------------------------------------------------------------------------------------------------

HAND, IDENTITY, ORACLE = "by hand", "identity", "oracle"
EXEMPT = {("running_moments", ORACLE)}  # a constant
# What every function keeps, and no identity of its own.
CONTRACT = re.compile("named|argument|masked_positions|padding|finite_differences|float32|traced|leading_dim|signature")


@functools.cache
def proofs() -> dict[str, dict[str, list[tuple[str, str]]]]:
    """By function and kind, the tests that hold it: (file, name of the test or of the case).

    Oracles are the cases of tests/losses_cases.py that name the function. In every other test file that uses
    rto_jax.losses (but comparisons with other libraries), a test speaks of the functions that it, or a function beside it,
    names: by hand if its own name says "by_hand", with an oracle if it says "loops_in_numpy", else an identity, unless
    it checks the contract that all functions share.
    """
    found = {name: {HAND: [], IDENTITY: [], ORACLE: []} for name in functions()}
    for path in sorted((ROOT / "tests").glob("*.py")):
        tree = ast.parse(path.read_text())
        helpers = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        if path.name == "losses_cases.py":
            for key, case in cases(tree):
                for name in ({re.match(r"\w+", key)[0]} | called(case, helpers)) & set(found):
                    found[name][ORACLE].append((not key.startswith(name), path.name, key))
        elif not re.search("test_losses.py|parity|docs", path.name) and "rto_jax.losses" in imports(tree):
            for test in (name for name in helpers if name.startswith("test_")):
                kind = HAND if "by_hand" in test else ORACLE if "loops_in_numpy" in test else IDENTITY
                if kind == IDENTITY and CONTRACT.search(test):
                    continue
                speaks_of = called(helpers[test], helpers) & set(found)
                for name in speaks_of:
                    found[name][kind].append((len(speaks_of), path.name, test))
    # The tests that speak of the fewest functions first: in the others this one may be plumbing.
    return {
        name: {kind: [t[1:] for t in sorted(held)] for kind, held in kinds.items()} for name, kinds in found.items()
    }


def unproved() -> list[str]:
    return [
        f"{name}: {kind}"
        for name, kinds in proofs().items()
        for kind, tests in kinds.items()
        if not tests and (name, kind) not in EXEMPT
    ]


def names_in(node: ast.AST) -> set[str]:
    return {getattr(n, "id", None) or getattr(n, "attr", "") for n in ast.walk(node)}


def cases(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CASES":
            return [(key.value, value) for key, value in zip(node.value.keys, node.value.values, strict=True)]
    raise SystemExit("no CASES in tests/losses_cases.py")


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def called(test: ast.AST, helpers: dict[str, ast.FunctionDef]) -> set[str]:
    """The names in a test, and in the functions of its file that it names."""
    found, new = set(), names_in(test)
    while new:
        found |= new
        new = set().union(*(names_in(helpers[name]) for name in new if name in helpers)) - found
    return found


# ---- text ------------------------------------------------------------------------------------------------------------


def functions() -> dict[str, object]:
    """The public functions, in the order of the page: by module, and as the module has them."""
    found = {name: getattr(losses, name) for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    key = lambda f: (list(MODULES).index(module_of(f)), f.__code__.co_firstlineno)  # noqa: E731
    return dict(sorted(found.items(), key=lambda item: key(item[1])))


def classes(module: str) -> dict[str, type]:
    found = {name: getattr(losses, name) for name in losses.__all__ if inspect.isclass(getattr(losses, name))}
    return {name: c for name, c in found.items() if module_of(c) == module}


def module_of(thing: object) -> str:
    return thing.__module__.rsplit(".", 1)[-1]


def split_summary(summary: str) -> tuple[str, str]:
    """(formula, words): the summary of a docstring up to its first colon outside of brackets, if that is mathematics."""
    depth, colon = 0, len(summary)
    for i, c in enumerate(summary):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and summary.startswith(": ", i):
            colon = i
            break
    formula, words = summary[:colon], summary[colon + 2 :]
    if " " not in formula and "=" in words:  # "TDPO1: L = …"
        formula, words = summary, ""
    if not re.search(r"[=≤←√Σ]|round\(", formula):
        return "", summary
    return formula.strip().rstrip("."), words[:1].upper() + words[1:]


def prose(text: str) -> str:
    """Text of a docstring as Markdown: sources and functions linked, what would be markup escaped."""
    parts = re.split(r"(`[^`]*`)", text)
    for i, part in enumerate(parts):
        if part.startswith("`"):
            name = part.strip("`")
            if name in losses.__all__:
                parts[i] = f"[{part}](#{name.lower()})"
            continue
        part = escaped(part)
        for words in SOURCES:
            part = part.replace(words, f"[{words}]({address(words)})")
        parts[i] = part
    return "".join(parts)


def escaped(text: str) -> str:
    text = text.replace("<", "&lt;").replace("~", r"\~")
    text = re.sub(r"(?<!\w)\*(\w[^*]*?\w)\*(?!\w)", "\0\\1\0", text)  # emphasis is meant, V* and Q* are not
    return text.replace("*", r"\*").replace("\0", "*")


def cited(doc: str) -> list[str]:
    doc = " ".join(doc.split())
    return sorted((words for words in SOURCES if words in doc), key=doc.index)


def address(words: str) -> str:
    return (SOURCES[words][2:] or ("https://arxiv.org/abs/" + words.removeprefix("arXiv "),))[0]


def source_links(doc: str) -> str:
    return ", ".join(f"[{escaped(SOURCES[words][0])}]({address(words)})" for words in cited(doc)) or "–"


def signature(function: object) -> str:
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()]
    text = function.__name__ + str(inspect.Signature(bare))
    return "\n".join(textwrap.wrap(text, 76, subsequent_indent="    ", break_long_words=False))


def paragraphs(doc: str) -> list[str]:
    """Blocks of a docstring; those that are code keep their lines, the others become one line each."""
    blocks = re.split(r"\n\n+", doc)
    return [b if b.startswith("    ") else re.sub(r"\n *", " ", b) for b in blocks]


def arguments(paragraph: str, parameters: list[str]) -> list[tuple[str, str]]:
    """[(label, text)] where a paragraph speaks of arguments: "name, name: what they are. Returns what it returns."."""
    labels = r"(?:\w+(?:, \w+)*|The four log-probabilities|Lengths|Weights [^:]{1,9})(?=: )"
    pieces = re.split(rf"(?:^|(?<=[.;)] ))({labels}|Returns(?= )|Differs from(?= ))", paragraph)
    out = [("", pieces[0].strip())]
    for label, text in zip(pieces[1::2], pieces[2::2], strict=True):
        names = label.split(", ")
        if set(names) <= set(parameters):
            out.append((", ".join(f"`{name}`" for name in names), re.sub(";$", ".", text.removeprefix(": ").strip())))
        elif re.match("Returns$|Differs from$|The four|Lengths$|Weights", label):
            out.append((label, text.removeprefix(": ").strip()))
        else:  # a colon in a sentence
            out[-1] = (out[-1][0], f"{out[-1][1]} {label}{text}".strip())
    return [(label, text) for label, text in out if text]


def code(block: str) -> list[str]:
    block = textwrap.dedent(block)
    try:
        ast.parse(block)
    except SyntaxError:  # a formula
        return ["```text", block, "```"]
    return ["```python", block, "```"]


def section(name: str, function: object) -> list[str]:
    summary, *rest = paragraphs(inspect.getdoc(function))
    formula, words = split_summary(summary)
    lines = [f"### {name}", "", "```python", signature(function), "```", ""]
    if formula:
        lines += ["```text", *re.split(r",? {2,}|, (?=\S{1,3} = )", formula), "```", ""]
    if words:
        lines += [prose(words), ""]
    parameters = list(inspect.signature(function).parameters)
    for block in rest:
        if block.startswith("    "):
            lines += [*code(block), ""]
            continue
        pieces = arguments(block, parameters)
        if [label for label, _ in pieces] == [""]:
            lines += [prose(block), ""]
            continue
        for label, text in pieces:
            verb = {"Returns": "**Returns**", "Differs from": "**Differs** from"}.get(
                label, f"{label}:" if label else ""
            )
            lines.append(f"- {verb} {prose(text)}" if verb else f"{prose(text)}\n")
        lines.append("")
    return lines + proof_list(name)


def proof_list(name: str, shown: int = 4) -> list[str]:
    lines = ["<details><summary>Proofs</summary>", ""]
    for kind, tests in proofs()[name].items():
        files = {}
        for file, test in tests[:shown]:
            files.setdefault(file, []).append(f"`{test}`")
        parts = [f"{', '.join(names)} in [{file}](../tests/{file})" for file, names in files.items()]
        if len(tests) > shown:
            parts.append(f"and {len(tests) - shown} more")
        lines += [f"- {kind}: " + "; ".join(parts)] * bool(parts)
    return [*lines, "", "</details>", ""]


def table() -> list[str]:
    lines = ["| function | formula | source | proofs |", "|---|---|---|---|"]
    module = None
    for name, function in functions().items():
        if module_of(function) != module:
            module = module_of(function)
            lines.append(f"| **[{module}](#{module})** | {MODULES[module]} | | |")
        doc = inspect.getdoc(function)
        formula, words = split_summary(paragraphs(doc)[0])
        cell = f"`{formula}`" if formula else prose(words.split(": ")[0].rstrip("."))
        held = [f"[{kind}](../tests/{tests[0][0]})" for kind, tests in proofs()[name].items() if tests]
        row = [f"[`{name}`](#{name.lower()})", re.sub(" {2,}", " ", cell), source_links(doc), " · ".join(held)]
        lines.append("| " + " | ".join(x.replace("|", r"\|") for x in row) + " |")
    return lines


def page() -> str:
    lines = [INTRO.format(command=COMMAND), *table(), ""]
    for module, title in MODULES.items():
        lines += [
            f"## {module}",
            "",
            f"{title}. Source: [`rto_jax/losses/{module}.py`](../rto_jax/losses/{module}.py).",
            "",
        ]
        package = inspect.getmodule(next(f for f in functions().values() if module_of(f) == module))
        for block in paragraphs(inspect.getdoc(package))[1:]:
            lines += [*code(block), ""] if block.startswith("    ") else [prose(block), ""]
        for stem, caption in FIGURES.get(module, {}).items():
            lines += [f"![{stem}, described below](figures/{stem}.svg)", "", caption, ""]
        for name, cls in classes(module).items():
            lines += [f"### {name}", "", "```python", inspect.getsource(cls).rstrip(), "```", ""]
        for name, function in functions().items():
            if module_of(function) == module:
                lines += section(name, function)
    lines += ["## Sources", ""]
    everything = " ".join(" ".join(inspect.getdoc(f).split()) for f in functions().values())
    for words, (short, title, *_) in SOURCES.items():
        if words in everything:
            lines.append(f"- {escaped(short)}: [{escaped(title)}]({address(words)})")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text-only", action="store_true", help="leave the figures as they are")
    if not parser.parse_args().text_only:
        from docs import losses_figures

        losses_figures.write(ROOT / "docs" / "figures")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
