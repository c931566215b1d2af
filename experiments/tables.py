"""All tables and figures of the papers, and results/README.md with them.

    python -m experiments.tables                    RTO's, in the embedded world, 5 seeds; resumable
    python -m experiments.tables --preset q-star    From r to Q*'s
    python -m experiments.tables --cheap            minutes: one seed, hardly any steps
    python -m experiments.tables --draw             everything drawn again from the JSON in results/
"""

import re
import sys
from pathlib import Path

from experiments import (
    ablations,
    baselines,
    bijection,
    data_scaling,
    dialogue,
    digits,
    error_injection,
    findings,
    likelihoods,
    proxy_tuning,
    reinforce,
    search,
    study,
    table1,
    tldr,
)
from experiments.common import main, split_preset
from experiments.study import StudyConfig, Table

RTO: dict[str, Table] = {
    "Table 1: methods": table1.TABLE,
    "Ablations: where the reward is paid": ablations.TABLE,
    "Data scaling": data_scaling.TABLE,
    "Table 2: without a critic": reinforce.TABLE,
    "Who wins against whom": tldr.TABLE,
    "Other baselines": baselines.TABLE,
    "Beyond the paper": findings.TABLE,
}
Q_STAR: dict[str, Table] = {
    "Error injection": error_injection.TABLE,
    "Search": search.TABLE,
    "Falling likelihoods": likelihoods.TABLE,
    "The theorems": bijection.TABLE,
    "Proxy tuning": proxy_tuning.TABLE,
    "Pictures as tokens": digits.TABLE,
    "Dialogues": dialogue.TABLE,
}
TABLES = RTO | Q_STAR


def page(results: Path) -> str:
    """results/README.md, from what lies in the folders beside it."""
    parts = ["# Results\n\nDrawn by `python -m experiments.tables --draw` from the JSON files in these folders.\n"]
    for title, table in TABLES.items():
        for file in sorted((results / table.name).glob("*.md")):
            pictures = [f"![{title}]({table.name}/{figure.name})\n\n" for figure in sorted(file.parent.glob(f"{file.stem}*.svg"))]
            parts.append(f"## {title} ({file.stem})\n\n{''.join(pictures)}{file.read_text()}")
    if (results / "theory" / "table.md").exists():
        parts.append("## Theory\n\n[theory/table.md](theory/table.md), by `python -m experiments.theory`.\n")
    return "\n".join(parts)


PAGES = ("README.md", "docs/what_we_found.md")  # that hold tables of results


def filled(text: str, results: Path) -> str:
    """A page with every <!-- results NAME --> … <!-- end --> filled with that table; NAME: PART takes the one under ### PART.

    NAME/PRESET takes another preset's than gold's.
    """

    def fill(found: re.Match) -> str:
        blocks = (results / found[2] / f"{found[3] or 'gold'}.md").read_text().split("\n\n")
        table = blocks[blocks.index(f"### {found[4]}") + 1] if found[4] else blocks[0]
        return f"<!-- results {found[1]} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- results ((\w+)(?:/(\w+))?(?:: (.*?))?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def run(config: StudyConfig, tables: dict[str, Table] = RTO) -> None:
    """Trains the tables' arms together, so that each is trained once; with --draw, draws all tables that have JSON."""
    results = Path(config.results)
    if config.draw:
        for table in TABLES.values():
            for file in sorted((results / table.name).glob("*.json")):
                study.draw(table, file)
    else:
        study.run_all([arm for table in tables.values() for arm in config.arms(table, "gold").values()], config.base("gold"), config)
        for table in tables.values():
            study.make(table, "gold", config)
    (results / "README.md").write_text(page(results))
    if results.resolve() == study.RESULTS:
        for file in (study.ROOT / name for name in PAGES):
            file.write_text(filled(file.read_text(), results))
    print(f"results: {(results / 'README.md').resolve()}")


SETS = {"rto": RTO, "q-star": Q_STAR}
PRESETS = {
    "rto": ("RTO's tables, and what goes beyond them", StudyConfig()),
    "q-star": ("From r to Q*'s figures as tables", StudyConfig()),
}

if __name__ == "__main__":
    main(PRESETS, lambda config: run(config, SETS[split_preset(sys.argv[1:], PRESETS)[0]]), __doc__)
