"""All of RTO's tables and figures, and results/README.md with them.

    python -m experiments.tables                    the embedded world, 5 seeds; an hour at most on 2 cores, resumable
    python -m experiments.tables --cheap            minutes: one seed, hardly any steps
    python -m experiments.tables --draw             everything drawn again from the JSON in results/
"""

import re
from pathlib import Path

from experiments import ablations, baselines, data_scaling, reinforce, study, table1, tldr
from experiments.common import main
from experiments.study import StudyConfig, Table

TABLES: dict[Table, str] = {
    table1.TABLE: "Table 1: methods",
    ablations.TABLE: "Ablations: where the reward is paid",
    data_scaling.TABLE: "Data scaling",
    reinforce.TABLE: "Table 2: without a critic",
    tldr.TABLE: "Who wins against whom",
    baselines.TABLE: "Other baselines",
}


def page(results: Path) -> str:
    """results/README.md, from what lies in the folders beside it."""
    parts = ["# Results\n\nDrawn by `python -m experiments.tables --draw` from the JSON files in these folders.\n"]
    for table, title in TABLES.items():
        for file in sorted((results / table.name).glob("*.md")):
            figure = f"{table.name}/{file.stem}.svg"
            picture = f"![{title}]({figure})\n\n" if (results / figure).exists() else ""
            parts.append(f"## {title} ({file.stem})\n\n{picture}{file.read_text()}")
    if (results / "theory" / "table.md").exists():
        parts.append("## Theory\n\n[theory/table.md](theory/table.md), by `python -m experiments.theory`.\n")
    return "\n".join(parts)


def front(readme: str, results: Path) -> str:
    """README.md with every <!-- results NAME --> … <!-- end --> filled with that table."""

    def fill(found: re.Match) -> str:
        table = (results / found[1] / "gold.md").read_text().split("\n\n")[0]
        return f"<!-- results {found[1]} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- results (\w+) -->\n.*?<!-- end -->", fill, readme, flags=re.DOTALL)


def run(config: StudyConfig) -> None:
    results = Path(config.results)
    if not config.draw:
        arms = [arm for table in TABLES for arm in config.arms(table, "gold").values()]
        study.run_all(arms, config.base("gold"), config)
    for table in TABLES:
        study.make(table, "gold", config)
    (results / "README.md").write_text(page(results))
    if results.resolve() == study.RESULTS:
        readme = study.ROOT / "README.md"
        readme.write_text(front(readme.read_text(), results))
    print(f"results: {(results / 'README.md').resolve()}")


PRESETS = {"gold": ("the embedded world", StudyConfig())}

if __name__ == "__main__":
    main(PRESETS, run, __doc__)
