"""What the benchmarks count, by hand; and the page's tables."""

import numpy as np
import pytest

from benchmarks import page, steps

SMALL = steps.Size(width=8, layers=2, heads=2, kv_heads=1, mlp=16, vocab=10)  # 4 numbers a head


def test_model_flops_are_those_counted_by_hand():
    # Multiply-adds a token and layer: q and o 8·8 each, k and v 8·4 each, gate, up and down 8·16 each.
    per_token = 2 * 64 + 2 * 32 + 3 * 128
    # A prompt of 2 and two answers of 1: 4 tokens; they see 1 + 2 keys, and 3 each. Two products of 8 numbers a key.
    keys = 1 + 2 + 3 + 3
    body = 2 * (2 * per_token * 4 + 2 * 2 * 8 * keys)
    unembed = 2 * 8 * 10 * 2
    assert steps.model_flops("dpo", SMALL, [(2, 1)]) == 4 * (body + unembed)
    # As one row: 3 tokens, 1 + 2 + 3 keys, 1 token of an answer.
    body = 2 * (2 * per_token * 3 + 2 * 2 * 8 * 6)
    unembed = 2 * 8 * 10
    assert steps.model_flops("sft", SMALL, [(2, 1)]) == 3 * (body + unembed)
    assert steps.model_flops("ppo", SMALL, [(2, 1)] * 5) == 5 * (3 * (body + unembed) + 3 * body)


@pytest.mark.parametrize("name", steps.CASES)
def test_ids_have_the_case_s_lengths(name):
    case = steps.CASES[name]
    rows, others = steps.ids(case), steps.ids(case, 1)
    assert [(len(p), len(a)) for p, a in rows] == case.lengths
    assert all(p == q and a != b and a[-1] == b[-1] == 1 for (p, a), (q, b) in zip(rows, others, strict=True))
    assert all(2 <= x < steps.SIZES[case.size].vocab for p, a in rows for x in p + a[:-1])
    assert sum(map(sum, case.lengths)) * (2 if case.kind == "dpo" else 1) == case.tokens


def test_padded_puts_prompts_right_and_answers_left():
    prompts, answers, left, right = steps.padded([([5, 6], [7, 1]), ([8], [9, 2, 1])])
    np.testing.assert_array_equal(prompts, [[5, 6], [0, 8]])
    np.testing.assert_array_equal(answers, [[7, 1, 0], [9, 2, 1]])
    np.testing.assert_array_equal(left, [[1, 1], [0, 1]])
    np.testing.assert_array_equal(right, [[1, 1, 0], [1, 1, 1]])


def test_packed_rows_hold_every_token_once():
    from rto_jax.types import Sequences

    case = steps.CASES["sft gsm8k"]
    prompts, answers, left, right = steps.padded(steps.ids(case))
    rows = Sequences(np.concatenate([prompts, answers], 1), np.concatenate([left, right], 1), right)
    packed = steps.packed(rows)
    assert packed.tokens.shape[1] == steps.ROW and packed.tokens.size < rows.tokens.size
    assert (packed.valid > 0).sum() == case.tokens and packed.mask.sum() == right.sum()
    np.testing.assert_array_equal(np.sort(packed.tokens[packed.valid > 0]), np.sort(rows.tokens[rows.valid]))


def test_page_draws_what_the_file_says(tmp_path):
    one = {"tokens_per_second": 200.0, "median_seconds": 1.0, "peak_bytes": 2**30}
    peer = {"tokens_per_second": 100.0, "median_seconds": 2.0, "peak_bytes": 2**31}
    found = {
        "command": "c", "git": {"commit": "0123456789", "dirty": False}, "cpu": {"cores": 2, "model": "M"}, "runs": 3,
        "cases": {"dpo": {"implementations": {"ours": one, "trl": peer}, "share_of_product": 0.5}},
    }  # fmt: skip
    (tmp_path / "steps-x.json").write_text(page.json.dumps(found))
    text = page.draw("a\n<!-- steps x -->\nold\n<!-- end -->\n<!-- steps y -->\nkept\n<!-- end -->\n", tmp_path)
    assert (
        "| dpo | trl | 100 | 2.00× | 2.00 | 0.50× |  |" in text and "| dpo | ours | 200 |  | 1.00 |  | 50 % |" in text
    )
    assert "old" not in text and "<!-- steps y -->\nkept\n<!-- end -->" in text and "commit 0123456," in text


def test_page_draws_plans_and_kills(tmp_path):
    phase = {
        "phase": "dpo", "peak_gib": 1.5, "reserved_gib": 2.0, "held_gib": 0.5, "model_flops": 3e12, "cycles": 7e8, "wire_gib": 4.0,
        "compile_seconds": 5.4,
    }  # fmt: skip
    found = {
        "phases": [phase], "commit": {"commit": "0123456789", "dirty": True}, "devices": 64, "topology": "v5e:8x8",
        "memory_gib": 15.75, "verdict": "Fits.", "command": "plan",
    }  # fmt: skip
    for name in ("dpo-fast", "dpo-lean", "paper-x"):
        (tmp_path / f"plan-{name}.json").write_text(page.json.dumps(found))
    tunix = {"peak_gib": 3.7, "cycles": 1.38e9, "wire_gib": 56.6, "compile_seconds": 240.2, "versions": {"google-tunix": "0.1.7"}}
    (tmp_path / "plan-tunix.json").write_text(page.json.dumps(tunix))
    kills = {"git": found["commit"], "command": "kill", "cpu": "C", "runs": 3, "runs_that_differ": 1, "terms": {"step": 2}}
    (tmp_path / "kill.json").write_text(page.json.dumps(kills | {"kills": {"rollout": 4}}))
    marks = [f"<!-- {name} -->\n<!-- end -->" for name in ("plans dpo", "plans paper", "runs killed")]
    text = page.draw("\n".join(marks), tmp_path)
    assert "| dpo-fast | dpo | 1.50 | 2.50 | 3.0 | 700 | 4.0 | 5 |\n| dpo-lean | dpo | 1.50" in text
    assert "| tunix 0.1.7, all in bfloat16 | dpo | 3.70 |  |  | 1380 | 56.6 | 240 |" in text
    assert "**64 devices, v5e:8x8, of 15.75 GiB. Fits.** `plan`, commit 0123456, changed." in text
    assert "| dpo | 1.50 | 2.50 |" in text and "3 runs, 1 differ. SIGKILL: 4 in rollout. SIGTERM: 2 in step." in text


def test_the_page_is_up_to_date():
    text = (page.HERE / "README.md").read_text()
    assert page.draw(text, page.HERE / "results") == text
