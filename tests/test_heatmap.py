"""rto_jax.heatmap: tokens and numbers as HTML and ANSI; whatever a token holds, the page stays whole and legible."""

import html
import re

import numpy as np
import pytest

from rto_jax import heatmap
from rto_jax.heatmap import align, ansi, plain, rgb, word_starts
from tests.test_report import Page


def raw(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


FACE = [raw(b"\xf0\x9f"), raw(b"\x98"), raw(b"\x80")]  # an emoji in three tokens
NASTY = ["<script>", "alert(1)", "</script>", '" onload="x', " ", *FACE, " שלום", " עו", "לם", "\u202e", "a\u202eb", "\x1b[31m", "\x00", "\r", "\ud800", "\u0301", "👩", "\u200d", "", "\u2028", "<|im_end|>"]  # fmt: skip


def test_one_text_with_a_panel_for_each_score():
    tokens, scores = ["Yes", ",", " so"], {"DPO": [2.0, -1.0, None], "RM": np.array([0.0, float("nan"), -2.0])}
    made = heatmap.heatmap(tokens, scores, unit="reward")
    assert made._repr_html_() == made and "<style>" in made
    page = Page(made)
    spans = [(a["class"], a.get("style"), a["title"], t) for a, t in page.find("span", "t")]
    # 98th percentile of 0, 1, 2, 2: between the two 2's.
    assert spans == [
        ("t p", "--v:1.00", "+2.000 reward", "Yes"),
        ("t n", "--v:0.50", "−1.000 reward", ","),
        ("t", None, "no value", " so"),
        ("t p", "--v:0.00", "+0.000 reward", "Yes"),
        ("t", None, "no value", ","),
        ("t n", "--v:1.00", "−2.000 reward", " so"),
    ]
    assert [t for _, t in page.find("h3")] == ["DPOsum +1.00 reward", "RMsum −2.00 reward"]
    plain_one = heatmap.heatmap(tokens, {"DPO": [1, 2, 3]}, style=False, word="first")
    assert "<style>" not in plain_one and "sum" not in plain_one and "checkbox" not in plain_one  # nothing to merge
    with pytest.raises(ValueError, match="panel 'DPO' has 3 tokens and 1 values"):
        heatmap.heatmap(tokens, {"DPO": [1.0]})
    with pytest.raises(ValueError, match="3 panels can't be aligned two by two"):
        heatmap.panels({name: (tokens, [1, 2, 3]) for name in "abc"}, aligned=True)
    assert "(no tokens)" in heatmap.heatmap([], {"DPO": []})


@pytest.mark.parametrize("aligned", [False, True])
def test_nothing_that_a_token_holds_acts(aligned):
    panels = {"a": (NASTY, np.arange(len(NASTY))), "<b>": (NASTY[::-1], np.arange(len(NASTY)))}
    made = heatmap.panels(panels, aligned=aligned, unit="<i>", style=False)
    page = Page(made)
    assert {tag for tag, _, _ in page.elements} <= {"div", "p", "span", "h3", "small", "b", "br", "label", "input"}
    assert all(set(a) <= {"class", "style", "title", "dir", "type"} for _, a, _ in page.elements)
    bad = re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u202e]", made)
    assert bad == [] and made.encode()
    names = [t for a, t in page.find("b", "x")]
    for name in ("F0 9F", "98", "80", "U+202E", "U+001B", "U+0000", "U+000D", "U+D800", "U+0301", "U+200D", "U+2028"):
        assert name in names
    assert all(a["dir"] == "auto" for a, _ in page.find("p", "tokens"))
    assert [t for _, t in page.find("span", "special")].count("<|im_end|>") == 2


def test_merged_pieces_are_whole_characters_and_sums():
    tokens, values = [" Par", "is", "!", *FACE, " x", raw(b"\xc3"), "\ud800"], [1.0, 2.0, -1.0, 0.25, 0.5, None, 4.0, 0, 0]
    made = Page(heatmap.heatmap(tokens, {"DPO": values}))
    words = [(a["class"], a["title"], t) for a, t in made.find("span", "w")]
    assert words == [("w p", "+3.000 nats", " Paris"), ("w p", "+0.750 nats", "F0 9F9880😀")]
    assert [t for _, t in made.find("span", "whole")] == ["😀"] and len(made.find("input")) == 1
    first = Page(heatmap.heatmap(tokens, {"V": values}, word="first"))
    assert [a["title"] for a, _ in first.find("span", "w")] == ["+1.000 nats", "+0.250 nats"]
    broken = Page(heatmap.heatmap([raw(b"\xf0\x9f"), raw(b"\x98"), raw(b"\x98\xff")], {"a": [None] * 3}))
    assert [(a["title"], "�" in t) for a, t in broken.find("span", "w")] == [("no value", True)]


def test_where_words_start():
    tokens = ["un", "believ", "able", " and", " don", "'t", " <|end|>", "<|end|>", "next", ".", "5", "東", "京", "שלו", "ם", "👩", "\u200d", "👧", ""]
    starts = word_starts(tokens)
    joined = "|".join(t if i == 0 or not starts[i] else "/" + t for i, t in enumerate(tokens)).replace("|/", "/")
    assert joined == "un|believ|able/ and/ don|'t/ <|end|>/<|end|>/next/./5/東/京/שלו|ם/👩|\u200d|👧/"
    assert word_starts([]).shape == (0,)


def test_texts_are_aligned_by_their_diff():
    first, second = list("The old man"), list("The new man!")
    rows, differs = align(first, second, *(np.ones(len(x), bool) for x in (first, second)))
    assert rows == [((0, 11), (0, 12))]
    assert ["".join(c for c, d in zip(x, mine, strict=True) if d) for x, mine in zip((first, second), differs, strict=True)] == ["old", "new!"]


def test_rows_cover_both_texts_and_begin_at_the_same_word():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first = list(rng.choice(list("abcdef"), rng.integers(0, 120)))
        second = [t for t in first if rng.random() < 0.9] + ["z"] * int(rng.integers(0, 3))
        starts = rng.random(len(first)) < 0.7, rng.random(len(second)) < 0.7
        rows, differs = align(first, second, *starts)
        for side, text in enumerate((first, second)):
            assert [i for row in rows for i in range(*row[side])] == list(range(len(text)))
        for (a, _), (b, _) in rows[1:]:
            assert first[a] == second[b] and starts[0][a] and starts[1][b] and not differs[0][a] and not differs[1][b]
        same = [[t for t, d in zip(x, mine, strict=True) if not d] for x, mine in zip((first, second), differs, strict=True)]
        assert same[0] == same[1]
        sizes = [max(a1 - a0, b1 - b0) for (a0, a1), (b0, b1) in rows]
        assert all(size >= 16 for size in sizes[:-1]) and (len(rows) == 1 or sizes[-1] >= 8)


@pytest.mark.parametrize("aligned", [False, True])
def test_a_very_long_answer_is_drawn_around_its_largest_magnitudes(aligned):
    n, rng = 100_000, np.random.default_rng(0)
    tokens, values = [f" {i}" for i in range(n)], 0.01 * rng.standard_normal(n)
    values[[10, 40_000, n - 1]] = [3.0, -5.0, 4.0]
    made = heatmap.panels({"a": (tokens, values), "b": (tokens[:50], values[:50])}, limit=200, aligned=aligned)
    drawn = [t for _, t in Page(made).find("span", "t")]
    assert {" 10", " 40000", " 99999"} <= set(drawn) and len(drawn) == 150 and len(made) < 30_000
    assert "150 of 100,050 tokens are drawn: those around the largest magnitudes." in made
    left_out = [int(m.replace(",", "")) for m in re.findall(r"… ([\d,]+) tokens? left out", html.unescape(made))]
    assert sum(left_out) == n - 100
    assert ansi({"a": (tokens, values)}, limit=100).count("\x1b[0m") == 100


def test_the_terminal_gets_colours_and_no_token_s_own_control_characters():
    text = ansi({"a\x1b": (NASTY, np.arange(len(NASTY)) - 5.0)}, unit="reward")
    assert set(re.findall(r"\x1b\[[^m]*m", text)) <= set(re.findall(r"\x1b\[(?:0|38;2;27;29;33;48;2;\d+;\d+;\d+)m", text))
    assert not set("\x00\r\u202e\ud800\u2028") & set(text) and text.startswith("aU+001B  (sum ")
    assert "48;2;101;161;218m yes" in ansi({"a": ([" yes"], [1.0])})
    assert plain("a\tb\n") == "a⇥b↵" and plain("") == "∅"


def test_colours_are_symmetric_and_can_be_read():
    """By hand: 255 + 0.75 (50 − 255) = 101.25 and so on. WCAG's contrast of text is at least 4.5, in light and dark."""
    assert rgb(2.0, 2.0) == rgb(5.0, 2.0) == (101, 161, 218) and rgb(-2.0, 2.0) == (240, 161, 82)
    assert rgb(0.0, 1.0) == rgb(None, 1.0) == rgb(float("nan"), 1.0) == (255, 255, 255)
    assert heatmap.scale_of({"a": ([], [0.0, None])}) == heatmap.scale_of({}) == 1.0

    def luminance(colour):
        c = np.array(colour) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    hexadecimal = lambda x: [int(2 * d if len(x) == 3 else x[i : i + 2], 16) for i, d in zip((0, 2, 4), x[:3], strict=True)]  # noqa: E731
    found = {name: re.findall(rf"--{name}:#?([\w,]+)", heatmap.STYLE) for name in ("hc", "hi", "hp", "hn")}
    for mode in (0, 1):
        card, ink = hexadecimal(found["hc"][mode]), hexadecimal(found["hi"][mode])
        for end in (found["hp"][mode], found["hn"][mode]):
            back = np.array(card) + 0.75 * (np.array([int(x) for x in end.split(",")]) - card)
            light, dark = sorted((luminance(back), luminance(ink)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5
