"""One train step beside TRL's and tunix's, alternating in one run; writes benchmarks/results/steps-cpu.json.

    python -m benchmarks.steps [--peer trl=PYTHON] [--peer tunix=PYTHON] [--case CASE …] [--runs N] [--out FILE]

PYTHON is an interpreter that has the peer; a peer that is not given is left out. Every implementation lives in a process
of its own, runs its own library's train loop on the same shapes, and waits for its turn between two steps.
benchmarks/README.md has the method.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shlex
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

LEARNING_RATE, BETA, CLIP, MAX_NORM = 1e-5, 0.1, 0.2, 1.0
PACKAGES = ("jax", "jaxlib", "flax", "optax", "google-tunix", "trl", "transformers", "torch", "accelerate", "numpy")


class Size(NamedTuple):
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def head(self) -> int:
        return self.width // self.heads


class Case(NamedTuple):
    kind: str  # dpo, sft or ppo
    size: str
    lengths: list[tuple[int, int]]  # tokens of prompt and answer (EOS included) of every row, of DPO of both answers
    micro: int  # micro-batches of ours
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Real tokens of the batch, a pair counted as two rows: the same for everyone, whoever computes what."""
        return sum(p + a for p, a in self.lengths) * (2 if self.kind == "dpo" else 1)


SIZES = {"base": Size(512, 6, 8, 8, 1536, 32000), "smollm2": Size(576, 30, 9, 3, 1536, 49152)}
# Questions and answers of GSM8K's training records 17 to 32, in SmolLM2's tokens. Padded to the longest, they take 1.63
# times their tokens; for the set's batches of 16 that is 1.7 on average.
GSM8K = [
    (73, 90), (50, 130), (63, 91), (57, 155), (94, 152), (53, 96), (87, 227), (55, 210),
    (59, 143), (64, 146), (116, 91), (68, 132), (43, 85), (50, 86), (48, 90), (71, 58),
]  # fmt: skip
ROW = 560  # slots of a packed row
CASES = {
    "dpo 64+192": Case("dpo", "base", [(64, 192)] * 4, micro=2),
    "dpo 192+64": Case("dpo", "base", [(192, 64)] * 4, micro=2),
    "sft 64+192": Case("sft", "base", [(64, 192)] * 8, micro=4),
    "sft gsm8k": Case("sft", "base", GSM8K, packed=True, micro=3),
    "ppo 64+192": Case("ppo", "base", [(64, 192)] * 8, micro=4),
    "smollm2 dpo 64+192": Case("dpo", "smollm2", [(64, 192)] * 4, micro=2),
    "smollm2 ppo 64+192": Case("ppo", "smollm2", [(64, 192)] * 8, micro=4),
}


def ids(case: Case, which: int = 0) -> list[tuple[list[int], list[int]]]:
    """Random tokens of the case's lengths; id 0 pads, 1 ends an answer. `which` chooses among answers to the prompt."""
    out, vocab = [], SIZES[case.size].vocab
    for row, (prompt, answer) in enumerate(case.lengths):
        draw = lambda n, *seed: random.Random(str(seed)).choices(range(2, vocab), k=n)  # noqa: E731
        out.append((draw(prompt, row), draw(answer - 1, row, which) + [1]))
    return out


def forward_flops(kind: str, size: Size, lengths: list[tuple[int, int]]) -> tuple[float, float]:
    """Floating-point operations that one forward pass cannot do without, in the blocks and in the unembedding: products
    with weights, and attention's two, of a prompt once, of logits at answers only, of keys that a token may see."""
    answers = 2 if kind == "dpo" else 1
    block = 2 * size.width * size.head * (size.heads + size.kv_heads) + 3 * size.width * size.mlp
    body = unembed = 0.0
    for prompt, answer in lengths:
        seen = prompt * (prompt + 1) / 2 + answers * (answer * prompt + answer * (answer + 1) / 2)
        body += size.layers * (2 * block * (prompt + answers * answer) + 4 * size.heads * size.head * seen)
        unembed += 2 * size.width * size.vocab * answers * answer
    return body, unembed


def model_flops(kind: str, size: Size, lengths: list[tuple[int, int]]) -> float:
    """Of a whole step: backward is twice forward; DPO has its reference, PPO its critic."""
    body, unembed = forward_flops(kind, size, lengths)
    return {"dpo": 4 * (body + unembed), "sft": 3 * (body + unembed), "ppo": 6 * body + 3 * unembed}[kind]


# ---- a process of one implementation ---------------------------------------------------------------------------------


class Finished(BaseException):
    """Ends a library's own train loop."""


class Turn:
    """Steps when told to: waits for a line, does a step, answers with how long it took."""

    def __init__(self):
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print
        self.idle = memory()

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "step":
            raise Finished
        self.started = time.perf_counter(), time.process_time()

    def done(self) -> None:
        self.say({"seconds": time.perf_counter() - self.started[0], "cpu": time.process_time() - self.started[1]})

    def say(self, found: dict) -> None:
        print(json.dumps(found), file=self.channel, flush=True)


def memory() -> int:
    """Most bytes of memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(name: str, case: Case) -> None:
    turn = Turn()
    with contextlib.suppress(Finished):
        {"ours": ours, "tunix": tunix, "trl": trl, "trl packed": trl, "product": product}[name](case, turn, name)
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    turn.say({"peak_bytes": memory(), "idle_bytes": turn.idle, "versions": installed})


def product(case: Case, turn: Turn, name: str) -> None:
    """A large float32 product, 3072 cubed."""
    import jax

    a, b = (jax.random.normal(jax.random.key(i), (3072, 3072)) for i in range(2))
    times = jax.jit(lambda a, b: a @ b)
    while True:
        turn.wait()
        jax.block_until_ready(times(a, b))
        turn.done()


def padded(rows, fill: int = 0):
    """Prompts on the left and answers on the right, int32 [B, P] and [B, T], and whether each token is real."""
    import numpy as np

    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    prompts, answers = np.full((len(rows), left), fill, np.int32), np.full((len(rows), right), fill, np.int32)
    real = np.zeros_like(prompts, bool), np.zeros_like(answers, bool)
    for i, (prompt, answer) in enumerate(rows):
        prompts[i, left - len(prompt) :], real[0][i, left - len(prompt) :] = prompt, True
        answers[i, : len(answer)], real[1][i, : len(answer)] = answer, True
    return prompts, answers, *real


def numbers(case: Case, count: int) -> list:
    """`count` arrays of what a rollout would leave, float32 [B, T]."""
    import numpy as np

    rng, shape = np.random.default_rng(0), (len(case.lengths), max(a for _, a in case.lengths))
    return [rng.normal(size=shape).astype(np.float32) for _ in range(count)]


def packed(rows):
    """All rows of a Sequences in packed ones, as a run with --pack would have them."""
    import jax
    import numpy as np

    from rto_jax.data.packing import lengths_of, pack

    start = rows.tokens.shape[1] - rows.mask.shape[1]
    arranged = pack(lengths_of(rows), ROW, 0, (start, rows.mask.shape[1]))
    print(arranged.note, flush=True)
    every = np.arange(arranged.count)
    return arranged.batch(lambda records: jax.tree.map(lambda x: x[records], rows), every, every)


def ours(case: Case, turn: Turn, name: str) -> None:
    import jax
    import numpy as np

    from rto_jax import programs
    from rto_jax.models import LlamaConfig
    from rto_jax.optim import OptimConfig
    from rto_jax.sharding import MeshConfig, make_mesh, put_batch, put_params
    from rto_jax.steps import ActorCritic, PairsWithReference, PpoConfig
    from rto_jax.types import Experience, Pairs, Sequences

    s, mesh = SIZES[case.size], make_mesh(MeshConfig(1), jax.devices()[:1])
    config = LlamaConfig(
        vocab_size=s.vocab, width=s.width, layers=s.layers, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head,
        mlp_width=s.mlp, tied_embeddings=case.kind != "ppo", unroll=6,
    )  # fmt: skip
    optim = OptimConfig(learning_rate=LEARNING_RATE, warmup=0.0, max_grad_norm=MAX_NORM)
    steps = 1000

    def params(head: str, seed: int):
        return put_params(jax.jit(programs.init_fn(config, head))(jax.random.key(seed)), mesh)

    def state(head: str, seed: int):
        return programs.start(config, head, optim, steps, mesh)(params(head, seed))

    def rows(which: int = 0) -> Sequences:
        prompts, answers, left, right = padded(ids(case, which))
        return Sequences(np.concatenate([prompts, answers], 1), np.concatenate([left, right], 1), right)

    if case.kind == "ppo":
        _, old_values, advantages, returns = (0.1 * x for x in numbers(case, 4))
        trained, ppo = (
            ActorCritic(state("lm", 0), state("last", 1)),
            PpoConfig(clip=CLIP, value_clip=CLIP, minibatches=1),
        )
        old = programs.response_logps(config, mesh)(trained.policy.params, put_batch(rows(), mesh))
        batch = Experience(rows(), np.asarray(old), old_values, advantages, returns)
        update = programs.ppo_update(config, config, optim, optim, steps, ppo, 1.0, case.micro, mesh)
        step = lambda state, batch: update(state, batch, jax.random.key(0))  # noqa: E731
    elif case.kind == "sft":
        batch, trained = packed(rows()) if case.packed else rows(), state("lm", 0)
        step = programs.supervised_step("sft", config, "lm", optim, steps, case.micro, mesh)
    else:
        batch, trained, reference = Pairs(rows(0), rows(1)), state("lm", 0), params("lm", 1)
        score = programs.pair_logps(config, mesh)
        train = programs.supervised_step("dpo", config, "lm", optim, steps, case.micro, mesh, (("beta", BETA),))
        step = lambda state, batch: train(state, PairsWithReference(batch, *score(reference, batch)))  # noqa: E731
    while True:
        turn.wait()
        trained, _ = jax.block_until_ready(step(trained, put_batch(batch, mesh)))
        turn.done()


def tunix(case: Case, turn: Turn, name: str) -> None:
    """Its trainers' own `train`, fed by an iterator that waits; no rematerialisation, as its configuration has it."""
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.rl import algo_core, common, trainer
    from tunix.rl.ppo import ppo_learner
    from tunix.rl.utils import create_critic_model
    from tunix.sft import peft_trainer, utils
    from tunix.sft.dpo import dpo_trainer

    s = SIZES[case.size]
    config = ModelConfig(
        num_layers=s.layers, vocab_size=s.vocab, embed_dim=s.width, hidden_dim=s.mlp, num_heads=s.heads, head_dim=s.head,
        num_kv_heads=s.kv_heads, rope_theta=10000, norm_eps=1e-5, weight_tying=case.kind != "ppo",
    )  # fmt: skip

    class Model(
        Llama3
    ):  # its `compute_score` gives every critic segment ids, which its Llama3 doesn't take: 0.1.7 can't train one
        def __call__(self, *args, segment_ids=None, **named):
            return super().__call__(*args, **named)

    model = lambda seed: (Model if case.kind == "ppo" else Llama3)(config, rngs=nnx.Rngs(seed))  # noqa: E731
    optimizer = lambda: optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0))  # noqa: E731
    prompts, answers, left, right = padded(ids(case))

    def turns(batch, models):
        while True:
            jax.block_until_ready([nnx.state(model) for model in models])
            if hasattr(turn, "started"):
                turn.done()
            turn.wait()
            yield batch

    plain = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**6)
    if case.kind == "dpo":
        policy, (_, rejected, _, rejected_real) = model(0), padded(ids(case, 1))
        options = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=10**6, beta=BETA)
        batch = dpo_trainer.TrainingInput(prompts, left, answers, right, rejected, rejected_real)
        dpo_trainer.DPOTrainer(policy, model(1), optimizer(), options).train(turns(batch, [policy]))
    elif case.kind == "sft":
        policy = model(0)
        whole = peft_trainer.TrainingInput(
            np.concatenate([prompts, answers], 1), np.concatenate([np.zeros_like(left), right], 1)
        )
        real = np.concatenate([left, right], 1)

        def inputs(x):
            return {
                "input_tokens": x.input_tokens,
                "input_mask": x.input_mask,
                "positions": utils.build_positions_from_mask(real),
                "attention_mask": utils.make_causal_attn_mask(real),
            }

        trainer_ = peft_trainer.PeftTrainer(policy, optimizer(), plain).with_gen_model_input_fn(inputs)
        trainer_.train(turns(whole, [policy]))
    else:
        # What PPOLearner gives its two trainers, and the two calls of RLLearner.train after a rollout.
        actor = model(0)
        critic = create_critic_model(actor)
        options = ppo_learner.PPOConfig(epsilon=CLIP, clip_range_value=CLIP)
        both = []
        for one, loss, extra in (
            (actor, algo_core.ppo_policy_loss_fn, {"algo_config": options}),
            (critic, algo_core.ppo_value_loss_fn, {"clip_range_value": CLIP}),
        ):
            made = trainer.Trainer(one, optimizer(), plain, custom_checkpoint_metadata_fn=dict)
            made.is_managed_externally = True
            made.with_loss_fn(loss, has_aux=True)
            made.with_gen_model_input_fn(lambda x, extra=extra: {"train_example": x, "pad_id": 0, "eos_id": 1} | extra)
            both.append(made)
        _, old_values, advantages, returns = (0.1 * x for x in numbers(case, 4))
        old = common.compute_per_token_logps(*nnx.split(actor), prompts, answers, pad_id=0, eos_id=1)
        batch = ppo_learner.TrainExample(
            prompts, left, answers, right, advantages=advantages, ref_per_token_logps=None,
            old_per_token_logps=np.asarray(old), returns=returns, old_values=old_values,
        )  # fmt: skip
        for example in turns(batch, [actor, critic]):
            for made in both:
                made.train([example])


def trl(case: Case, turn: Turn, name: str) -> None:
    """Its trainers' own `train`, with a callback that waits. Float32 and no gradient checkpointing: neither is its default."""
    import tempfile

    import torch
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    s = SIZES[case.size]
    names = ["<pad>", "<eos>", *map(str, range(2, s.vocab))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=names[0], eos_token=names[1])

    def model(seed: int):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.mlp, num_hidden_layers=s.layers,
                num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, tie_word_embeddings=True, rms_norm_eps=1e-5,
                max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=1, dtype="float32",
            )
        )  # fmt: skip

    class Wait(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.wait()

        def on_step_end(self, *_, **__):
            turn.done()

    rows, text = ids(case), lambda tokens: " ".join(names[i] for i in tokens)
    with tempfile.TemporaryDirectory() as folder:
        common = dict(
            output_dir=folder, max_steps=10**6, per_device_train_batch_size=len(rows), learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_NORM, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], max_length=ROW,
            logging_strategy="no", save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        if case.kind == "dpo":
            records = [
                {"prompt": text(p), "chosen": " " + text(a), "rejected": " " + text(b)}
                for (p, a), (_, b) in zip(rows, ids(case, 1), strict=True)
            ]
            trainer = DPOTrainer(
                model(0), model(1), DPOConfig(**common, beta=BETA), train_dataset=Dataset.from_list(records),
                processing_class=tokenizer, callbacks=[Wait()],
            )  # fmt: skip
        else:
            records = [{"input_ids": p + a, "completion_mask": [0] * len(p) + [1] * len(a)} for p, a in rows]
            options = SFTConfig(**common, packing=name == "trl packed", completion_only_loss=True)
            trainer = SFTTrainer(
                model(0),
                options,
                train_dataset=Dataset.from_list(records),
                processing_class=tokenizer,
                callbacks=[Wait()],
            )
        seen = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
        print({key: tuple(value.shape) for key, value in seen.items() if hasattr(value, "shape")}, flush=True)
        trainer.train()


# ---- the run ---------------------------------------------------------------------------------------------------------


class Worker:
    def __init__(self, name: str, python: str, case: str):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [python, __file__, "--serve", name, "--case", case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=None if os.environ.get("STEPS_DEBUG") else subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": str(Path(__file__).parent.parent)} if name in ("ours", "product") else environment,
        )  # fmt: skip

    def ask(self, what: str) -> dict:
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def stop(self) -> dict:
        found = self.ask("stop")
        self.process.stdin.close()
        self.process.wait()
        return found


def compare(name: str, pythons: dict[str, str], runs: int) -> dict:
    """Every implementation's figures for one case."""
    case, workers = CASES[name], {}
    names = ["ours", *(x for x in pythons if x != "ours"), "product"]
    if case.kind == "ppo":
        names = [x for x in names if x != "trl"]  # it has no PPO with a critic
    if case.packed and "trl" in names:
        names.append("trl packed")
    first, times = {}, {x: [] for x in names}
    for x in names:
        workers[x] = Worker(x, pythons.get(x.split()[0], pythons["ours"]), name)
        first[x] = workers[x].ask("step")["seconds"]
        workers[x].ask("step")
    for run in range(runs):
        order = names[run % len(names) :] + names[: run % len(names)]
        for x in order:
            times[x].append(workers[x].ask("step"))
    ends = {x: workers[x].stop() for x in names}
    rate = 2 * 3072**3 / statistics.median(t["seconds"] for t in times["product"])
    table = {}
    for x in names[:-1] if names[-1] == "product" else [y for y in names if y != "product"]:
        seconds = statistics.median(t["seconds"] for t in times[x])
        table[x] = {
            "seconds": [round(t["seconds"], 4) for t in times[x]],
            "median_seconds": seconds,
            "median_cpu_seconds": statistics.median(t["cpu"] for t in times[x]),
            "tokens_per_second": case.tokens / seconds,
            "first_step_seconds": first[x],
            "peak_bytes": ends[x]["peak_bytes"],
            "versions": ends[x]["versions"],
        }
    flops = model_flops(case.kind, SIZES[case.size], case.lengths)
    share = flops / table["ours"]["median_seconds"] / rate
    return {"tokens": case.tokens, "product_flops_per_second": rate, "model_flops": flops,
            "share_of_product": share, "implementations": table}  # fmt: skip


def show(name: str, found: dict) -> None:
    rows = found["implementations"]
    ours = rows["ours"]
    print(f"\n{name}: {found['tokens']} tokens; a large product makes {found['product_flops_per_second'] / 1e9:.0f} GFLOP/s, "
          f"our model FLOPs {100 * found['share_of_product']:.0f} % of it")  # fmt: skip
    for x, row in rows.items():
        print(
            f"  {x:<11}{row['tokens_per_second']:8.0f} tokens/s   step {row['median_seconds']:7.3f} s (CPU {row['median_cpu_seconds']:7.2f})"
            f"   first {row['first_step_seconds']:6.1f} s   peak {row['peak_bytes'] / 2**20:7.0f} MiB"
            f"   ours: {row['median_seconds'] / ours['median_seconds']:.2f}x the speed, "
            f"{ours['peak_bytes'] / row['peak_bytes']:.2f}x the memory", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="append", default=[], help="trl=PYTHON or tunix=PYTHON")
    parser.add_argument("--case", action="append", default=[], choices=[*CASES], help="default: all")
    parser.add_argument("--runs", type=int, default=9, help="timed steps of each implementation")
    parser.add_argument("--out", default="benchmarks/results/steps-cpu.json", help="JSON file")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, CASES[args.case[0]])
    from benchmarks.losses import processor
    from rto_jax.metrics import git_commit

    pythons = {"ours": sys.executable} | dict(x.split("=", 1) for x in args.peer)
    found = {
        "command": "python -m benchmarks.steps " + shlex.join(x.split("=")[0] + "=PYTHON" if "=" in x else x for x in sys.argv[1:]),
        "git": git_commit(),
        "cpu": {"model": processor(), "cores": len(os.sched_getaffinity(0))},
        "python": platform.python_version(),
        "runs": args.runs,
        "cases": {},
    }  # fmt: skip
    for name in args.case or CASES:
        found["cases"][name] = compare(name, pythons, args.runs)
        show(name, found["cases"][name])
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
