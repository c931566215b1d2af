"""rto_jax.plan and rto_jax.hlo: what a compiled program costs, whether a run fits, and what is said if the question is wrong."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import common, dpo, reward_model, rto, sft
from rto_jax import hlo, plan
from rto_jax.errors import UserError
from rto_jax.models import SIZES, LoraConfig, llama
from rto_jax.sharding import MeshConfig, make_mesh


def cost(function, *arguments) -> hlo.Cost:
    return hlo.program_cost(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_scan_counts_as_often_as_it_turns():
    x, kernels = jnp.ones((6, 10)), jnp.ones((7, 10, 10))

    def scanned(x, kernels):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    forward = 7 * 2 * 6 * 10 * 10
    assert cost(scanned, x, kernels).flops == forward
    # Backward there are two products more per layer, into x and into the kernel.
    gradient = jax.grad(lambda kernels, x: jnp.sum(scanned(x, kernels)))
    assert cost(gradient, kernels, x).flops == pytest.approx(3 * forward, rel=1 / 21)  # the first x needs none


def test_nested_loops_multiply_and_batched_products_count():
    a, b = jnp.ones((4, 6, 10)), jnp.ones((4, 10, 8))

    def outer(a, b):
        def turn(total, _):
            return jax.lax.fori_loop(0, 5, lambda i, t: t + jnp.einsum("bij,bjk->bik", a * t[0, 0, 0], b), total), None

        return jax.lax.scan(turn, jnp.zeros((4, 6, 8)), None, length=3)[0]

    assert cost(outer, a, b).flops == 3 * 5 * 2 * 4 * 6 * 8 * 10


def test_a_loop_that_may_end_early_is_counted_to_its_bound_and_named():
    w = jnp.ones((10, 10))

    def decode(w):
        first = w @ w
        go = lambda state: (state[0] < 9) & (state[1][0, 0] < 1e6)  # noqa: E731
        return jax.lax.while_loop(go, lambda state: (state[0] + 1, state[1] @ w), (jnp.int32(1), first))[1]

    found = cost(decode, w)
    assert found.flops == 9 * 2 * 10**3
    assert found.early.flops == 8 * 2 * 10**3
    assert cost(lambda w: w @ w, w).early is None


def test_a_loop_without_a_bound_is_said_to_be_one():
    found = cost(lambda w: jax.lax.while_loop(lambda x: x[0, 0] < 1e6, lambda x: x @ x, w), jnp.full((8, 8), 2.0))
    assert (found.unknown_loops, found.flops) == (1, 2 * 8**3)


@pytest.mark.parametrize(
    ("kind", "exchange", "wire"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "fsdp"), 2 * 7 / 8),
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[:48], 7.0),
        ("reduce-scatter", lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), (8, 1)), 7 / 8),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]), 1.0),
    ],
)
def test_bytes_on_the_wire(kind, exchange, wire):
    """On rings, of 48 x 5 float32 per device, and three times in a scan of three turns."""
    mesh = make_mesh(MeshConfig(fsdp=8))

    def local(x):
        return jax.lax.scan(lambda x, _: (exchange(x) + 1.0, None), x, None, length=3)[0]

    spec = P("fsdp")
    found = cost(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), jnp.ones((8 * 48, 5)))
    assert list(found.collectives) == [kind]
    assert found.collectives[kind].count == 3
    assert found.wire_bytes == pytest.approx(3 * wire * 48 * 5 * 4)


def test_collectives_of_part_of_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    summed = jax.shard_map(lambda x: jax.lax.psum(x, "fsdp"), mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P("data"))
    assert cost(summed, jnp.ones((16, 3))).wire_bytes == 2 * 3 / 4 * 2 * 3 * 4


# ------------------------------------------------------------------------------------------------ sums over TPUs


@pytest.mark.parametrize(("data", "steps"), [(1, (2, 4)), (2, (2, 2))])
@pytest.mark.parametrize(
    ("inputs", "first", "shape", "spec"),
    [(1, True, (16, 4, 6), P("fsdp")), (2, False, (4, 6, 16), P(None, None, "fsdp")), (1, False, (8, 16), P(None, "fsdp"))],
)  # fmt: skip
def test_a_product_whose_gradient_is_summed_in_steps_over_rings(data, steps, inputs, first, shape, spec):
    """What TPUs' meshes get: the plain product's gradients, and never a kernel's whole sum on one device."""
    mesh = make_mesh(MeshConfig(data=data, fsdp=8 // data))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    kernel = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (8, 3, *shape[:inputs]))
    weights = jax.random.normal(jax.random.key(2), (8, 3, *shape[inputs:]))

    def loss(x, kernel, product):
        return jnp.sum(weights * product(x, kernel))

    def plain(x, kernel):
        return jax.lax.dot_general(x, kernel, ((tuple(range(2, 2 + inputs)), tuple(range(inputs))), ((), ())))

    def stepped(x, kernel):
        return llama.product(x, kernel, inputs, first, mesh, steps)

    gradient = jax.jit(
        lambda x, kernel: jax.grad(lambda *both: loss(*both, stepped), (0, 1))(x, kernel),
        in_shardings=(rows, NamedSharding(mesh, spec)), out_shardings=(rows, NamedSharding(mesh, spec)),
    )  # fmt: skip
    want = jax.grad(lambda *both: loss(*both, plain), (0, 1))(x, kernel)
    chex.assert_trees_all_close(gradient(x, kernel), want, atol=1e-5, rtol=1e-5)
    program = gradient.lower(x, kernel).compile().as_text()
    assert program.count(" reduce-scatter(") == 2
    assert program.count(" all-reduce(") == (data > 1)  # of the parts, over `data`


@pytest.mark.parametrize(
    ("sizes", "every", "steps"),
    [((8, 8, 1), 1, (8, 8)), ((4, 4, 4), 1, (4, 4, 4)), ((16, 16, 1), 4, (16, 4)), ((2, 2, 2, 2), 1, (2, 2, 2, 2)), ((1,), 1, ())],
)  # fmt: skip
def test_the_lines_of_a_torus(sizes, every, steps):
    """Of chips in the order of their coordinates, or of every nth of them."""
    chips = list(itertools.product(*(range(n) for n in sizes)))[::every]
    assert llama.lines(chips) == steps
    assert llama.rings(make_mesh(MeshConfig(fsdp=8))) == llama.rings(None) == ()  # CPUs form none


def test_chips_in_no_order_form_no_lines():
    assert llama.lines([(0, 0), (1, 1), (0, 1), (1, 0)]) == ()


# ------------------------------------------------------------------------------------------------ the recipes


@pytest.mark.parametrize("name", plan.PRESETS)
def test_the_recipes_are_those_of_the_experiments(name):
    """Sizes, lengths, batches, dtypes and mesh: whatever decides a program."""
    recipe = plan.PRESETS[name]
    stages = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "rto": rto}
    for key, module in stages.items():
        run = module.PRESETS[name][1]
        assert getattr(recipe, key) == plan.Batch(run.batch_size, run.micro_batches), key
        assert (recipe.policy, recipe.reward) == (run.policy_size, run.reward_size)
        assert (recipe.prompt, recipe.response) == (run.lengths.prompt, run.lengths.response)
        assert (recipe.mesh, recipe.lora, recipe.layers) == (run.mesh, run.lora, 0)
        for field in ("dtype", "param_dtype", "frozen_dtype", "remat"):
            assert getattr(recipe, field) == getattr(run, field), (key, field)
        for optim in [run.policy_optim, run.critic_optim] if key == "rto" else [run.optim]:
            for field in ("moments", "gradients", "offload"):
                assert getattr(recipe, field) == getattr(optim, field), (key, field)
        same = [getattr(run, field, 0) for field in ("pack", "buckets")]
        assert same in ([0, 1], [0, 0])  # of which the plan knows nothing
    assert recipe.reward_head == reward_model.PRESETS[name][1].head
    run = rto.PRESETS[name][1]
    assert (recipe.minibatches, recipe.epochs) == (run.ppo.minibatches, run.ppo.epochs)


def test_model_flops_of_a_known_model():
    """6 N per trained token for the 8B model's blocks and unembedding, and attention on top."""
    config = SIZES["llama3-8b"]
    blocks, head = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336), 128256 * 4096
    attention = 32 * 4 * 4096 * 1024 * 1025 / 2
    assert plan.forward_flops(config, 3, 512, 512, 1, 1024) == 3 * (2 * 1024 * (blocks + head) + attention)
    # A shared prompt is counted once, and neither answer sees the other.
    both = 1536 * 2 * blocks + 1024 * 2 * head + 32 * 4 * 4096 * (512 * 513 / 2 + 2 * (512 * 512 + 512 * 513 / 2))
    assert plan.forward_flops(config, 1, 512, 512, 2, 1024) == both


def test_bytes_of_what_is_passed_and_held():
    """Of the paper's recipe on 64 devices: float32 weights and moments, split 64 ways."""
    target = plan.Target("gpu:64", 64, None, None)  # no compiler: sizes only
    mesh = target.mesh(MeshConfig(fsdp=64))
    found = {p.name: plan.measure(p, target) for p in plan.phases(plan.PRESETS["paper"], mesh)}
    policy, critic = 8_030_261_248, 1_235_814_400 + 2048 + 1
    assert found["sft"].arguments_gib == pytest.approx(12 * policy / 64 / 2**30, rel=5e-3)
    assert found["dpo"].held_gib == pytest.approx(4 * policy / 64 / 2**30, rel=5e-3)
    state = 12 * (policy + critic) / 64 / 2**30
    assert found["update"].arguments_gib == pytest.approx(state, rel=1e-2)
    assert found["update"].held_gib == pytest.approx(4 * (2 * policy + critic) / 64 / 2**30, rel=1e-2)
    rollout = found["rollout"]  # in both halves of an iteration the same lies on the devices
    whole = 4 * (5 * policy + 4 * critic) / 64 / 2**30
    assert rollout.arguments_gib + rollout.held_gib == pytest.approx(whole, rel=1e-2)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_on_cpus(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["--preset", "gold", "--topology", "cpu:8", "--layers", "1", "--stages", "dpo"]
    assert plan.run([*command, "--out", str(out), "--memory", "1"]) == 0
    found = json.loads(out.read_text())
    rows = {row["phase"]: row for row in found["phases"]}
    assert list(rows) == ["dpo reference", "dpo"]
    for row in rows.values():
        assert row["flops"] > 0 and row["peak_gib"] > 0 and row["compile_seconds"] > 0
        assert row["cycles"] is None and row["kernels"] == 0
    # Without remat the products are the model's, but for whole squares of attention and a head of few rows: a little more.
    assert 1 <= rows["dpo"]["flops"] / rows["dpo"]["model_flops"] < 1.6
    assert rows["dpo"]["collectives"]["all-reduce"]["gib"] > 0
    assert "Fits 1 GiB per device." in capsys.readouterr().out
    assert found["flags"]["dpo"] == "--mesh.fsdp 1 --mesh.tensor 1 --batch-size 64 --micro-batches 1 --remat none"

    assert plan.run([*command[:-1], "sft", "--memory", "0.0001"]) == 1
    assert "Does not fit: short by" in capsys.readouterr().out


def test_what_the_tpus_compiler_refuses_is_a_plan_that_does_not_fit():
    """Its own words, when asked for a product of three matrices of 50,000 x 50,000 float32 on a v5e."""
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (23.30G) "
    said += "exceeds available HBM (15.75G)."

    class Program:
        def lower(self, *arguments):
            return self

        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(said)

    target = dataclasses.replace(plan.open_target("cpu:8"), device=plan.DEVICES["v5e"])
    row = plan.measure(plan.Phase("big", "sft", Program(), (), None, 0.0), target)
    assert (row.peak_gib, row.over_gib) == (23.30, pytest.approx(7.55))
    assert plan.verdict([row], target) == "Does not fit: short by 7.6 GiB in sft: big."
    said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan.measure(plan.Phase("big", "sft", Program(), (), None, 0.0), target)


@pytest.mark.slow
def test_rollouts_and_updates(capsys, tmp_path):
    out = tmp_path / "plan.json"
    command = ["--preset", "gold", "--topology", "cpu:8", "--layers", "1", "--stages", "rto", "--out", str(out)]
    assert plan.run([*command, "--memory", "1"]) == 0
    assert "of which decoding" in capsys.readouterr().out
    rows = {row["phase"]: row for row in json.loads(out.read_text())["phases"]}
    assert [name for name, row in rows.items() if not row["part"]] == ["rollout", "update"]
    assert 0 < rows["sampling"]["loop"]["flops"] < rows["sampling"]["flops"] < rows["rollout"]["flops"]
    assert rows["rollout"]["loop"]["flops"] == rows["sampling"]["loop"]["flops"]
    parts = 4 * (rows["policy update"]["flops"] + rows["critic update"]["flops"])
    assert rows["update"]["flops"] == pytest.approx(parts, rel=0.01)


def test_search_takes_the_fastest_that_fits(monkeypatch):
    """On made-up costs: less remat is faster and larger, every micro-batch halves what is kept and costs a little."""
    asked = []

    def measure(phase, target):
        recipe = phase.held
        remat = {"full": (1, 4.0), "attention": (3, 3.5), "dots": (9, 3.2), "none": (30, 3.0)}[recipe.remat]
        micro = recipe.dpo.micro
        gib, asked_before = 5 + remat[0] / micro, len(asked)
        asked.append((recipe.mesh.tensor, recipe.mesh.fsdp, recipe.remat, micro))
        row = plan.Row("dpo", "dpo", False, 1, 1.0, 0.0, 1.0, peak_gib=gib, over_gib=max(0.0, gib - 16))
        row.seconds = remat[1] + 0.15 * micro + recipe.mesh.tensor + 8 / recipe.mesh.fsdp
        assert asked_before < 60
        return row

    made_up = lambda recipe, mesh, stages, parts: [plan.Phase("dpo", "dpo", measure, (), recipe, 0.0)]  # noqa: E731
    monkeypatch.setattr(plan, "phases", made_up)
    monkeypatch.setattr(plan, "measure", measure)
    target, recipe = plan.open_target("cpu:8", memory=16), plan.PRESETS["gold"]
    best, rows = plan.search(recipe, target, "dpo", lambda text: None)
    assert (best.remat, best.dpo.micro, best.mesh) == ("dots", 1, MeshConfig(fsdp=8))
    assert rows[0].peak_gib == 14
    assert (1, 8, "none", 4) in asked and (1, 8, "none", 8) not in asked  # the fewest that fit
    assert {mesh[:2] for mesh in asked} == {(1, 8), (1, 4), (2, 4), (2, 2)}


@pytest.mark.parametrize(("stage", "module"), [("sft", sft), ("dpo", dpo), ("rto", rto)])
def test_a_plan_is_flags_that_the_stage_takes(stage, module, monkeypatch):
    """The same recipe comes back from the command line of the stage."""
    recipe = dataclasses.replace(
        plan.PRESETS["gold"], remat="dots", mesh=MeshConfig(data=2, fsdp=2, tensor=2), param_dtype="bfloat16",
        moments="bfloat16", gradients="bfloat16", offload=True, frozen_dtype="int8", lora=LoraConfig(rank=4),
    ).with_stage(stage, size=32, micro=2)  # fmt: skip
    seen = []
    monkeypatch.setattr(common, "set_up", lambda: None)
    common.main(module.PRESETS, seen.append, "", ["--preset", "gold", *plan.flags(recipe, stage).split()])
    (run,) = seen
    assert plan.Batch(run.batch_size, run.micro_batches) == getattr(recipe, stage)
    for field in ("remat", "mesh", "param_dtype", "frozen_dtype", "lora"):
        assert getattr(run, field) == getattr(recipe, field), field
    for optim in [run.policy_optim, run.critic_optim] if stage == "rto" else [run.optim]:
        assert (optim.moments, optim.gradients, optim.offload) == ("bfloat16", "bfloat16", True)


@pytest.mark.slow
def test_search_compiles(capsys):
    command = ["--preset", "gold", "--topology", "cpu:2", "--layers", "1", "--stages", "sft", "--search"]
    assert plan.run([*command, "--memory", "1"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("the fastest that fits: "))
    assert line.startswith("the fastest that fits: python -m experiments.sft --preset gold --mesh.fsdp")
    assert plan.run([*command, "--memory", "0.00001"]) == 1
    assert "Does not fit: no plan for sft fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--topology", "v5e"], "--topology must be one of"),
        (["--topology", "v9:2x2"], "--topology must be one of"),
        (["--topology", "cpu:0"], "no device"),
        (["--topology", "cpu:4096"], "this process has"),
        (["--topology", "cpu:8", "--slices", "2"], "only TPUs come in slices"),
        (["--topology", "cpu:8", "--mesh.fsdp", "3"], "must multiply to 8"),
        (["--topology", "cpu:8", "--batch-size", "12"], "sft: --batch-size 12 is not divisible"),
        (["--topology", "cpu:8", "--layers", "3"], "gold has 2"),
        (["--topology", "cpu:8", "--layers", "0"], "--layers must be at least 1"),
        (["--topology", "cpu:8", "--memory", "-1"], "--memory must be positive"),
        (["--topology", "cpu:8", "--preset", "huge"], "invalid choice: 'huge'"),
        (["--topology", "cpu:8", "--xla", "fast"], "--xla takes NAME=VALUE"),
        ([], "--topology"),
    ],
)
def test_bad_questions(words, complaint):
    with pytest.raises(UserError) as error:
        plan.run(words)
    assert complaint in str(error.value)


def test_a_bad_question_is_one_line_and_status_2():
    ran = subprocess.run([sys.executable, "-m", "rto_jax.plan", "--topology", "v9:2x2"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: --topology must be one of") and ran.stderr.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_tpus_compiler_it_says_what_to_install():
    with pytest.raises(UserError, match=r"needs the TPU's compiler: pip install --no-deps 'libtpu"):
        plan.run(["--topology", "v5e:2x2"])


def test_without_a_gpu_there_are_sizes_only(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert plan.run(["--topology", "gpu:8", "--stages", "sft", "--memory", "80"]) == 0
    assert "There is no GPU here" in capsys.readouterr().out
    with pytest.raises(UserError, match="--search needs a compiler"):
        plan.run(["--topology", "gpu:8", "--search"])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler")
def test_two_layers_compiled_for_a_tpu(tmp_path):
    """DPO at 2 layers for 4 chips: XLA's cycles, kernels, and gradients that are summed in parts, not as a whole."""
    out = tmp_path / "plan.json"
    command = ["--preset", "smollm2", "--layers", "2", "--topology", "v5p:2x2x1", "--mesh.fsdp", "4"]
    command += ["--dtype", "bfloat16", "--stages", "dpo", "--prompt", "128", "--micro-batches", "1", "--out", str(out)]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    ran = subprocess.run([sys.executable, "-m", "rto_jax.plan", *command], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = {row["phase"]: row for row in json.loads(out.read_text())["phases"]}
    for row in rows.values():
        assert row["cycles"] > 1e4 and row["kernels"] > 0 and 0 < row["peak_gib"] < 90
    assert rows["dpo"]["flops"] > 2 * rows["dpo reference"]["flops"]
    kernels = 2 * (2 * 576 * (576 + 192) + 3 * 576 * 1536) * 2 / 2**30  # GiB of both layers' in bfloat16
    # Of attention's, of 9 and 3 heads, the compiler still sums the whole; the MLP's are three quarters.
    assert 0.74 < rows["dpo"]["collectives"]["reduce-scatter"]["gib"] / (kernels * 3 / 4) < 1.01


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[32,8]<=[16,16]T(1,0)", 8),
        ("replica_groups=mesh['axis_0'=64,'axis_1'=1,'axis_2'=4], device_ids=([4,64]T(1,0)) {'axis_0'}", 64),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=64] {'axis_0','axis_1'}", 256),
        ("replica_groups=mesh['axis_0'=64] {'axis_0':(8)4}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_devices_of_a_group(written, devices):
    """In each form that XLA writes them in; another form is an error, not a group of one that sends nothing."""
    line = f"%x = f32[8] all-gather(%y), channel_id=1, {written}, dimensions={{0}}"
    assert hlo._group(SimpleNamespace(text=line)) == devices
    with pytest.raises(ValueError, match="unknown replica groups"):
        hlo._group(SimpleNamespace(text="all-gather(%y), replica_groups=<8>, dimensions={0}"))
