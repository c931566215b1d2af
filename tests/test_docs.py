"""docs/losses.md is what the docstrings and the tests say; what it shows and links to is there."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from docs import make_losses
from rto_jax import losses

ROOT = Path(__file__).parents[1]
PAGE = make_losses.PAGE.read_text()
HEADINGS = re.findall(r"^#+ (.*)", PAGE, re.M)
LINKS = re.findall(r"\]\(([^)\s]+)\)", PAGE)


def test_the_page_is_up_to_date():
    if make_losses.page() != PAGE:
        pytest.fail(f"docs/losses.md is out of date: run `{make_losses.COMMAND} --text-only`", pytrace=False)


def test_every_function_is_proved_by_hand_by_an_identity_and_by_an_oracle():
    assert make_losses.unproved() == []


def test_every_public_name_has_a_section():
    assert set(losses.__all__) <= set(HEADINGS)


def test_every_argument_is_explained():
    families = {"_logps": "The four log-probabilities", "_lengths": "Lengths", "_weight": "Weights"}
    missing = []
    for name, function in make_losses.functions().items():
        doc = " ".join(inspect.getdoc(function).split())
        if re.search(r"[Aa]rguments[^.]* (as in `|are its own)", doc):
            continue
        for parameter in inspect.signature(function).parameters:
            known = [words for end, words in families.items() if parameter.endswith(end)]
            if not re.search(rf"\b{parameter}\b", doc) and not any(words in doc for words in known):
                missing.append(f"{name}: {parameter}")
    assert missing == []


def test_every_paper_has_a_title():
    cited = set(re.findall(r"arXiv \d{4}\.\d{5}", " ".join(PAGE.split())))
    assert len(cited) > 25 and cited <= set(make_losses.SOURCES)


def test_links_lead_somewhere():
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in HEADINGS}
    for link in set(LINKS):
        if link.startswith("#"):
            assert link in anchors
        elif not link.startswith("http"):
            assert (make_losses.PAGE.parent / link).exists(), link


def test_figures_are_there_and_small():
    names = re.findall(r"!\[.*?\]\(figures/(\w+)\.svg\)", PAGE)
    assert len(names) == 5
    for name in names:
        assert 1e3 < (ROOT / "docs" / "figures" / f"{name}.svg").stat().st_size < 1e5


def test_the_example_runs(capsys):
    (example,) = re.findall(r"## All|```python\n(import.*?)```", PAGE.split("## All functions")[0], re.S)
    scope = {}
    exec(example, scope)
    np.testing.assert_allclose(scope["value"], np.log(2), rtol=1e-6)  # the model is uniform, as its reference is
    assert not scope["gradient"][1, 2].any() and scope["gradient"][1, 1].any()
    assert capsys.readouterr().out.startswith("0.693")
