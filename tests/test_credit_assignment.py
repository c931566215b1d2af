"""experiments.credit_assignment: token scores against slow ways to get them, and the page of a pair, whatever is in it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import credit_assignment as C
from experiments.common import Model
from rto_jax import gold, programs
from rto_jax.data import Lengths, load_tokenizer
from rto_jax.errors import UserError
from rto_jax.losses import implicit_token_rewards
from rto_jax.models import SIZES
from rto_jax.sharding import MeshConfig, make_mesh, put_whole
from rto_jax.types import Sequences
from tests.test_report import Page
from tests.test_text import write_model

NASTY = "Yes <script>alert(1)</script> 😀 שלום\u202e é\x1b[31m"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1), jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def one_device(mesh):
    """Less to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "make_mesh", lambda _: mesh)
        yield


@pytest.fixture(scope="module")
def rows() -> Sequences:
    world, rng = gold.World(), np.random.default_rng(0)
    prompts = world.prompts(rng, 3)
    tokens, mask = world.sample_pi0(prompts, rng)
    valid = np.concatenate([np.ones(prompts.shape, bool), mask], 1)
    return Sequences(np.concatenate([prompts, tokens], 1).astype(np.int32), valid, mask)


@pytest.mark.parametrize("head", ["last", "token"])
def test_prefix_differences_are_those_of_prefixes(head, mesh, rows):
    """Prefixes scored as answers of their own, in rows with room for more and without; padding changes nothing."""
    config = SIZES["gold"]
    params = jax.jit(programs.init_fn(config, head))(jax.random.key(1))
    model = Model("", config, head, None, lambda mesh: params)
    found = C.prefix_differences(model, params, rows, mesh)
    score = programs.scores(config, head, mesh)
    slots = np.arange(28)

    def of_prefix(count: int, length: int) -> np.ndarray:
        """Scores of the first `count` tokens, in rows with room for `length`."""
        kept = slots < 4 + count
        cut = Sequences(rows.tokens[:, : 4 + length], (rows.valid & kept)[:, : 4 + length], (rows.mask & kept[4:])[:, :length])
        return np.asarray(score(params, put_whole(cut, mesh)))

    nothing, length = of_prefix(0, 24), int(rows.mask[0].sum())
    for t in (0, 5, length - 1):
        assert found[0, t] == pytest.approx((of_prefix(t + 1, 24) - of_prefix(t, 24))[0], abs=2e-5)
    np.testing.assert_allclose(found[:, :6].sum(1), of_prefix(6, 6) - nothing, atol=1e-4)
    np.testing.assert_allclose(found.sum(1), of_prefix(24, 24) - nothing, atol=1e-4)
    assert (found[~rows.mask] == 0).all() and found.std() > 0.01
    other = rows._replace(tokens=np.where(rows.valid, rows.tokens, 5))
    np.testing.assert_array_equal(C.prefix_differences(model, params, other, mesh), found)


def test_tokens_keep_their_spaces_and_their_bytes(tmp_path):
    tokenizer = load_tokenizer(write_model(tmp_path / "model"))
    task = C.TextTask.__new__(C.TextTask)
    task.tokenizer = tokenizer
    texts = C.token_texts(task, np.array([*tokenizer.encode("a é"), tokenizer.eos_id, 999]))
    assert texts == ["a", " ", "\udcc3", "\udca9", "<|end|>", ""]

    class Backend:  # a tokenizer with byte fallback, as SentencePiece has it
        def to_str(self):
            return json.dumps({"decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}})

        def id_to_token(self, i):
            return ["▁Hello", "<0xE2>", "s"][i]

    class Slow:
        backend_tokenizer, added_tokens_decoder = Backend(), {}

    task.tokenizer = dataclasses.replace(tokenizer, hf=Slow())
    assert C.token_texts(task, np.arange(3)) == [" Hello", "\udce2", "s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory) -> tuple[dict, C.CreditConfig]:
    """A pair in words under random models: no data, no run."""
    out = tmp_path_factory.mktemp("pair")
    other = write_model(out / "other")
    from safetensors.numpy import load_file, save_file

    weights = load_file(other / "model.safetensors")
    save_file({k: v if "norm" in k else v[::-1].copy() for k, v in weights.items()}, other / "model.safetensors")
    config = dataclasses.replace(
        C.PRESETS["smollm2"][1], out=str(out), sft=str(folder), dpo=str(other), other=str(folder), beta=0.5, lengths=Lengths(64, 64),
        prompt="Is it <b>so</b>?", chosen=NASTY, rejected=NASTY.replace("Yes", "No "),
    )  # fmt: skip
    return C.run(config), config


def test_what_a_pair_s_figures_are(pair, mesh):
    found, config = pair
    assert [m["name"] for m in found["measures"]] == ["Implicit reward", "KL to the reference"] and "<b>so</b>" in found["prompt"]
    implicit, kl = (m["panels"] for m in found["measures"])
    assert list(implicit) == ["DPO: chosen", "DPO: rejected", "model (other): chosen", "model (other): rejected"]
    models = [C.open_model(source, config, "") for source in (config.dpo, config.sft)]
    encoded = C.one_pair(config, C.make_task(dataclasses.replace(config, data="."), mesh, models[0]), models[0]).chosen
    logps = [programs.response_logps(m.config, mesh)(m.load(mesh), put_whole(encoded, mesh)) for m in models]
    mask = encoded.mask[0]
    expected = implicit_token_rewards(*logps, encoded.mask, beta=0.5)[0][mask]
    np.testing.assert_allclose(implicit["DPO: chosen"][1], expected, rtol=1e-4, atol=1e-5)
    texts, values = implicit["model (other): chosen"]
    assert values == [0.0] * len(texts) and all(x == pytest.approx(0, abs=1e-5) for x in kl["model (other): chosen"][1])
    assert min(kl["DPO: chosen"][1]) > 0
    assert "".join(texts).encode("utf-8", "surrogateescape").decode() == NASTY + "<|end|>"


def test_the_page_is_safe_and_drawn_from_the_json(pair, tmp_path, capsys):
    found, config = pair
    out = Path(config.out)
    text = (out / "pair.html").read_text()
    page = Page(text)
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "link", "object"} and "http" not in text and "url(" not in text
    assert "&lt;b&gt;so&lt;/b&gt;" in text and not set("\x1b\u202e") & set(text)
    assert [t for _, t in page.find("span", "whole")] and "prefers the chosen one" in text
    files = {name: (out / name).read_bytes() for name in ("pair.html", "pair.svg", "pair.json")}
    (out / "pair.html").unlink()
    assert C.run(dataclasses.replace(config, draw=True)) == json.loads(files["pair.json"])
    assert {name: (out / name).read_bytes() for name in files} == files
    assert files["pair.svg"].startswith(b"<?xml") and (out / "pair.png").read_bytes().startswith(b"\x89PNG")
    ansi = C.terminal(found)
    assert "── Implicit reward ──" in ansi and "\x1b[31m" not in ansi
    with pytest.raises(UserError, match=r"--draw: there is no .*pair\.json"):
        C.run(dataclasses.replace(config, draw=True, out=str(tmp_path)))


@pytest.mark.parametrize("length", [1_024, 100_000])
def test_a_page_stays_small(length, tmp_path):
    """Seven measures of two models and two long answers, in at most 300 kB."""
    rng = np.random.default_rng(0)
    tokens = [f" token{i}" if i % 3 else "ization" for i in range(length)]
    panels = {f"{m}: {s}": [tokens, rng.standard_normal(length).tolist()] for m in ("DPO", "SimPO") for s in ("chosen", "rejected")}
    measures = [C.Measure(f"Measure {i}", "about", "reward", "sum", panels)._asdict() for i in range(7 if length < 5_000 else 1)]
    made = C.page({"facts": {}, "prompt": "p", "measures": measures}, tmp_path / "page.html")
    assert made.stat().st_size <= 300_000 and "tokens are drawn: those around the largest magnitudes" in made.read_text()


def test_a_pair_of_the_gold_world_in_words(mesh):
    task = C.GoldTask(C.PRESETS["gold"][1], mesh)
    row = C.gold_row(task, "x5 x1 x6 x5", "--chosen", "OPEN t0s1 CLOSE EOS")
    assert row.tokens[0, :9].tolist() == [25, 21, 26, 25, 2, 5, 3, 0, gold.PAD] and row.mask.sum() == 4
    assert C.token_texts(task, row.tokens[0, 4:8]) == ["OPEN ", "t0s1 ", "CLOSE ", "EOS "]
    for prompt, answer, said in (
        ("x5 x1 x6 x5", "OPEN oops EOS", "--chosen: oops is no token of the gold world: EOS SEP"),
        ("x5 x1 x6", "OPEN EOS", "gold prompts are rows of 4 ids"),
        ("x5 x1 x6 x5", "OPEN EOS SEP", "is no complete response"),
        ("x5 x1 x6 x5", "SEP " * 25, "--chosen has 25 tokens, the gold world's answers 24 at most"),
    ):
        with pytest.raises(UserError, match=said):
            C.gold_row(task, prompt, "--chosen", answer)


def test_where_the_models_are_found(tmp_path, monkeypatch):
    """The flags, then --runs, then the newest quickstart of the same world; a reward model of other runs never."""
    monkeypatch.chdir(tmp_path)
    config = C.PRESETS["gold"][1]
    with pytest.raises(UserError, match="--sft is missing, and --runs runs/gold has no sft: run `python -m experiments.quickstart`"):
        C.sources(config)
    for study, tokenizer, names in (
        ("20250101-000000", "gold", ("sft", "dpo", "reward-model", "ppo")),
        ("20250102-000000", "gold", ("sft", "dpo", "reward-model", "ppo", "rto")),
        ("20250103-000000", "0f3a", ("sft", "dpo")),
    ):
        for name in names:
            folder = tmp_path / "runs" / f"quickstart-{study}" / "seed0" / name
            folder.mkdir(parents=True)
            (folder / "model.json").write_text(json.dumps({"tokenizer": tokenizer}))
    place = "runs/quickstart-20250102-000000/seed0"
    names = {"sft": "sft", "dpo": "dpo", "reward_model": "reward-model", "critic": "rto"}
    assert C.sources(config) == {"other": ""} | {flag: f"{place}/{name}" for flag, name in names.items()}
    given = dataclasses.replace(config, sft="a", dpo="b")
    assert C.sources(given) == {"other": "", "sft": "a", "dpo": "b", "reward_model": "", "critic": ""}
    assert C.sources(C.PRESETS["smollm2"][1])["sft"] == "runs/quickstart-20250103-000000/seed0/sft"


def test_bad_flags(folder, mesh):
    config = C.PRESETS["smollm2"][1]
    with pytest.raises(UserError, match=r"--prompt, --chosen, --rejected go together: --rejected is missing\."):
        dataclasses.replace(config, prompt="a", chosen="b")
    with pytest.raises(UserError, match="have no effect: nothing is trained here"):
        dataclasses.replace(config, dry_run=True)
    words = dict(prompt="a", chosen="b", rejected="c", sft=str(folder), lengths=Lengths(32, 8))
    with pytest.raises(UserError, match="--beta is missing: --dpo .* is no DPO run"):
        C.compute(dataclasses.replace(config, dpo=str(folder), **words))
    with pytest.raises(UserError, match="the tokenizer of --dpo gold is not that of"):
        C.compute(dataclasses.replace(config, dpo="gold", **words))
    with pytest.raises(UserError, match="--reward-model .* is a language model"):
        C.compute(dataclasses.replace(config, dpo=str(folder), reward_model=str(folder), **words))
    with pytest.raises(UserError, match=r"is no PPO or RTO run with a critic"):
        C.of_critic(folder, config, mesh, None, None, None, None, None, None)


@pytest.mark.slow
def test_gold_runs_from_the_stages(tmp_path):
    """All seven measures; RTO's value, advantage and return hold together, and A* sums to R* − V*."""
    from tests.test_experiments import MODULES, run, tiny

    for stage in MODULES:
        run(stage, tiny(stage, tmp_path))
    config = dataclasses.replace(C.PRESETS["gold"][1], out=str(tmp_path / "out"), runs=str(tmp_path), index=3)
    found = C.run(config)
    by_name = {m["name"]: {side: np.array(x) for side, (_, x) in m["panels"].items()} for m in found["measures"]}
    assert len(by_name) == 7
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(by_name["Return"][side], by_name["Value"][side] + by_name["Advantage"][side], atol=1e-5)
    assert "β1 0.25, β2 0.5, β3 1, γ 1, λ 0.95" in found["measures"][-1]["about"]
    assert config.seed == found["facts"]["seed"] and found["facts"]["--critic"] == str(tmp_path / "rto")


def test_the_committed_pair(tmp_path):
    """README's figure is drawn from its JSON alone; both answers differ where the caption says, and A* sums to R* − V*."""
    folder = Path(C.__file__).parents[1] / "results" / "credit_assignment"
    if not (folder / "pair.json").exists():
        pytest.skip("no results are committed")
    found = json.loads((folder / "pair.json").read_text())
    C.picture(found, tmp_path / "pair.svg")
    assert (tmp_path / "pair.svg").stat().st_size > 10_000 and (folder / "pair.svg").exists()
    world = gold.World()
    prompt = np.array([[gold.TOKEN_NAMES.index(x) for x in found["prompt"].split(" (")[0].split()]])
    for tokens, values in found["measures"][1]["panels"].values():
        ids = np.full((1, world.horizon), gold.PAD)
        ids[0, : len(tokens)] = [gold.TOKEN_NAMES.index(x.strip()) for x in tokens]
        mask = ids != gold.PAD
        start = world.solve().V[world.classes(prompt)[0], 0, gold.SEP, 0]
        assert sum(values) == pytest.approx(world.returns(prompt, ids, mask)[0] - start, abs=1e-4)
