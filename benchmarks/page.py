"""Draws the tables of benchmarks/README.md from the JSON files in benchmarks/results: python -m benchmarks.page"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
GIB = 2**30


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(found: dict, hardware: str) -> str:
    return f"`{found['command']}`, commit {short(found['git'])}, {hardware}"


def short(git: dict) -> str:
    return (git["commit"] or "no commit")[:7] + (", changed" if git["dirty"] else "")


def steps_cpu(found: dict) -> str:
    """One row an implementation and case; ours has its share of a large product's rate."""
    rows = []
    for case, got in found["cases"].items():
        ours = got["implementations"]["ours"]
        for name, one in got["implementations"].items():
            against = name != "ours"
            rows.append([
                case, name, f"{one['tokens_per_second']:.0f}",
                f"{one['median_seconds'] / ours['median_seconds']:.2f}×" if against else "",
                f"{one['peak_bytes'] / GIB:.2f}", f"{ours['peak_bytes'] / one['peak_bytes']:.2f}×" if against else "",
                "" if against else f"{100 * got['share_of_product']:.0f} %",
            ])  # fmt: skip
    head = ["case", "who", "tokens/s", "we are faster by", "peak, GiB", "our memory", "our share of a product"]
    hardware = f"{found['cpu']['cores']} cores of {found['cpu']['model']}"
    return f"{source(found, hardware)}; medians of {found['runs']} alternating steps.\n\n{table(head, rows)}"


def steps_gpu(found: dict) -> str:
    rows = []
    for name, one in found["implementations"].items():
        for way in ("lean", "fast"):
            got = one.get(way, one if "error" in one else {})
            if "error" in got:
                rows.append([name, way, got["error"], "", "", ""])
            elif got:
                rows.append([
                    name, way, f"{got['median_seconds']:.3f}", f"{got['tokens_per_second']:.0f}",
                    f"{got['peak_bytes'] / GIB:.1f}", f"{100 * got['share_of_product']:.0f} %",
                ])  # fmt: skip
    head = ["step", "activations", "seconds", "tokens/s", "peak, GiB", "share of a product"]
    rate = f"a large bfloat16 product makes {found['product_flops_per_second'] / 1e12:.0f} TFLOP/s"
    return f"{source(found, found.get('device', 'no device'))}; {rate}.\n\n{table(head, rows)}"


def of_plan(phase: dict) -> list[str]:
    """A phase's bytes in GiB, cycles, bytes sent and seconds to compile."""
    cycles = phase["cycles"]
    fits = phase["reserved_gib"] + phase["held_gib"]
    return [
        f"{phase['peak_gib']:.2f}", f"{fits:.2f}", f"{phase['model_flops'] / 1e12:.1f}", f"{cycles / 1e6:.0f}" if cycles else "",
        f"{phase['wire_gib']:.1f}", f"{phase['compile_seconds']:.0f}",
    ]  # fmt: skip


PLAN = ["peak", "needed", "model TFLOP", "Mcycles", "sent, GiB", "compiled in, s"]


def plans_dpo(results: Path) -> str:
    """The DPO step under each named plan, and the reference's program beside the fastest."""
    rows = []
    for name in ("fast", "dots", "dots-xla", "lean", "lean-bfloat16"):
        if (file := results / f"plan-dpo-{name}.json").exists():
            found = json.loads(file.read_text())
            rows += [[f"dpo-{name}", x["phase"], *of_plan(x)] for x in found["phases"] if x["phase"] == "dpo" or not rows]
    if (file := results / "plan-tunix.json").exists():
        x = json.loads(file.read_text())
        cells = [f"{x['peak_gib']:.2f}", "", "", f"{x['cycles'] / 1e6:.0f}", f"{x['wire_gib']:.1f}", f"{x['compile_seconds']:.0f}"]
        rows.append([f"tunix {x['versions']['google-tunix']}, all in bfloat16", "dpo", *cells])
    return table(["plan", "program", *PLAN], rows)


def plans_paper(results: Path) -> str:
    """Every program of the paper's recipe on each topology."""
    parts = []
    for file in sorted(results.glob("plan-paper-*.json")):
        found = json.loads(file.read_text())
        rows = [[x["phase"], *of_plan(x)] for x in found["phases"]]
        about = f"{found['devices']} devices, {found['topology']}, of {found['memory_gib']:g} GiB. {found['verdict']}"
        parts.append(f"**{about}** `{found['command']}`, commit {short(found['commit'])}.\n\n{table(['program', *PLAN], rows)}")
    return "\n\n".join(parts)


def kills(results: Path) -> str:
    found = json.loads((results / "kill.json").read_text())
    count = lambda of: ", ".join(f"{n} in {phase}" for phase, n in of.items())  # noqa: E731
    return (
        f"{source(found, found['cpu'])}: {found['runs']} runs, {found['runs_that_differ']} differ. SIGKILL: "
        f"{count(found['kills'])}. SIGTERM: {count(found['terms'])}."
    )


def draw(page: str, results: Path) -> str:
    """The page with every <!-- KIND NAME --> … <!-- end --> filled from results/, where its files exist."""

    def fill(found: re.Match) -> str:
        kind, name = found[1], found[2]
        path = results / f"{kind}-{name}.json"
        if kind == "steps" and path.exists():
            read = json.loads(path.read_text())
            text = (steps_cpu if "cases" in read else steps_gpu)(read)
        else:
            makers = {("plans", "dpo"): plans_dpo, ("plans", "paper"): plans_paper, ("runs", "killed"): kills}
            if (kind, name) not in makers or not results.is_dir():
                return found[0]
            text = makers[kind, name](results)
        return f"<!-- {kind} {name} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- (steps|plans|runs) (\S+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(draw(page.read_text(), HERE / "results"))
    print(f"wrote {page}")
