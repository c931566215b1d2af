"""A self-contained report.html: curves with seed bands, tables, token heat maps and sampled texts.

One file without scripts and without the network, light or dark as the reader's system is, for desktop and phone.
"""

import html
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rto_jax import heatmap

# Okabe and Ito's colours, told apart by colour-blind readers; darkened for white paper, lightened for black.
_SERIES = [
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f08a3c"),
    ("#008a64", "#2ec99b"),
    ("#a8487f", "#dd94bd"),
    ("#8a6d00", "#e3c34d"),
    ("#555b66", "#aab2bf"),
]
_POINTS = 200  # more points than a curve's pixels are averaged in bins


class Report:
    """Sections in the order of the calls; every text is escaped.

    A method has one colour in all figures, tables and samples: those of `methods` in that order, then any other that
    a figure shows.
    """

    def __init__(self, title: str, subtitle: str = "", methods: Sequence[str] = ()):
        self._title, self._subtitle = title, subtitle
        self._sections: list[tuple[bool, str]] = []  # (is a figure, HTML)
        self._words = False  # whether a heat map has words to merge
        self._colours = {name: number for number, name in enumerate(methods)}

    def text(self, title: str, *paragraphs: str) -> None:
        self._add(title, "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs))

    def facts(self, facts: Mapping[str, object], title: str = "How this was made") -> None:
        """Command, commit, hardware, seeds, time: a list of names and values."""
        rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(facts[name]))}</dd>" for name in facts)
        self._add(title, f"<dl>{rows}</dl>")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
        """The first column names the row; the caller formats the numbers ("0.93 ± 0.01"); None is a dash."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
        body = ""
        for name, *cells in rows:
            if len(cells) + 1 != len(header):
                raise ValueError(f"row {name!r} has {len(cells) + 1} cells, the header {len(header)}")
            texts = ["–" if cell is None else html.escape(str(cell)) for cell in cells]
            labels = [html.escape(label) for label in header[1:]]  # for the phone, where a row is a card
            row = "".join(f'<td data-label="{label}">{text}</td>' for label, text in zip(labels, texts, strict=True))
            body += f'<tr><th scope="row">{self._key(str(name))}</th>{row}</tr>'
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._add(title, f'<div class="wide">{table}</div>{_note(note)}')

    def curves(
        self,
        title: str,
        arms: Mapping[str, Sequence[Sequence[float]]],
        x: Sequence[float],
        *,
        xlabel: str,
        ylabel: str,
        reference: tuple[str, float] | None = None,
        band: Literal["range", "sd"] = "range",
        note: str = "",
    ) -> None:
        """The mean over seeds of `arms[method][seed][point]` at `x`, with the seeds' range, or ± 1 standard deviation.

        A seed may have fewer points than `x`; a value that is not finite is a gap. `reference` is a horizontal line
        with its name (an exact optimum).
        """
        series = {}
        for name, seeds in arms.items():
            self._colours.setdefault(name, len(self._colours))
            series[name] = _over_seeds(seeds, x, band)
        shown = {name: curve for name, curve in series.items() if curve is not None}
        keys = [self._key(name) for name in shown]
        keys += [f"{html.escape(name)} (no data)" for name in series if name not in shown]
        if reference is not None:
            keys.append(f'<span class="key line">{html.escape(reference[0])} ({reference[1]:.4g})</span>')
        legend = f'<p class="legend"><b>{html.escape(ylabel)}</b> {" ".join(keys)}</p>'
        label = html.escape(f"{title}: {ylabel} against {xlabel} for {', '.join(shown) or 'no method'}")
        seeds = {name: len(arms[name]) for name in shown}
        if shown:
            colours = [self._colours[name] % len(_SERIES) for name in shown]
            drawing = _draw(list(shown.values()), colours, xlabel, reference, f"f{len(self._sections)}", label)
        else:
            drawing = '<p class="empty">No data.</p>'
        made = [_seed_words(seeds, band)] if seeds else []
        if (width := math.ceil(len(x) / _POINTS)) > 1:
            made.append(f"Each point is the mean of {width} logged ones.")
        self._add(title, f"{legend}<figure>{drawing}</figure>{_note(' '.join([*made, note]).strip())}", figure=True)

    def heatmap(
        self,
        title: str,
        panels: Mapping[str, tuple[Sequence[str], Sequence[float | None]]],
        *,
        prompt: str | None = None,
        unit: str = "nats",
        note: str = "",
        **options,
    ) -> None:
        """Texts, such as the chosen and the rejected answer, with a value for each token: blue above 0, orange below.

        `panels[name]` is (tokens, values); `options` are those of `rto_jax.heatmap.panels`, which draws it. One check
        box at the top of the page merges pieces into words in all of its heat maps.
        """
        drawn = heatmap.panels(panels, unit=unit, switch=False, style=False, **options)
        self._words |= any(not heatmap.word_starts(tokens).all() for tokens, _ in panels.values())
        body = "" if prompt is None else f'<p class="prompt"><b>Prompt</b> {html.escape(prompt)}</p>'
        self._add(title, f"{body}{drawn}{_note(note)}")

    def samples(self, title: str, samples: Sequence[tuple[str, Mapping[str, str]]], note: str = "") -> None:
        """(prompt, {method: text}) each in a fold; the first is open."""
        folds = []
        for number, (prompt, texts) in enumerate(samples):
            parts = "".join(
                f'<div class="panel"><h3>{self._key(name)}</h3>'
                f'<p class="tokens">{html.escape(text) or "(empty)"}</p></div>'
                for name, text in texts.items()
            )
            opened = " open" if number == 0 else ""
            folds.append(
                f'<details{opened}><summary>{html.escape(prompt)}</summary><div class="panels">{parts}</div></details>'
            )
        self._add(title, "".join(folds) + _note(note))

    def html(self) -> str:
        """The page."""
        body, row = "", []
        for is_figure, section in [*self._sections, (False, "")]:
            if is_figure:
                row.append(section)
                continue
            body += f'<div class="figures">{"".join(row)}</div>' if row else ""
            body, row = body + section, []
        title, subtitle = html.escape(self._title), html.escape(self._subtitle)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{_style()}</style></head>'
            f"<body><header><h1>{title}</h1>{f'<p>{subtitle}</p>' if subtitle else ''}{heatmap.SWITCH * self._words}</header>"
            f"<main>{body}</main></body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Writes the page, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.html(), encoding="utf-8", errors="replace")
        os.replace(partial, path)
        return path

    def _add(self, title: str, body: str, figure: bool = False) -> None:
        self._sections.append((figure, f"<section><h2>{html.escape(title)}</h2>{body}</section>\n"))

    def _key(self, name: str) -> str:
        """The name with the swatch of its colour, where it has one."""
        if name not in self._colours:
            return html.escape(name)
        colour = f"--c:var(--s{self._colours[name] % len(_SERIES)})"
        return f'<span class="key" style="{colour}">{html.escape(name)}</span>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def _seed_words(seeds: Mapping[str, int], band: str) -> str:
    spread = "minimum to maximum over seeds" if band == "range" else "± 1 standard deviation over seeds"
    counts = sorted(set(seeds.values()))
    if counts == [1]:
        return "One seed."
    if len(counts) == 1:
        return f"Line: mean of {counts[0]} seeds; band: {spread}."
    return f"Line: mean ({', '.join(f'{name} {count}' for name, count in seeds.items())} seeds); band: {spread}."


def _over_seeds(seeds: Sequence[Sequence[float]], x: Sequence[float], band: str) -> np.ndarray | None:
    """[4, points]: x, mean, low, high, averaged in bins; gaps are NaN. None if nothing is finite."""
    if any(len(seed) > len(x) for seed in seeds):
        raise ValueError(f"a seed has more points than x, which has {len(x)}")
    values = np.full((max(len(seeds), 1), len(x)), np.nan)
    for row, seed in zip(values, seeds, strict=False):
        row[: len(seed)] = np.asarray(seed, float)
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        return None
    width = math.ceil(len(x) / _POINTS)
    padding = -len(x) % width

    def bins(array: np.ndarray) -> np.ndarray:
        padded = np.pad(array, [(0, 0), (0, padding)], constant_values=np.nan)
        return _mean(padded.reshape(len(array), -1, width), 2)

    values, centres = bins(values), bins(np.asarray(x, float)[None])[0]
    mean = _mean(values, 0)
    count = np.sum(~np.isnan(values), 0)
    if band == "range":
        low = np.where(count, np.min(np.where(np.isnan(values), np.inf, values), 0), np.nan)
        high = np.where(count, np.max(np.where(np.isnan(values), -np.inf, values), 0), np.nan)
    else:
        squares = np.nansum((values - mean) ** 2, 0)
        deviation = np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), 0.0)
        low, high = mean - deviation, mean + deviation
    return np.stack([centres, mean, low, high])


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean without NaNs; NaN, and no warning, where there is nothing else."""
    count = np.sum(~np.isnan(values), axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def _draw(curves, colours, xlabel, reference, prefix, label) -> str:
    """Inline SVG by matplotlib, in colours that the page's style sheet gives."""
    import matplotlib
    from matplotlib.figure import Figure

    # Placeholders for colours that depend on light or dark; 480 by 290 pixels at 72 an inch.
    ink, muted, grid, series = "#010101", "#010102", "#010103", [f"#0102{i:02x}" for i in range(len(_SERIES))]
    settings = {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 14, "axes.edgecolor": muted}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(480 / 72, 290 / 72), layout="constrained")
        axes = figure.subplots()
        for (x, mean, low, high), colour in zip(curves, colours, strict=True):
            axes.fill_between(x, low, high, color=series[colour], alpha=0.18, linewidth=0)
            # A point between two gaps has no line to be on.
            alone = ~np.isnan(mean) & np.isnan(np.append(mean[1:], np.nan)) & np.isnan(np.append(np.nan, mean[:-1]))
            axes.plot(x, mean, color=series[colour], linewidth=2.2, solid_joinstyle="round")
            axes.plot(x[alone], mean[alone], "o", color=series[colour], markersize=6)
        if reference is not None:
            axes.axhline(reference[1], color=ink, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.set_xlabel(xlabel.replace("$", r"\$"), color=muted)
        axes.grid(axis="y", color=grid, linewidth=1)
        axes.set_axisbelow(True)
        axes.tick_params(color=muted, labelcolor=muted)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.02)
        axes.locator_params(nbins=6)
        axes.ticklabel_format(useOffset=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    view = re.search(r'viewBox="([^"]*)"', svg).group(1)
    svg = f'<svg viewBox="{view}" role="img" aria-label="{label}">' + svg[svg.index(">") + 1 :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)  # ids are the page's, not the figure's
    svg = re.sub(r"<style.*?</style>|font-family: [^;\"]*;?", "", svg, flags=re.S)  # the page has its own
    for colour, name in [(ink, "ink"), (muted, "muted"), (grid, "grid"), *((c, f"s{i}") for i, c in enumerate(series))]:
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _style() -> str:
    light = "".join(f"--s{i}:{colour};" for i, (colour, _) in enumerate(_SERIES))
    dark = "".join(f"--s{i}:{colour};" for i, (_, colour) in enumerate(_SERIES))
    return _STYLE.replace("/*light*/", light).replace("/*dark*/", dark) + heatmap.STYLE


_STYLE = """
:root{color-scheme:light dark;--paper:#f6f6f3;--card:#fff;--ink:#1b1d21;--muted:#5b616b;--grid:#e4e4df;--edge:#deded8;
/*light*/}
@media(prefers-color-scheme:dark){:root{--paper:#131519;--card:#1b1e24;--ink:#e8e9eb;--muted:#a2a8b3;--grid:#30343c;
--edge:#2e323a;/*dark*/}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:32px;padding-bottom:8px}main{padding-bottom:40px}
h1{font-size:1.75rem;line-height:1.2;margin:0;text-wrap:balance}
header p{margin:.5rem 0 0;color:var(--muted);max-width:75ch}header .merge{margin:.6rem 0 0}
h2{font-size:1.1rem;line-height:1.3;margin:0 0 .6rem}
h3{font-size:.95rem;margin:0 0 .4rem;display:flex;justify-content:space-between;align-items:baseline;gap:1rem}
h3 small{color:var(--muted);font-weight:400;font-variant-numeric:tabular-nums}
section{background:var(--card);border:1px solid var(--edge);border-radius:10px;
padding:18px 20px;margin:16px 0;min-width:0}
section p{margin:.5rem 0;max-width:75ch}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px;margin:16px 0}
.figures section{margin:0;max-width:640px}
.note,.empty{color:var(--muted);font-size:.875rem}
section>:last-child{margin-bottom:0}
figure{margin:0}svg{display:block;width:100%;height:auto}svg *{stroke-linejoin:round;stroke-linecap:butt}
.legend{font-size:.875rem;display:flex;flex-wrap:wrap;align-items:center;
gap:.1rem .9rem;margin:0 0 .4rem;max-width:none}
.key{white-space:nowrap}
.key::before{content:"";display:inline-block;width:.8em;height:.8em;
border-radius:3px;background:var(--c);margin-right:.4em}
.key.line::before{width:1.4em;height:0;border-radius:0;
background:none;border-top:2px dashed var(--ink);vertical-align:.3em}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.925rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .9rem;text-align:right;white-space:nowrap;border-top:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{border-top:0;color:var(--muted);font-weight:500;white-space:normal;vertical-align:bottom;min-width:6.5em}
tbody th{font-weight:600}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:14px;align-items:start}
.panel{border:1px solid var(--edge);border-radius:8px;padding:12px 14px;min-width:0}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75;margin:0;font-size:.95rem}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere}
.prompt b{color:var(--muted);font-weight:500;margin-right:.5em}
details{border-top:1px solid var(--grid);padding:.6rem 0}
details:first-of-type{border-top:0;padding-top:0}
summary{cursor:pointer;white-space:pre-wrap;overflow-wrap:anywhere}
details[open] summary{margin-bottom:.6rem;font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;margin:0;font-size:.925rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,monospace;font-size:.9em}
@media(max-width:600px){header,main{padding-left:12px;padding-right:12px}section{padding:14px 14px}
h1{font-size:1.4rem}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}
table,tbody,tr,tbody th{display:block}thead{display:none}tbody th{border:0;padding:0 0 .1rem}
tr{border-top:1px solid var(--grid);padding:.6rem 0}tr:first-child{border-top:0;padding-top:0}
td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0;white-space:normal}
td:first-child{text-align:right}td::before{content:attr(data-label);color:var(--muted);text-align:left}}
@media print{section{break-inside:avoid}}
"""
