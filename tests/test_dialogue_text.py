"""Dialogues in words: which tokens are the assistant's, and what DPO's reward says of each turn."""

import json

import numpy as np
import pytest

from experiments import dialogue_text, dpo
from experiments.common import main
from rto_jax.data import Lengths, load_tokenizer, read_preferences
from rto_jax.errors import UserError
from rto_jax.types import Pairs, Sequences
from tests.test_data import save_tokenizer
from tests.test_text import write_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


HH = "\n\nHuman: one\n\nAssistant: ab\n\nHuman: two\n\nAssistant: "


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("hh") / "train.jsonl"
    file.write_text(json.dumps({"chosen": HH + "good", "rejected": HH + "bad ab"}))
    return list(read_preferences(file)[0])


def spoken(rows: Sequences, tokenizer, actions: bool) -> str:
    row, mask = rows.tokens[0], rows.mask[0]
    start = len(row) - len(mask)
    return tokenizer.decode(row[start:][mask == actions][: None if actions else (rows.valid[0, start:] & ~mask).sum()], skip_special_tokens=False)


def test_all_of_the_assistant_s_turns_are_actions(records, tokenizer):
    pairs = dialogue_text.text_pairs(records, tokenizer, Lengths(64, 64))
    assert [spoken(rows, tokenizer, True) for rows in pairs] == ["ab</s>good</s>", "ab</s>bad ab</s>"]
    assert spoken(pairs.chosen, tokenizer, False) == "\n<s>user\ntwo</s>\n<s>assistant\n"
    for rows in pairs:  # the ids of the template itself
        ids = rows.tokens[0][rows.valid[0]]
        history = (*records[0].prompt,)
        assert tokenizer.decode(ids, skip_special_tokens=False).startswith(tokenizer.render(history))
    start = 64
    np.testing.assert_array_equal(pairs.chosen.tokens[0, :start], pairs.rejected.tokens[0, :start])


def test_what_does_not_fit_becomes_prompt_or_is_cut(records, tokenizer):
    """The earlier exchange is read, not trained on, in both rows; a last answer that is too long keeps its beginning."""
    pairs = dialogue_text.text_pairs(records, tokenizer, Lengths(96, 6))
    assert [spoken(rows, tokenizer, True) for rows in pairs] == ["good</s>", "bad ab"[:4] + "ab</s>"]
    assert tokenizer.decode(pairs.chosen.tokens[0, :96][pairs.chosen.valid[0, :96]], skip_special_tokens=False) == tokenizer.render(records[0].prompt)
    short = dialogue_text.text_pairs(records, tokenizer, Lengths(8, 3)).chosen
    assert spoken(short, tokenizer, True) == "goo" and short.valid[0].all()


def test_dialogues_that_are_none(tokenizer, tmp_path):
    turn = lambda role: {"role": role, "content": "x"}  # noqa: E731
    for roles in (("user",), ("user", "assistant", "user"), ("assistant",), ("user", "assistant", "assistant")):
        with pytest.raises(UserError, match="ends with the assistant"):
            dialogue_text.exchanges(tuple(map(turn, roles)), tokenizer)
    odd = "{% for m in messages %}{{ m.role }}{{ messages|length }}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    with pytest.raises(UserError, match="does not go on"):
        dialogue_text.exchanges(tuple(map(turn, ("user", "assistant", "user", "assistant"))), load_tokenizer(save_tokenizer(tmp_path, odd)))


def test_turns_are_counted_and_rewards_summed_by_turn():
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 1, 1]], bool)
    assert dialogue_text.turns(mask).tolist() == [[1, 1, 0, 0, 2], [0, 0, 0, 1, 1]]
    rows = lambda m: Sequences(np.zeros((2, 8), int), np.ones((2, 8), bool), m)  # noqa: E731
    better = np.array([[1.0, 3, 0, 0, 5], [0, 0, 0, 1, 1]])
    worse = np.array([[1.0, 3, 0, 0, 4], [0, 0, 0, 2, 0]])
    found = dialogue_text.figures((better, worse), Pairs(rows(mask), rows(mask)))
    assert found["reward"] == {"last answer, chosen": [5.0, 1.0], "last answer, rejected": [4.0, 1.0], "earlier answers": [2.0]}
    assert found["tokens"] == {"last answer, chosen": 1.5, "last answer, rejected": 1.5, "earlier answers": 2.0}
    assert found["right"] == {"all answers": [1.0, 0.5], "last answer": [1.0, 0.5]}


@pytest.mark.slow
def test_the_command_on_a_small_model(tmp_path, monkeypatch, capsys):
    """DPO on dialogues, then its reward by turn: earlier answers cancel in the preference, and the page shows both sides."""
    monkeypatch.setenv("RTO_JAX_CACHE", str(tmp_path / "cache"))
    model, data = write_model(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    for split, n in (("train", 32), ("test", 16)):
        rows = [{"chosen": f"{HH}yes {i}", "rejected": f"{HH}no <b> {i}"} for i in range(n)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--preset", "smollm2", "--data", str(data), "--batch-size", "16"]
    trained = ["--init", str(model), "--out", str(tmp_path / "dpo"), "--lengths.prompt", "40", "--lengths.response", "12", "--steps", "4"]
    main(dpo.PRESETS, dpo.run, "", [*small, *trained, "--micro-batches", "2", "--optim.learning-rate", "0.01"])
    flags = ["--sft", str(model), "--dpo", str(tmp_path / "dpo"), "--out", str(tmp_path / "out"), "--lengths.response", "40"]
    capsys.readouterr()
    main(dialogue_text.PRESETS, dialogue_text.run, "", [*small, *flags])
    said = capsys.readouterr().out
    assert "16 pairs of dialogues, 2.0 answers each" in said and "earlier answers | 3.0 |" in said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["right"]["all answers"] == found["right"]["last answer"] and len(found["reward"]["earlier answers"]) == 16
    page = (tmp_path / "out" / "dialogue.html").read_text()
    assert "&lt;" in page and "<b>" not in page and "Before its first answer" in page
    with pytest.raises(SystemExit) as stop:
        main(dialogue_text.PRESETS, dialogue_text.run, "", [*small, *flags, "--dpo", str(tmp_path / "none")])
    assert stop.value.code == 2 and "--dpo" in capsys.readouterr().err
