"""rto_jax.checkpoint: exact round trips, torn and foreign checkpoints, donation, and a run that is stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rto_jax import loops, programs
from rto_jax.checkpoint import Checkpointer, restore_params
from rto_jax.errors import UserError
from rto_jax.models import SIZES
from rto_jax.optim import OptimConfig
from rto_jax.sharding import MeshConfig, make_mesh
from rto_jax.steps import ActorCritic


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def params(fill=1.0):
    return {
        "embed": {"embedding": jnp.full((32, 16), fill, jnp.float32)},
        "head": {"bias": jnp.full((3,), fill, jnp.bfloat16)},
    }


def train(step=0):
    return {"opt": optax.adamw(1e-3).init(params()), "step": jnp.int32(step), "nothing": None}


def save_steps(directory, steps, keep=5):
    with Checkpointer(directory, keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, {"params": params(step)}, train(step), {"position": step})


def as_bytes(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def awkward():
    """Every dtype that we keep, and the bit patterns that a detour through float32 or text would lose."""
    halves = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16).reshape(256, 256)  # every bfloat16, NaNs included
    return {
        "halves": jnp.asarray(halves),
        "floats": jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32).view(np.float32)),
        "tiny": jnp.asarray([-0.0, 1e-45, np.inf, np.nan], jnp.float32),
        "words": jnp.asarray([0, 2**32 - 1], jnp.uint32),
        "truth": jnp.asarray([True, False]),
        "count": jnp.int32(7),
        "layers": (jnp.zeros((2, 1, 3)), [jnp.float16(1.5)]),
    }


def test_every_byte_comes_back(tmp_path):
    tree, state = awkward(), (optax.adamw(1e-3).init(awkward()["floats"]), None, {})
    extra = {"grain": {"last": [1, 2], "text": "é"}, "tokens": 2**40, "share": 0.1, "none": None}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"params": tree, "critic": tree["layers"]}, state, extra)
        restored = checkpointer.restore(None, {"params": tree, "critic": tree["layers"]}, state)
    assert restored.step == 3 and restored.extra == extra
    assert as_bytes(restored.params_by_name) == as_bytes({"critic": tree["layers"], "params": tree})
    assert as_bytes(restored.train) == as_bytes(state)
    chex.assert_trees_all_equal_structs(restored.train, state)  # the optimiser's own NamedTuples, not dicts


def test_restores_onto_the_shardings_asked_for(tmp_path):
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    rows = NamedSharding(mesh(8), P("data"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"w": jax.device_put(values, rows)}}, {}, {})
    for sharding in (
        rows,
        NamedSharding(mesh(2, 2, 2), P(("data", "fsdp"), "tensor")),
        NamedSharding(mesh(2, 2, 2), P()),
        jax.sharding.SingleDeviceSharding(jax.devices()[5]),
    ):
        abstract = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)}
        restored = restore_params(tmp_path, abstract)["w"]
        assert restored.sharding == sharding
        np.testing.assert_array_equal(restored, values)
    plain = restore_params(tmp_path, {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32)})["w"]
    assert not plain.committed
    np.testing.assert_array_equal(plain, values)


def test_a_runs_state_of_8_by_1_restores_on_2_by_2_by_2_and_on_one_device(tmp_path):
    """Policy, critic and both Adams, onto the shardings that a run on the other mesh has, byte for byte."""
    size, optim = SIZES["gold"], OptimConfig()

    def abstract(mesh):
        return ActorCritic(*(programs.abstract_state(size, head, optim, 4, mesh) for head in ("lm", "last")))

    def noise(like):
        values = np.random.default_rng(like.size).integers(0, 100, like.shape).astype(like.dtype)
        return jax.device_put(values, like.sharding)

    state = jax.tree.map(noise, abstract(make_mesh(MeshConfig(fsdp=8))))
    assert any(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in jax.tree.leaves(state))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, *loops.cut(state), {"batches": {"next": 4}})
    for mesh in (make_mesh(MeshConfig(2, 2, 2)), make_mesh(MeshConfig(), jax.devices()[:1])):
        with Checkpointer(tmp_path) as checkpointer:
            step, restored, extra = loops.restore(checkpointer, abstract(mesh))
        assert (step, extra) == (4, {"batches": {"next": 4}})
        assert as_bytes(restored) == as_bytes(state)
        for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract(mesh)), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, like.ndim)


def test_parameters_are_read_without_the_rest(tmp_path):
    save_steps(tmp_path, [1])
    shutil.rmtree(tmp_path / "1" / "train")
    chex.assert_trees_all_equal(restore_params(tmp_path, params()), params(1))
    half = restore_params(tmp_path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params()))
    chex.assert_trees_all_equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(1)))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match=r"1 is damaged: train/.* is missing"):
        checkpointer.restore(None, {"params": params()}, train())


@pytest.mark.parametrize("sharding", ["one device", "rows", "copies"])
def test_donating_right_after_save_is_safe(tmp_path, sharding):
    """The CPU's host copy may share the device's memory, which a donating step then writes to."""
    where = {
        "one device": jax.devices()[0],
        "rows": NamedSharding(mesh(8), P("data")),
        "copies": NamedSharding(mesh(8), P()),
    }[sharding]
    values = {str(i): np.random.default_rng(i).normal(size=(1024, 512)).astype(np.float32) for i in range(4)}
    state = jax.device_put(jax.tree.map(np.copy, values), where)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.5 - 1, tree), donate_argnums=0)
    jax.block_until_ready(step(jax.tree.map(jnp.copy, state)))  # compiled: the step below runs at once
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": state}, {}, {})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
    chex.assert_trees_all_equal(restore_params(tmp_path, values), values)


class Held(Checkpointer):
    """Ends no save before `gate` is set."""

    def __init__(self, directory):
        self.gate = threading.Event()
        super().__init__(directory)

    def _list_files(self):
        assert self.gate.wait(30)
        time.sleep(0.1)  # so that the caller is in `wait` by now
        super()._list_files()


def test_saves_in_the_background(tmp_path):
    extra, weights = {"position": [1]}, {"w": np.ones(3, np.float32)}
    checkpointer = Held(tmp_path)
    checkpointer.save(1, {"params": weights}, {}, extra)
    (tmp_path / "0.orbax-checkpoint-tmp").mkdir()  # of nobody's save
    assert checkpointer.steps() == [] and checkpointer.latest_path() is None  # returned, and not yet on disk
    extra["position"].append(2)
    weights["w"][:] = 2
    checkpointer.gate.set()
    checkpointer.wait()
    assert checkpointer.steps() == [1] and checkpointer.latest_path() == tmp_path / "1"
    restored = checkpointer.restore(1, {"params": weights}, {})
    checkpointer.close()
    assert restored.extra == {"position": [1]}
    np.testing.assert_array_equal(restored.params_by_name["params"]["w"], np.ones(3))


@pytest.mark.parametrize(("keep", "left"), [(1, [10]), (2, [8, 10]), (9, [2, 4, 6, 8, 10])])
def test_keeps_the_last(tmp_path, keep, left):
    with Checkpointer(tmp_path / "new" / "folder", keep) as checkpointer:
        for step in (2, 4, 6, 8, 10):
            checkpointer.save(step, {"params": params(step)}, train(step), {})
            assert len(checkpointer.steps()) <= keep + 1
        checkpointer.wait()
        assert checkpointer.steps() == left and checkpointer.latest() == 10
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(map(str, left))
    with pytest.raises(UserError, match="keep must be at least 1"):
        Checkpointer(tmp_path, 0)


def test_a_killed_save_is_ignored_and_said(tmp_path, capsys):
    save_steps(tmp_path, [1])
    child = f"""
import time, jax.numpy as jnp
from rto_jax.checkpoint import Checkpointer
class Slow(Checkpointer):
    def _list_files(self):
        print("saving", flush=True)
        time.sleep(60)
checkpointer = Slow({str(tmp_path)!r})
checkpointer.save(2, {{"params": {{"w": jnp.ones(3)}}}}, {{}}, {{}})
checkpointer.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert process.stdout.readline() == b"saving\n"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
    with Checkpointer(tmp_path) as checkpointer:
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "ignoring" in lines[0] and f"{tmp_path}/2.orbax-checkpoint-tmp" in lines[0]
        restored = checkpointer.restore(None, {"params": params()}, train())
        assert restored.step == 1
        checkpointer.save(2, {"params": params(2)}, train(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    chex.assert_trees_all_equal(restore_params(tmp_path, params()), params(2))


def test_a_file_missing_or_cut_falls_back_to_the_last_good_step(tmp_path, capsys):
    save_steps(tmp_path / "whole", [8, 10])
    files = json.loads((tmp_path / "whole" / "10" / "files.json").read_text())["files"]
    assert {Path(name).parts[0] for name in files} == {"params", "train", "extra"}
    for number, name in enumerate(["files.json", *sorted(files), "files.json"]):
        shutil.rmtree(tmp_path / "torn", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "torn")
        file = tmp_path / "torn" / "10" / name
        file.unlink() if number % 2 else os.truncate(file, file.stat().st_size // 2)
        with Checkpointer(tmp_path / "torn") as checkpointer:
            restored = checkpointer.restore(None, {"params": params()}, train())
            with pytest.raises(UserError, match=f"{tmp_path}/torn/10 is damaged: {name}"):
                checkpointer.restore(10, {"params": params()}, train())
        assert restored.step == 8 and restored.extra == {"position": 8}
        chex.assert_trees_all_equal(restored.params_by_name["params"], params(8))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and name in lines[0] and lines[0].endswith("going back to step 8")


def test_a_flipped_bit_falls_back_to_the_last_good_step(tmp_path, capsys):
    """One bit at random in every file of the newest step: said, and never read. What Orbax alone makes of it is below."""
    save_steps(tmp_path, [8, 10])
    rng = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "10").rglob("*") if path.is_file() and path.stat().st_size)
    assert {"params/manifest.ocdbt", "train/_METADATA", "extra/metadata"} <= {str(f)[len(f"{tmp_path}/10/") :] for f in files}
    for file in files:
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        with Checkpointer(tmp_path) as checkpointer:
            restored = checkpointer.restore(None, {"params": params()}, train())
        lines = capsys.readouterr().err.splitlines()
        if file.parent == tmp_path / "10" and file.name != "files.json":
            assert restored.step == 10 and lines == []  # Orbax's note of the whole step, which nothing reads
        else:
            assert restored.step == 8 and restored.extra == {"position": 8}
            assert len(lines) == 1 and file.name in lines[0] and lines[0].endswith("going back to step 8"), lines
        chex.assert_trees_all_equal(restored.params_by_name["params"], params(restored.step))
        file.write_bytes(data)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(None, {"params": params()}, train()).step == 10  # nothing was deleted


def test_a_file_that_the_list_no_longer_names_is_not_left_unchecked(tmp_path):
    """One bit turns params/ into qarams/ in files.json, so that no file of the item would be looked at."""
    save_steps(tmp_path, [1])
    path = tmp_path / "1" / "files.json"
    path.write_text(path.read_text().replace("params/", "qarams/"))
    with pytest.raises(UserError, match="1 is damaged: files.json is missing, cut short or changed"):
        restore_params(tmp_path, params())


def test_arrays_lie_on_disk_as_they_are(tmp_path):
    """Uncompressed: what compresses well takes its whole size, which the full disks below rely on too."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"w": jnp.ones(1 << 16)}, "critic": {"w": jnp.ones(1 << 16)}}, {}, {})
    for name in ("params", "critic"):
        sizes = [path.stat().st_size for path in (tmp_path / "1" / name).rglob("*") if path.is_file()]
        assert 1 << 18 <= sum(sizes) < 1.1 * (1 << 18), sizes


def test_orbax_alone_restores_a_flipped_bit(tmp_path):
    """Why there are checksums. If this fails, Orbax has its own by now, and ours may go."""
    import orbax.checkpoint as ocp

    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"w": values}}, {}, {})
    file = max((tmp_path / "1" / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with ocp.StandardCheckpointer() as reader:
        read = np.asarray(reader.restore(tmp_path / "1" / "params", {"w": values})["w"])
    assert (read != values).sum() == 1
    with pytest.raises(UserError, match="1 is damaged: params/.* has changed since it was written"):
        restore_params(tmp_path, {"w": values})


def test_the_last_step_damaged_is_an_error_and_nothing_goes(tmp_path):
    save_steps(tmp_path, [8, 10])
    for step in (8, 10):
        os.truncate(tmp_path / str(step) / "extra" / "metadata", 0)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UserError, match=r"checkpoint .*/8 is damaged: extra/metadata has 0 bytes, not \d+"):
            checkpointer.restore(None, {"params": params()}, train())
        with pytest.raises(UserError, match="already holds step 10"):
            checkpointer.save(10, {"params": params(1)}, train(), {})
        assert checkpointer.steps() == [8, 10]


def test_an_address_is_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("gs://bucket/run", Path("gs://bucket/run")):
        with pytest.raises(UserError, match=r"gs:/+bucket/run is an address"):
            Checkpointer(path)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_a_user_error_and_no_reason_to_go_back(tmp_path, capsys):
    save_steps(tmp_path, [8, 10])
    wide = {**params(), "embed": {"embedding": jnp.ones((64, 16))}}
    more = {**params(), "lm_head": {"kernel": jnp.ones((16, 32))}}
    less = {"head": params()["head"]}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    for other, message in [
        (wide, "params holds embed/embedding [32, 16], the model wants [64, 16]"),
        (more, "params lacks lm_head/kernel [16, 32]"),
        (less, "params holds embed/embedding, which the model has not"),
        (half, "params holds embed/embedding in float32, the model wants bfloat16"),
        ({"a": jnp.ones(1), "b": jnp.ones(1)}, "params lacks a [1] (3 more differ)"),
    ]:
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError) as caught:
            checkpointer.restore(None, {"params": other}, train())
        assert str(caught.value) == f"the checkpoint {tmp_path}/10/{message}"
    with pytest.raises(UserError, match=r"\[32, 16\], the model wants \[64, 16\]"):
        restore_params(tmp_path, wide)
    with pytest.raises(UserError, match=f"{tmp_path}/10 holds no 'critic', only extra, params, train"):
        restore_params(tmp_path, params(), name="critic")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError, match=r"10/train holds step \[\], the run wants \[2\]"),
    ):
        checkpointer.restore(None, {"params": params()}, {**train(), "step": jnp.zeros(2, jnp.int32)})
    assert capsys.readouterr().err == ""


def test_steps_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=f"there is no checkpoint in {tmp_path}/nowhere"):
        restore_params(tmp_path / "nowhere", params())
    save_steps(tmp_path, [8, 10])
    with pytest.raises(UserError, match="holds no step 9, only 8, 10"):
        restore_params(tmp_path, params(), step=9)
    chex.assert_trees_all_equal(restore_params(tmp_path, params(), step=8), params(8))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot make the checkpoint directory {tmp_path}/file"):
        Checkpointer(tmp_path / "file")


def test_a_new_branch_replaces_the_old_one(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        with pytest.raises(UserError, match="already holds step 2"):
            checkpointer.save(2, {"params": params(20)}, train(), {})
        checkpointer.restore(1, {"params": params()}, train())
        assert checkpointer.steps() == [1, 2, 3]  # reading deletes nothing
        checkpointer.save(2, {"params": params(20)}, train(2), {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
    chex.assert_trees_all_equal(restore_params(tmp_path, params()), params(20))


FULL = """
import sys
import jax.numpy as jnp
from rto_jax.checkpoint import Checkpointer
from rto_jax.errors import UserError
directory, limit = sys.argv[1:]
state = {"w": jnp.ones(1 << 20)}
with Checkpointer(directory, keep=1) as checkpointer:
    checkpointer.save(1, {"params": state}, {}, {})
    checkpointer.wait()
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        checkpointer.save(2, {"params": state}, {}, {})
        checkpointer.wait()
    except UserError as error:
        print(error)
    print(checkpointer.steps())
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpointer.save(2, {"params": state}, {}, {})
        checkpointer.wait()
        print(checkpointer.steps())
"""


def test_a_write_that_fails_is_said_and_leaves_the_steps_before(tmp_path):
    """4 MiB where the system allows files of 1 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), "limit"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    said = f"step 2 could not be saved in {tmp_path}: file too large"
    assert done.stdout.splitlines() == [said, "[1]", "[2]"] and not done.stderr, (done.stdout, done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_full_disk_is_said_and_leaves_the_steps_before(tmp_path):
    """The second 4 MiB on a disk of 7 MiB, where a user may mount one."""
    command = f"mount -t tmpfs -o size=7m tmpfs {tmp_path} && exec {sys.executable} -c '{FULL}' {tmp_path} ''"
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("no mounting here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    said = f"step 2 could not be saved in {tmp_path}: no space left on device"
    assert done.stdout.splitlines() == [said, "[1]"] and not done.stderr, (done.stdout, done.stderr)


def test_a_run_that_stops_ends_with_the_same_bytes(tmp_path):
    """Adam on noise drawn by step: 4 steps, a stop and 4 more, against 8 without a stop."""
    optimiser = optax.adamw(1e-2)
    sharding = NamedSharding(mesh(2, 2, 2), P("fsdp", "tensor"))

    @jax.jit
    def step(weights, state):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state["step"]), weights["w"].shape)
        gradient = jax.grad(lambda w: jnp.mean((w["w"] - noise) ** 2))(weights)
        updates, opt = optimiser.update(gradient, state["opt"], weights)
        return optax.apply_updates(weights, updates), {"opt": opt, "step": state["step"] + 1}

    start = {"w": jax.device_put(jnp.ones((8, 8)), sharding)}
    beginning = (start, {"opt": jax.jit(optimiser.init)(start), "step": jnp.int32(0)})
    straight = beginning
    for _ in range(8):
        straight = step(*straight)
    stopped = beginning
    for _ in range(4):
        stopped = step(*stopped)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, {"params": stopped[0]}, stopped[1], {})
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(None, {"params": beginning[0]}, beginning[1])
    resumed = (restored.params_by_name["params"], restored.train)
    for _ in range(4):
        resumed = step(*resumed)
    assert as_bytes(resumed) == as_bytes(straight)


def test_says_nothing_when_all_is_well(tmp_path, capfd):
    save_steps(tmp_path, [1, 2, 3], keep=1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(None, {"params": params()}, train())
    assert capfd.readouterr() == ("", "")


def test_importing_does_not_load_orbax():
    code = "import sys, rto_jax.checkpoint; assert not [m for m in sys.modules if m.startswith('orbax')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.slow
def test_two_processes_save_one_checkpoint(tmp_path):
    port = 20000 + os.getpid() % 20000
    child = f"""
import sys, jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rto_jax.checkpoint import Checkpointer
host = np.arange(64, dtype=np.float32).reshape(8, 8)
rows = NamedSharding(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
make = lambda k: {{"w": jax.make_array_from_callback((8, 8), rows, lambda index: host[index] + k)}}
with Checkpointer({str(tmp_path)!r}, keep=2) as checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(step, {{"params": make(step)}}, make(0), {{"step": step}})
    checkpointer.restore(2, {{"params": make(0)}}, make(0))
    checkpointer.save(3, {{"params": make(30)}}, make(0), {{"step": 30}})
    restored = checkpointer.restore(None, {{"params": make(0)}}, make(0))
    assert restored.step == 3 and restored.extra == {{"step": 30}}
    for shard in restored.params_by_name["params"]["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, host[shard.index] + 30)
"""
    root = Path(__file__).parents[1]
    processes = [subprocess.Popen([sys.executable, "-c", child, str(i)], cwd=root) for i in range(2)]
    deadline = time.monotonic() + 120
    assert [process.wait(deadline - time.monotonic()) for process in processes] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    whole = restore_params(tmp_path, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)})["w"]  # on one process now
    np.testing.assert_array_equal(whole, np.arange(64, dtype=np.float32).reshape(8, 8) + 30)
