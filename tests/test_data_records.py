"""Files of every shape that the README names, and every fault, said with file and line."""

import gzip
import json
from pathlib import Path

import pytest

from rto_jax.data import held_out_splits, read_examples, read_preferences, read_prompts
from rto_jax.data.records import find_files
from rto_jax.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"

USER = {"role": "user", "content": "Hi?"}
HUMAN = {"from": "human", "value": "Hi?"}
PAIR = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}


def write(path: Path, *records, raw: bytes = b"") -> Path:
    content = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records) + raw
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def turns(*texts: str) -> tuple[dict, ...]:
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


HH = "\n\nHuman: Hi?\n\nAssistant: Who?\n\nHuman: Me.\n\nAssistant:"
PAIR_SHAPES = {
    "text": (PAIR, turns("Hi?")),
    "one message each": (PAIR | {"chosen": assistant("Yes."), "rejected": assistant("No.")}, turns("Hi?")),
    "message lists": ({"prompt": [USER], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}, turns("Hi?")),
    "whole conversations": ({"chosen": [USER, assistant("Yes.")], "rejected": [USER, assistant("No.")]}, turns("Hi?")),
    "prompt is the first turn only": (
        PAIR
        | {
            "chosen": [*turns("Hi?", "Who?", "Me."), assistant("Yes.")],
            "rejected": [*turns("Hi?", "Who?", "Me."), assistant("No.")],
        },
        turns("Hi?", "Who?", "Me."),
    ),
    "sharegpt": (
        {
            "conversations": [HUMAN, {"from": "gpt", "value": "Who?"}, {"from": "human", "value": "Me."}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        turns("Hi?", "Who?", "Me."),
    ),
    "HH": ({"chosen": HH + " Yes.", "rejected": HH + " No."}, turns("Hi?", "Who?", "Me.")),
    "HH prompt": ({"prompt": HH, "chosen": "Yes.", "rejected": "No."}, turns("Hi?", "Who?", "Me.")),
    "first better": (
        {"instruction": "Hi?", "output_1": "Yes.", "output_2": "No.", "preference": 1.0},
        turns("Hi?"),
    ),
    "second better": ({"instruction": "Hi?", "output_1": "No.", "output_2": "Yes.", "preference": 2}, turns("Hi?")),
    "nearer to 1": ({"instruction": "Hi?", "output_1": "Yes.", "output_2": "No.", "preference": 1.49}, turns("Hi?")),
    "nearer to 2": ({"instruction": "Hi?", "output_1": "No.", "output_2": "Yes.", "preference": 1.51}, turns("Hi?")),
    "solutions": ({"question": "Hi?", "chosen": "Yes.", "rejected": "No.", "chosen_model": "a"}, turns("Hi?")),
    "with input": (
        {"instruction": "Hi?", "input": "x", "chosen": "Yes.", "rejected": "No.", "system": None},
        turns("Hi?\n\nx"),
    ),
    "system": (PAIR | {"system": "Be kind."}, ({"role": "system", "content": "Be kind."}, USER)),
}


@pytest.mark.parametrize("name", PAIR_SHAPES)
def test_preference_shapes(tmp_path, name):
    record, prompt = PAIR_SHAPES[name]
    file = write(tmp_path / "d.jsonl", record)
    (pair,), report = read_preferences(file)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "Yes.", "No.")
    assert pair.where == f"{file}:1"
    assert (report.records, report.notes()) == (1, "")
    # For SFT the chosen answer; for rollouts the prompt.
    (example,), _ = read_examples(file)
    assert (example.prompt, example.response) == (prompt, "Yes.")
    (only,), _ = read_prompts(file)
    assert only.prompt == prompt


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "Hi?", "response": "Yes."}, "Hi?"),
        ({"prompt": [USER], "completion": [assistant("Yes.")]}, "Hi?"),
        ({"instruction": "Hi?", "input": "", "output": "Yes."}, "Hi?"),
        ({"instruction": "Hi?", "input": "x", "output": "Yes."}, "Hi?\n\nx"),
        ({"messages": [USER, assistant("Yes.")]}, "Hi?"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "Yes."}]}, "Hi?"),
        ({"question": "Hi?", "answer": "Yes."}, "Hi?"),
    ],
)
def test_example_shapes(tmp_path, record, prompt):
    (example,), _ = read_examples(write(tmp_path / "d.jsonl", record))
    assert (example.prompt, example.response) == (turns(prompt), "Yes.")
    (only,), _ = read_prompts(write(tmp_path / "p.jsonl", record))
    assert only.prompt == turns(prompt)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi?"},
        {"instruction": "Hi?"},
        {"question": "Hi?"},
        {"turns": ["Hi?", "And then?"]},
        {"messages": [USER]},
        {"messages": [USER, assistant("Yes.")]},
        {"context_messages": [USER]},
    ],
)
def test_prompt_shapes(tmp_path, record):
    (only,), _ = read_prompts(write(tmp_path / "d.jsonl", record))
    assert only.prompt == turns("Hi?")


def test_each_prompt_once_in_order(tmp_path):
    records, report = read_prompts(write(tmp_path / "d.jsonl", *({"prompt": p} for p in "abacb")))
    assert [r.prompt[0]["content"] for r in records] == ["a", "b", "c"]
    assert [r.where.rpartition(":")[2] for r in records] == ["1", "2", "4"]
    assert (report.repeated, report.notes()) == (2, ", 2 repeated prompts dropped")


def test_ties_are_dropped_and_counted(tmp_path):
    tie = {"instruction": "Hi?", "output_1": "a", "output_2": "b", "preference": 1.5}
    records, report = read_preferences(write(tmp_path / "d.jsonl", tie, tie | {"preference": 1}, tie))
    assert ([r.where.rpartition(":")[2] for r in records], report.ties) == (["2"], 2)
    assert report.notes() == ", 2 ties dropped"
    with pytest.raises(UserError, match="no usable record, 1 ties dropped"):
        read_preferences(write(tmp_path / "t.jsonl", tie))


def test_only_newlines_end_a_line(tmp_path):
    """U+2028 and U+0085 stand unescaped in real files; str.splitlines would cut there."""
    strange = PAIR | {"chosen": "a\u2028b\u0085c"}
    file = write(tmp_path / "d.jsonl.gz", PAIR, strange, raw=b"\n  \n" + json.dumps(PAIR).encode() + b"\r\n")
    records, _ = read_preferences(file)
    assert [r.chosen for r in records] == ["Yes.", "a\u2028b\u0085c", "Yes."]
    assert records[2].where == f"{file}:5"  # blank lines count


BAD = {
    "not JSON": (b'{"prompt": "Hi?"', "not JSON"),
    "not an object": (b'["Hi?"]', "a JSON object is expected, not a list"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 text"),
    "deep": (b"[" * 100_000, "not JSON"),
    "half a surrogate": (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "half of a surrogate pair"),
    "no fields": (
        {"text": "a", "label": 1},
        "expected the fields chosen and rejected, or .*; the record has label, text",
    ),
    "no rejected": ({"prompt": "Hi?", "chosen": "a"}, "expected the fields chosen and rejected"),
    "null": (PAIR | {"rejected": None}, "expected the fields chosen and rejected"),
    "no preference": ({"instruction": "i", "output_1": "a", "output_2": "b"}, "expected the fields .* preference"),
    "no prompt": ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "expected the fields prompt, chosen"),
    "number": (PAIR | {"chosen": 3}, "chosen must be text, not int"),
    "empty prompt": (PAIR | {"prompt": " "}, "the prompt is empty"),
    "empty list": (PAIR | {"prompt": []}, "prompt is an empty list"),
    "empty chosen": (PAIR | {"chosen": " \n"}, "the chosen answer is empty"),
    "empty rejected": (PAIR | {"rejected": ""}, "the rejected answer is empty"),
    "equal": (PAIR | {"rejected": "Yes."}, "the chosen answer is equal to the rejected one"),
    "HH empty": ({"chosen": HH, "rejected": HH + " No."}, "the chosen answer is empty"),
    "HH unlike": (
        {"chosen": HH + " a", "rejected": HH.replace("Me", "You") + " b"},
        "chosen and rejected do not share their prompt",
    ),
    "HH without a turn": ({"chosen": "Yes.", "rejected": "No."}, "chosen is not a dialogue .* no prompt field"),
    "HH ends with a question": ({"chosen": HH[:-12], "rejected": HH + " b"}, "does not end with the assistant's turn"),
    "verdict": ({"instruction": "i", "output_1": "a", "output_2": "b", "preference": 3}, "preference must be a number"),
    "NaN": (
        b'{"instruction": "i", "output_1": "a", "output_2": "b", "preference": NaN}',
        "preference must be a number",
    ),
    "role": (PAIR | {"prompt": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    "message": (PAIR | {"prompt": [{"role": "user"}]}, "a message without role and content"),
    "user answers": (PAIR | {"chosen": [USER]}, "chosen does not end with the assistant's message"),
    "assistant asks": (PAIR | {"prompt": [assistant("x")]}, "does not end with a user's message"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_name_file_and_line(tmp_path, name):
    record, message = BAD[name]
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    file = write(tmp_path / "d.jsonl", PAIR, raw=line + b"\n" + json.dumps(PAIR).encode())
    with pytest.raises(UserError, match=message) as caught:
        read_preferences(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert "\n" not in str(caught.value)
    records, report = read_preferences(file, skip_bad=True)
    assert [r.where for r in records] == [f"{file}:1", f"{file}:3"]
    assert report.bad == 1
    assert report.notes().startswith(", 1 bad records skipped (the first: d.jsonl:2: ")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER]}, "the conversation does not end with the assistant's message"),
        ({"prompt": "Hi?"}, "expected the fields response or completion"),
        ({"response": "Yes."}, "expected the fields response or completion"),
        ({"prompt": "Hi?", "response": " "}, "the answer is empty"),
    ],
)
def test_bad_examples(tmp_path, record, message):
    with pytest.raises(UserError, match=f"d.jsonl:1: {message}"):
        read_examples(write(tmp_path / "d.jsonl", record))


def test_bad_prompts(tmp_path):
    with pytest.raises(UserError, match=r"d\.jsonl:1: expected the fields prompt, instruction"):
        read_prompts(write(tmp_path / "d.jsonl", {"text": "a"}))


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"no\.jsonl: no such file or folder"):
        read_preferences(tmp_path / "no.jsonl")
    with pytest.raises(UserError, match=r"it has none"):
        read_preferences(tmp_path)
    for name, content in [("e.jsonl", b""), ("b.jsonl", b"\n \n"), ("z.jsonl.gz", gzip.compress(b""))]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: the file is empty"):
            read_preferences(tmp_path / name)
    whole = write(tmp_path / "w.jsonl.gz", *[PAIR | {"chosen": str(i)} for i in range(500)]).read_bytes()
    middle = len(whole) // 2
    broken = {"cut": whole[:middle], "text": b"{}\n", "garbled": whole[:middle] + b"\xff" * 64 + whole[middle + 64 :]}
    for name, content in broken.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        for skip_bad in (False, True):  # no record of a broken file can be trusted
            with pytest.raises(UserError, match=rf"{name}\.jsonl\.gz: broken gzip file"):
                read_preferences(tmp_path / f"{name}.jsonl.gz", skip_bad=skip_bad)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"x\.parquet: broken parquet file"):
        read_preferences(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no usable record, 1 bad records skipped \(the first: o\.jsonl:1: not JSON"):
        read_preferences(write(tmp_path / "o.jsonl", raw=b"{"), skip_bad=True)


def test_a_folder_holds_splits(tmp_path):
    train, test = write(tmp_path / "train.jsonl.gz", PAIR), write(tmp_path / "test.jsonl", PAIR, PAIR)
    assert find_files(tmp_path, "train") == [train]
    assert len(read_preferences(tmp_path, "test")[0]) == 2
    with pytest.raises(UserError, match=r"has no eval\.jsonl\.gz, .*; it has test\.jsonl, train\.jsonl\.gz"):
        read_preferences(tmp_path, "eval")
    write(tmp_path / "test.jsonl.gz", PAIR)
    with pytest.raises(UserError, match=r"has both test\.jsonl\.gz and test\.jsonl; name the file itself"):
        read_preferences(tmp_path, "test")
    assert find_files(test, "whatever") == [test]


def test_parquet_shards_as_the_hub_has_them(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "data").mkdir()
    whole = {"prompt": "Hi?", "chosen": [USER, assistant("Yes.")], "rejected": [USER, assistant("No.")]}
    for i in range(2):
        rows = [whole | {"chosen": [USER, assistant(f"Yes {i}{j}.")]} for j in range(2)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    records, _ = read_preferences(tmp_path, "train")
    assert [r.chosen for r in records] == ["Yes 00.", "Yes 01.", "Yes 10.", "Yes 11."]
    assert records[3].where == f"{tmp_path}/data/train-00001-of-00002.parquet:2"


REAL = [
    # folder, split, reader, records kept, bad: counted once by hand against the files
    ("alpaca_eval", "test", read_preferences, 1000, 0),
    ("alpaca_eval", "prompts", read_prompts, 671, 0),
    ("hh_harmless", "train", read_preferences, 1411, 6),  # 3 empty answers, 3 dialogues that part before the end
    ("sharegpt_dpo_demo", "train", read_preferences, 225, 0),
    ("gsm8k_solution_pairs", "test", read_preferences, 263, 0),
    ("gsm8k", "test", read_examples, 1122, 0),
    ("alpaca_sft_demo", "test", read_examples, 129, 0),
    ("mt_bench_prompts", "eval", read_prompts, 64, 0),
    ("arena_hard_prompts", "eval", read_prompts, 424, 0),
]


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the repository")
@pytest.mark.parametrize(("folder", "split", "read", "kept", "bad"), REAL)
def test_real_files(folder, split, read, kept, bad):
    records, report = read(DATA / folder, split, skip_bad=True)
    assert (len(records), report.bad, report.records) == (kept, bad, kept)
    assert all(r.prompt[-1]["role"] == "user" for r in records)
    if folder == "hh_harmless":
        assert max(len(r.prompt) for r in records) > 3
        assert not any("\n\nHuman:" in r.chosen + r.rejected for r in records)
        with pytest.raises(UserError, match=r"train\.jsonl\.gz:114: the chosen answer is empty"):
            read(DATA / folder, split)


def test_splits_of_a_hub_folder(tmp_path):
    """UltraFeedback's layout: preferences in *_prefs, other things beside them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for name in ("train_prefs", "test_prefs", "test_sft", "test_gen"):
        rows = [{"prompt": f"{name}?", "chosen": "yes", "rejected": "no"}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    assert held_out_splits(tmp_path) == ["test"]
    assert read_preferences(tmp_path, "train")[0][0].prompt[0]["content"] == "train_prefs?"
    plain = tmp_path / "plain"
    plain.mkdir()
    assert held_out_splits(plain) == ["train"]
    for name in ("train.jsonl.gz", "test_b.jsonl.gz", "test.jsonl"):
        (plain / name).touch()
    assert held_out_splits(plain) == ["test", "test_b"]
    assert held_out_splits(plain / "test.jsonl") == ["train"]
