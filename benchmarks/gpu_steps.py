"""DPO and PPO steps of a 1B Llama in bfloat16 on one GPU, beside transformers and torch; writes benchmarks/results/steps-DEVICE.json.

    python -m benchmarks.gpu_steps [--tiny] [--only NAME …] [--steps N] [--out FILE]

Parameters, gradients and Adam's moments are bfloat16 on both sides. Every implementation has a process of its own, one
after another, and takes its steps twice: "lean" computes the blocks' activations again in the backward pass, "fast" keeps
them. benchmarks/README.md has the method. --tiny is a rehearsal for any machine.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from benchmarks.steps import BETA, CLIP, LEARNING_RATE, MAX_NORM, PACKAGES, Size, model_flops

# huggingface.co/meta-llama/Llama-3.2-1B, config.json; 1024 tokens of prompt and of every answer
SIZE, TINY = Size(2048, 16, 32, 8, 8192, 128256), Size(64, 2, 4, 2, 128, 512)
ROWS = {"dpo": 4, "ppo": 8}  # pairs, answers: 16,384 tokens each
NAMES = ("ours dpo", "torch dpo", "ours ppo", "torch ppo")
LIMIT = 240  # seconds of one process


def shape(tiny: bool) -> tuple[Size, int, int, int]:
    """The model, tokens of a prompt and of an answer, and the side of the large product."""
    return (TINY, 16, 16, 256) if tiny else (SIZE, 1024, 1024, 8192)


def tokens(kind: str, size: Size, prompt: int, answer: int):
    """int [B, P + T], of pairs the chosen and then the rejected rows [2B, P + T]; nothing is padded."""
    import numpy as np

    rng, rows = np.random.default_rng(0), ROWS[kind]
    prompts = rng.integers(2, size.vocab, (rows, prompt))
    answers = rng.integers(2, size.vocab, (rows * (2 if kind == "dpo" else 1), answer))
    return np.concatenate([np.tile(prompts, (len(answers) // rows, 1)), answers], axis=1)


def numbers(rows: int, answer: int) -> list:
    """Old values, advantages and returns, float32 [B, T]."""
    import numpy as np

    rng = np.random.default_rng(1)
    return [(0.1 * rng.normal(size=(rows, answer))).astype(np.float32) for _ in range(3)]


class Report:
    """Prints what is known so far, a JSON object on the last line: a process that fails has told what it had."""

    def __init__(self):
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.found: dict = {"versions": {}}
        for package in PACKAGES:
            try:
                self.found["versions"][package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue

    def add(self, **found) -> None:
        self.found |= found
        print(json.dumps(self.found), file=self.channel, flush=True)


def host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(step, count: int, sync) -> dict:
    """Seconds of `count` steps after a first one, and the losses of first and last; `step` returns the loss."""
    started = time.perf_counter()
    losses, seconds = [float(step())], []
    first = time.perf_counter() - started
    for _ in range(count):
        sync()
        started = time.perf_counter()
        loss = step()
        sync()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
    return {
        "median_seconds": statistics.median(seconds), "seconds": [round(x, 4) for x in seconds],
        "first_step_seconds": round(first, 2), "losses": [losses[0], losses[-1]],
    }  # fmt: skip


def product_rate(times, sync, side: int) -> float:
    """FLOP/s of a bfloat16 product side³: the best of five runs of ten."""
    times()
    sync()
    best = 1e9
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            times()
        sync()
        best = min(best, time.perf_counter() - started)
    return 10 * 2 * side**3 / best


# ---- ours ------------------------------------------------------------------------------------------------------------


def ours(kind: str, tiny: bool, count: int, report: Report) -> None:
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from rto_jax import programs
    from rto_jax.models import LlamaConfig
    from rto_jax.models.attention import choose
    from rto_jax.optim import OptimConfig
    from rto_jax.sharding import MeshConfig, make_mesh, put_batch, put_params
    from rto_jax.steps import ActorCritic, PairsWithReference, PpoConfig
    from rto_jax.types import Experience, Pairs, Sequences

    s, prompt, answer, side = shape(tiny)
    device = jax.devices()[0]
    report.add(device=device.device_kind)
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    multiply, last = jax.jit(lambda a, b: a @ b), []

    def times():
        last[:] = [multiply(a, b)]

    report.add(product_flops_per_second=product_rate(times, lambda: jax.block_until_ready(last), side))
    a = b = None
    last.clear()

    mesh = make_mesh(MeshConfig(1), [device])
    config = LlamaConfig(
        vocab_size=s.vocab, width=s.width, layers=s.layers, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head,
        mlp_width=s.mlp, rope_base=500000.0, dtype="bfloat16", param_dtype="bfloat16", remat="full",
    )  # fmt: skip
    optim = OptimConfig(
        learning_rate=LEARNING_RATE, warmup=0.0, max_grad_norm=MAX_NORM, moments="bfloat16", gradients="bfloat16"
    )
    report.add(attention=choose(config.attention, config.dtype, mesh))

    def params(head: str, seed: int):
        return put_params(jax.jit(programs.init_fn(config, head))(jax.random.key(seed)), mesh)

    def state(head: str, seed: int):
        return programs.start(config, head, optim, 1000, mesh)(params(head, seed))

    rows = tokens(kind, s, prompt, answer).astype(np.int32)
    real = Sequences(rows, np.ones_like(rows, bool), np.ones((len(rows), answer), bool))
    if kind == "dpo":
        half = len(rows) // 2
        pairs = Pairs(*(jax.tree.map(lambda x, part=part: x[part], real) for part in (slice(half), slice(half, None))))
        pairs, reference, trained = put_batch(pairs, mesh), params("lm", 0), state("lm", 0)
        score = programs.pair_logps(config, mesh)

        def steps(config):
            train = programs.supervised_step("dpo", config, "lm", optim, 1000, 1, mesh, (("beta", BETA),))
            return lambda state: train(state, PairsWithReference(pairs, *score(reference, pairs)))
    else:
        trained = ActorCritic(state("lm", 0), state("last", 1))
        real = put_batch(real, mesh)
        old = programs.response_logps(config, mesh)(trained.policy.params, real)
        batch = Experience(real, old, *put_batch(tuple(numbers(len(rows), answer)), mesh))
        ppo = PpoConfig(clip=CLIP, value_clip=CLIP, minibatches=1)

        def steps(config):
            update = programs.ppo_update(config, config, optim, optim, 1000, ppo, 1.0, 1, mesh)
            return lambda state: update(state, batch, jax.random.key(0))

    held = [trained]
    del trained
    for name, remat in (("lean", "full"), ("fast", "none")):  # the peak can only rise
        try:
            run = steps(dataclasses.replace(config, remat=remat))

            def step(run=run):
                held[0], metrics = run(held[0])
                return metrics["loss" if kind == "dpo" else "policy_loss"]

            took = measure(step, count, lambda: jax.block_until_ready(held[0]))
        except Exception as error:
            report.add(**{name: {"error": last_line(error)}})
            break
        stats = device.memory_stats() or {}
        report.add(**{name: took | {"peak_bytes": stats.get("peak_bytes_in_use", host_peak())}})


# ---- transformers and torch ------------------------------------------------------------------------------------------


def plain(kind: str, tiny: bool, count: int, report: Report) -> None:
    import torch
    import transformers
    from torch.nn.functional import cross_entropy, logsigmoid

    s, prompt, answer, side = shape(tiny)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    report.add(device=torch.cuda.get_device_name() if device == "cuda" else "cpu")
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    report.add(product_flops_per_second=product_rate(lambda: torch.mm(square, square), sync, side))
    config = transformers.LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.mlp, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, tie_word_embeddings=True, rms_norm_eps=1e-5,
        max_position_embeddings=4096, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        policy = transformers.LlamaForCausalLM(config)
        if kind == "dpo":
            reference = transformers.LlamaForCausalLM(config)
            reference.load_state_dict(policy.state_dict())
        else:
            trunk, head = transformers.LlamaModel(config), torch.nn.Linear(s.width, 1, bias=False)
    torch.set_default_dtype(torch.float32)
    report.add(attention="sdpa")
    ids = torch.from_numpy(tokens(kind, s, prompt, answer)).to(device)
    adamw = {"lr": LEARNING_RATE, "weight_decay": 0.0, "betas": (0.9, 0.95), "fused": True}

    def logps(model):
        """[B, T]; the logits are of the answers only."""
        logits = model(input_ids=ids, logits_to_keep=answer + 1).logits[:, :-1]
        flat = logits.float().reshape(-1, s.vocab)
        return -cross_entropy(flat, ids[:, prompt:].reshape(-1), reduction="none").view(len(ids), answer)

    def update(loss, parameters, optimizer):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    weights = list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, **adamw)
    if kind == "dpo":

        def step():
            with torch.no_grad():
                known = logps(reference).sum(1)
            margins = logps(policy).sum(1) - known
            chosen, rejected = margins.chunk(2)
            loss = -logsigmoid(BETA * (chosen - rejected)).mean()
            update(loss, weights, optimizer)
            return loss.detach()
    else:
        others = [*trunk.parameters(), *head.parameters()]
        second = torch.optim.AdamW(others, **adamw)
        old_values, advantages, returns = (torch.from_numpy(x).to(device) for x in numbers(len(ids), answer))
        with torch.no_grad():
            old = logps(policy)

        def step():
            ratio = torch.exp(logps(policy) - old)
            loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
            update(loss, weights, optimizer)
            hidden = trunk(input_ids=ids).last_hidden_state[:, prompt - 1 : -1]
            values = head(hidden).squeeze(-1).float()
            near = old_values + (values - old_values).clamp(-CLIP, CLIP)
            value_loss = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()
            update(value_loss, others, second)
            return loss.detach()

    models = [policy] if kind == "dpo" else [policy, trunk]
    for name in ("lean", "fast"):
        for model in models:
            model.train()
            if name == "lean":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            took = measure(step, count, sync)
        except Exception as error:
            report.add(**{name: {"error": last_line(error)}})
            break
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else host_peak()
        report.add(**{name: took | {"peak_bytes": peak}})


# ---- the run ---------------------------------------------------------------------------------------------------------


def last_line(error) -> str:
    text = str(error).strip() if not isinstance(error, BaseException) else f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0 if isinstance(error, BaseException) else -1][:300] if text else "no message"


def ask(name: str, args) -> dict:
    """What the process of one implementation found; with `error` where it did not end well."""
    command = [sys.executable, "-m", "benchmarks.gpu_steps", "--serve", name, "--steps", str(args.steps)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    started = time.monotonic()
    process = subprocess.Popen(
        command + ["--tiny"] * args.tiny, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, errors = process.communicate(timeout=LIMIT)
        error = last_line(errors) if process.returncode else None
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        error = f"took more than {LIMIT} s"
    found = json.loads(out.strip().splitlines()[-1]) if out.strip() else {}
    found["process_seconds"] = round(time.monotonic() - started, 1)
    return found | ({"error": error} if error else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that any machine can run")
    parser.add_argument("--only", action="append", default=[], choices=NAMES, help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--out", default="", help="JSON file; default: benchmarks/results/steps-DEVICE.json")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        library, kind = args.serve.split()
        return {"ours": ours, "torch": plain}[library](kind, args.tiny, args.steps, Report())
    from rto_jax.metrics import git_commit

    size, prompt, answer, side = shape(args.tiny)
    flops = {kind: model_flops(kind, size, [(prompt, answer)] * rows) for kind, rows in ROWS.items()}
    out = Path(args.out)
    found = {
        "command": " ".join(["python -m benchmarks.gpu_steps", *sys.argv[1:]]),
        "git": git_commit(),
        "host": platform.platform(),
        "python": platform.python_version(),
        "model": size._asdict(),
        "tokens": {"prompt": prompt, "answer": answer, "pairs of dpo": ROWS["dpo"], "rows of ppo": ROWS["ppo"]},
        "model_flops": flops,
        "product": f"bfloat16, {side} cubed",
        "implementations": {},
    }
    for name in args.only or NAMES:
        one = found["implementations"][name] = ask(name, args)
        if "device" in one:
            found.setdefault("device", one["device"])
        if not args.out:
            device = found.get("device", "unknown").lower().replace(" ", "-")
            out = Path(f"benchmarks/results/steps-{'tiny-' if args.tiny else ''}{device}.json")
        rates = [x.get("product_flops_per_second", 0.0) for x in found["implementations"].values()]
        found["product_flops_per_second"] = max(rates)
        for other, each in found["implementations"].items():
            for way in ("lean", "fast"):
                if "median_seconds" in each.get(way, {}):
                    kind, seconds = other.split()[1], each[way]["median_seconds"]
                    rows = ROWS[kind] * (2 if kind == "dpo" else 1)
                    each[way]["tokens_per_second"] = rows * (prompt + answer) / seconds
                    each[way]["model_flops_per_second"] = flops[kind] / seconds
                    each[way]["share_of_product"] = flops[kind] / seconds / max(rates)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name} ({one['process_seconds']} s){': ' + one['error'] if 'error' in one else ''}")
        for way in ("lean", "fast"):
            if (got := one.get(way)) and "error" in got:
                print(f"  {way}: {got['error']}")
            elif got:
                print(
                    f"  {way}: step {got['median_seconds']:.4f} s, {got['tokens_per_second']:.0f} tokens/s, "
                    f"{100 * got['share_of_product']:.0f} % of a product's {max(rates) / 1e12:.0f} TFLOP/s, "
                    f"peak {got['peak_bytes'] / 2**30:.1f} GiB, loss {got['losses'][0]:.4f} to {got['losses'][1]:.4f}",
                    flush=True,
                )
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
