"""rto_jax.report: valid, self-contained and escaped HTML that draws the numbers it was given."""

import html.parser
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rto_jax import report
from rto_jax.report import Report

EVIL = '<script>alert("1")</script>&\''
VOID = {"meta", "br", "input"}


class Page(html.parser.HTMLParser):
    """Fails on tags that do not nest; collects (tag, attributes, text inside)."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {[e[0] for e in self.open]}"

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> at {self.getpos()} closes another tag"

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def find(self, tag, css=None):
        found = [(a, "".join(t)) for name, a, t in self.elements if name == tag]
        return [(a, t) for a, t in found if css is None or css in a.get("class", "").split()]


def full(e=lambda: ""):
    """A report with everything in it; `e()` is put into each text."""
    page = Report(f"Title{e()}", f"Subtitle{e()}", methods=["PPO", "RTO"])
    page.text(f"About{e()}", f"A paragraph{e()}", "Another")
    rows = [[f"PPO{e()}", f"1.0{e()}"], ["RTO", None]]
    page.table(f"Table{e()}", [f"method{e()}", f"return{e()}"], rows, f"note{e()}")
    arms = {"RTO": [[0.0, 1.0, 4.0], [0.0, 2.0, 6.0]], f"DPO{e()}": [[1.0, 1.0, 1.0]], f"SFT{e()}": []}
    names = {"xlabel": f"$step_{e()}", "ylabel": f"return{e()}"}
    page.curves(f"Curves{e()}", arms, [0, 1, 2], reference=(f"optimum{e()}", 7.0), note=f"n{e()}", **names)
    page.curves("Curves", {"PPO": [[0.1, 0.2]], "RTO": [[0.2, 0.1]]}, [0, 1], xlabel="x", ylabel="y")
    panels = {f"chosen{e()}": ([f"a{e()}", " b"], [1.0, -1.0]), "rejected": (["c"], [0.5])}
    page.heatmap(f"Pair{e()}", panels, prompt=f"Why?{e()}", unit=f"nats{e()}", note=f"n{e()}")
    texts = [(f"Why?{e()}", {f"PPO{e()}": f"So{e()}", "RTO": ""}), ("Q", {"PPO": "A"})]
    page.samples(f"Texts{e()}", texts, f"n{e()}")
    page.facts({f"command{e()}": f"python{e()}", "seeds": 3}, f"Facts{e()}")
    return page.html()


def test_tags_nest_and_ids_are_unique_and_found():
    text = full()
    page = Page(text)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) > 10 and len(ids) == len(set(ids))
    references = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text))
    assert references and {a or b for a, b in references} <= set(ids)
    assert len(page.find("section")) == 7 and [t for _, t in page.find("h1")] == ["Title"]
    assert full() == text  # the same report is the same file


def test_nothing_is_fetched_and_nothing_runs():
    text = full()
    assert "http" not in text and "@import" not in text and "src=" not in text and "<link" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"} and set(re.findall(r'href="(.)', text)) == {"#"}
    tags = {tag for tag, _, _ in Page(text).elements}
    assert not tags & {"script", "iframe", "object", "embed", "img"}
    assert "prefers-color-scheme:dark" in text and 'content="width=device-width' in text


def test_every_text_is_escaped():
    numbers = itertools.count()
    text = full(lambda: f"{EVIL}{next(numbers)}~")
    page = Page(text)
    assert "<script" not in text and not page.find("script")
    read = "".join(t for _, t in page.find("html")) + "".join(v for _, a, _ in page.elements for v in a.values() if v)
    count = next(numbers)
    assert count > 25 and "$step_" in read and [i for i in range(count) if f"{EVIL}{i}~" not in read] == []


def points(page, figure, series):
    """The pixels of the mean line of a series, from the figure's SVG."""
    inside = re.findall(r"<svg.*?</svg>", page, flags=re.S)[figure]
    path = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--s{series}\)', inside).group(1)
    return np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])


def test_the_line_is_the_mean_and_keeps_its_colour():
    text = full()
    drawn = points(text, 0, 1)  # RTO is the second of `methods`, and is listed first and second in the figures
    heights = (drawn[:, 1] - drawn[0, 1]) / (drawn[2, 1] - drawn[0, 1])
    np.testing.assert_allclose(heights, [0, 1.5 / 5, 1], atol=1e-4)  # means 0, 1.5, 5
    np.testing.assert_allclose(np.diff(drawn[:, 0], 2), 0, atol=1e-4)
    assert drawn[2, 1] < drawn[0, 1]  # up is less in pixels
    falling = points(text, 1, 1)
    assert falling[1, 1] > falling[0, 1]
    keys = [(a["style"], t) for a, t in Page(text).find("span", "key") if "style" in a]
    assert {style for style, name in keys if name == "RTO"} == {"--c:var(--s1)"} and len(keys) == 9
    assert "optimum (7)" in [t for _, t in Page(text).find("span", "key")]
    assert re.search(r"stroke-dasharray[^\"]*var\(--ink\)|var\(--ink\)[^\"]*stroke-dasharray", text)


def test_colours_follow_the_page_not_the_figure():
    drawings = "".join(re.findall(r"<svg.*?</svg>", full(), flags=re.S))
    assert not re.search(r"#[0-9a-f]{6}", drawings) and "DejaVu" not in drawings and "<style" not in drawings
    assert {"var(--muted)", "var(--grid)", "var(--ink)", "var(--s0)"} <= set(re.findall(r"var\(--\w+\)", drawings))


def test_mean_and_band_over_seeds():
    nan, inf = np.nan, np.inf
    seeds = [[1.0, 2.0, nan, 4.0], [3.0, inf, nan], [8.0, 4.0, nan, 6.0]]
    x, mean, low, high = report._over_seeds(seeds, [0, 1, 2, 3], "range")
    np.testing.assert_array_equal(x, [0, 1, 2, 3])
    np.testing.assert_array_equal(mean, [4, 3, nan, 5])
    np.testing.assert_array_equal(low, [1, 2, nan, 4])
    np.testing.assert_array_equal(high, [8, 4, nan, 6])
    _, mean, low, high = report._over_seeds(seeds, [0, 1, 2, 3], "sd")
    np.testing.assert_allclose(high - mean, [13**0.5, 2**0.5, nan, 2**0.5])  # (9 + 1 + 16) / 2, (1 + 1) / 1
    np.testing.assert_allclose(mean - low, high - mean)
    assert report._over_seeds([[nan], []], [0], "range") is None and report._over_seeds([], [0], "sd") is None
    with pytest.raises(ValueError, match="a seed has more points than x, which has 1"):
        report._over_seeds([[1.0, 2.0]], [0], "range")


def test_many_points_are_averaged_in_bins():
    x, mean, low, high = report._over_seeds([np.arange(401.0)], np.arange(401.0) * 2, "range")
    assert len(x) == 134  # bins of 3, the last of 2
    np.testing.assert_allclose(mean[[0, 1, -1]], [1, 4, 399.5])
    np.testing.assert_allclose(x, 2 * mean)
    np.testing.assert_array_equal(low, high)
    page = Report("T")
    page.curves("C", {"PPO": [np.arange(401.0)] * 2}, range(401), xlabel="x", ylabel="y")
    assert "Line: mean of 2 seeds; band: minimum to maximum over seeds. Each point is the mean of 3" in page.html()


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({}, "No data."),
        ({"PPO": []}, "PPO (no data)"),
        ({"PPO": [[], []]}, "No data."),
        ({"PPO": [[np.nan, np.inf]], "RTO": [[1.0, 2.0]]}, "PPO (no data)"),
        ({"PPO": [[1.0]]}, "One seed."),
        ({"PPO": [[1.0, np.nan, 3.0], [1.0]]}, "mean of 2 seeds"),
        ({"PPO": [[1.0], [2.0]], "RTO": [[2.0]]}, "PPO 2, RTO 1 seeds"),
        ({"PPO": [[2.0, 2.0, 2.0]]}, "One seed."),
    ],
)
def test_series_that_are_empty_or_short_or_not_finite(arms, said):
    page = Report("T")
    page.curves("C", arms, [0, 1, 2], xlabel="x", ylabel="y", band="sd")
    text = page.html()
    Page(text)
    assert said in text and "nan" not in text.lower()


def test_a_point_alone_is_a_dot():
    page = Report("T")
    page.curves("C", {"PPO": [[1.0, np.nan, 3.0, 4.0]]}, range(4), xlabel="x", ylabel="y")
    page.curves("C", {"PPO": [[1.0, 2.0, 3.0, 4.0]]}, range(4), xlabel="x", ylabel="y")
    first, second = re.findall(r"<svg.*?</svg>", page.html(), flags=re.S)
    dots = [len(re.findall(r"<use [^>]*style=\"fill: var\(--s0\); stroke", drawing)) for drawing in (first, second)]
    assert dots == [1, 0]


def test_heat_map_colours_tokens_by_one_scale():
    tokens, values = ["Yes", ",\n", "<|im_end|>", "[PAD]", "", " so"], [2.0, -1.0, 0.0, None, float("nan"), -0.49]
    page = Report("T")
    page.heatmap("Pair", {"chosen": (tokens, values), "rejected": (["no"], [-0.98])})
    text = page.html()
    spans = [(a["class"], a.get("style"), a["title"], t) for a, t in Page(text).find("span", "t")]
    # 98th percentile of 0, 0.49, 0.98, 1, 2: 0.92 of the way from 1 to 2.
    assert spans == [
        ("t p", "--v:1.00", "+2.000 nats", "Yes"),
        ("t n", "--v:0.52", "−1.000 nats", ",↵"),
        ("t p special", "--v:0.00", "+0.000 nats", "<|im_end|>"),
        ("t special", None, "no value", "[PAD]"),
        ("t", None, "no value", "∅"),
        ("t n", "--v:0.26", "−0.490 nats", " so"),
        ("t n", "--v:0.51", "−0.980 nats", "no"),
    ]
    assert [t for _, t in Page(text).find("h3")] == ["chosensum +0.51 nats", "rejectedsum −0.98 nats"]
    (scale,) = Page(text).find("p", "scale")
    assert scale[1].split() == ["−1.9", "+1.9", "nats"]
    with pytest.raises(ValueError, match="panel 'chosen' has 1 tokens and 2 values"):
        page.heatmap("Pair", {"chosen": (["a"], [1.0, 2.0])})
    empty = Report("T")
    empty.heatmap("Pair", {"chosen": ([], []), "rejected": (["a"], [None])})
    empty.heatmap("Pair", {"chosen": (["a"], [0.0])})
    Page(empty.html())
    assert "(no tokens)" in empty.html()


def test_one_check_box_merges_the_words_of_all_heat_maps():
    page = Report("T")
    page.heatmap("Whole", {"a": (["OPEN ", "EOS "], [1.0, 2.0])})
    assert "checkbox" not in page.html()
    for name in "bc":
        page.heatmap("Pieces", {name: ([" Par", "is"], [1.0, 2.0])}, word="first")
    text = page.html()
    assert text.count('type="checkbox"') == 1 and text.index('type="checkbox"') < text.index("</header>")
    assert [a["title"] for a, _ in Page(text).find("span", "w")] == ["+1.000 nats"] * 2


def test_table_and_samples():
    text = full()
    page = Page(text)
    assert [(a["data-label"], t) for a, t in page.find("td")] == [("return", "1.0"), ("return", "–")]
    assert [(t, "open" in a) for a, t in page.find("details")] == [("Why?PPOSoRTO(empty)", True), ("QPPOA", False)]
    with pytest.raises(ValueError, match="row 'PPO' has 3 cells, the header 2"):
        Report("T").table("Table", ["method", "return"], [["PPO", 1, 2]])


def test_the_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = Report("first").write(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == Report("first").html()

    def fail(*_):
        raise OSError("killed")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        Report("second").write(path)
    assert path.read_text(encoding="utf-8") == Report("first").html()


def test_matplotlib_is_loaded_late_and_left_as_it_was():
    code = """
import sys
from rto_jax.report import Report
assert not {"matplotlib", "jax"} & sys.modules.keys()
page = Report("T")
page.curves("C", {"PPO": [[1.0, 2.0]]}, [0, 1], xlabel="x", ylabel="y")
import matplotlib
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams["svg.fonttype"] == "path" and matplotlib.rcParams["svg.hashsalt"] is None
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[1])
