"""Tokens coloured by a number each: as HTML for pages and notebooks, as ANSI for terminals. NumPy only.

    heatmap(["The", " answer", " is", " 42"], {"DPO": [0.1, 0.0, -0.2, 1.3]})     # a notebook shows it
    print(ansi({"DPO": (tokens, values)}))

Blue is above 0, orange below (told apart by colour-blind readers), as strong as the number is far from 0 on a scale that
all panels of a figure share; a token without a finite number stays plain. The HTML has no script and fetches nothing,
every text in it is escaped, and it is dark where the reader's system is. Pointing at a token shows its number; a check
box merges pieces into words.

A token is a str. Bytes that are no whole character (a piece of an emoji) are lone surrogates, as
`bytes.decode("utf-8", "surrogateescape")` gives them: they are shown in hexadecimal, and as the character once merged.
"""

import difflib
import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

LIMIT = 4_000
"""tokens drawn in one figure, all panels together; about 80 bytes of HTML each"""
_ALIGNED = 4_000  # a longer text is not compared with another: the time grows with the product of the lengths
_ROW = 16  # tokens, at least, between two places where aligned texts start a new row
_AROUND = 8  # tokens shown on each side of a large magnitude, where not all are

Number = float | None
Panels = Mapping[str, tuple[Sequence[str], Sequence[Number]]]


class Heatmap(str):
    """HTML that a notebook shows."""

    def _repr_html_(self) -> str:
        return str(self)


def heatmap(tokens: Sequence[str], scores: Mapping[str, Sequence[Number]], **options) -> Heatmap:
    """One text, a panel for each name in `scores`: {name: a number for each token}. Options: those of `panels`."""
    return panels({name: (tokens, values) for name, values in scores.items()}, **options)


def panels(
    panels: Panels,
    *,
    unit: str = "nats",
    word: Literal["sum", "first"] = "sum",
    aligned: bool = False,
    limit: int = LIMIT,
    switch: bool = True,
    style: bool = True,
) -> Heatmap:
    """Several texts on one scale, whose ends are the 98th percentile of the magnitudes: one token must not bleach the rest.

    panels: {name: (tokens, values)}; None, NaN and infinity are no value. word: what a merged word shows, the sum of
    its pieces' values (rewards, KL) or that of its first (values of states). aligned: the first and second panel are
    two texts side by side, and so on: rows begin where they are the same, and tokens that the other lacks are underlined.
    limit: tokens drawn in all; of longer texts, what lies around the largest magnitudes, with the number left out.
    switch, style: with the check box, and with the style sheet (a page needs `STYLE` once).
    Raises ValueError where tokens and values differ in number, or texts to align are odd in number.
    """
    panels = {name: (list(tokens), _floats(name, tokens, values)) for name, (tokens, values) in panels.items()}
    if aligned and len(panels) % 2:
        raise ValueError(f"{len(panels)} panels can't be aligned two by two")
    scale = scale_of(panels)
    low, high = signed(-scale, ".2g"), signed(scale, ".2g")
    parts = [f'<p class="scale">{low} <span class="bar"></span> {high} {html.escape(unit)}</p>']
    starts = {name: word_starts(tokens) for name, (tokens, _) in panels.items()}
    if switch and any(not found.all() for found in starts.values()):
        parts.insert(0, SWITCH)
    share = limit // max(len(panels), 1)
    kept = {name: _kept(values, share) for name, (_, values) in panels.items()}

    def spans(name: str, begin: int, end: int, differs: np.ndarray | None) -> str:
        tokens, values = panels[name]
        return _spans(tokens, values, starts[name], kept[name], differs, begin, end, scale, unit, word)

    names, body = list(panels), []
    for group in [names[i : i + 2] for i in range(0, len(names), 2)] if aligned else [[name] for name in names]:
        heads = [_head(name, panels[name][1], unit, word) for name in group]
        if not aligned:
            (name,) = group
            body.append(f'<div class="panel">{heads[0]}{_text(spans(name, 0, len(panels[name][0]), None))}</div>')
            continue
        texts = [panels[name][0] for name in group]
        rows, differs = align(*texts, *(starts[name] for name in group))
        rows = _joined(rows, *(kept[name] for name in group))
        cells = "".join(
            f'<div class="cell">{_text(spans(name, *span, mine))}</div>'
            for row in rows
            for name, span, mine in zip(group, row, differs, strict=True)
        )
        body.append(f'<div class="pair">{"".join(heads)}{cells}</div>')
    parts.append(f'<div class="{"pairs" if aligned else "grid"}">{"".join(body)}</div>')
    if cut := sum(int((~x).sum()) for x in kept.values()):
        total = sum(len(x) for x in kept.values())
        parts.append(f'<p class="cut">{total - cut:,} of {total:,} tokens are drawn: those around the largest magnitudes.</p>')
    sheet = f"<style>{STYLE}</style>" if style else ""
    return Heatmap(f'{sheet}<div class="heat">{"".join(parts)}</div>')


def ansi(panels: Panels, *, unit: str = "nats", limit: int = LIMIT) -> str:
    """The same for a terminal of 24-bit colour. Control characters in a token are written out, never sent."""
    panels = {name: (list(tokens), _floats(name, tokens, values)) for name, (tokens, values) in panels.items()}
    scale, out = scale_of(panels), []
    for name, (tokens, values) in panels.items():
        line, left_out = "", 0
        for token, value, shown in zip(tokens, values, _kept(values, limit // max(len(panels), 1)), strict=True):
            left_out += not shown
            if shown:
                line += _left_out(left_out) if left_out else ""
                left_out = 0
                text = plain(token)
                red, green, blue = rgb(value, scale)
                line += f"\x1b[38;2;27;29;33;48;2;{red};{green};{blue}m{text}\x1b[0m" + "\n" * token.count("\n")
        out.append(f"{plain(name)}  (sum {signed(float(np.nansum(values)), '.2f')} {unit})\n{line}{_left_out(left_out) if left_out else ''}")
    return "\n\n".join(out)


def scale_of(panels: Mapping[str, tuple[Sequence[str], Sequence[Number]]]) -> float:
    """The value at which the colour is full: the 98th percentile of the magnitudes of all panels; 1 if all are 0."""
    sizes = [np.abs(np.array(values, float)) for _, values in panels.values()]
    finite = np.concatenate([x[np.isfinite(x)] for x in sizes]) if sizes else np.zeros(0)
    return float((np.percentile(finite, 98) or finite.max()) if finite.size else 0.0) or 1.0


def rgb(value: Number, scale: float) -> tuple[int, int, int]:
    """The colour of a value on white paper."""
    if value is None or not math.isfinite(value):
        return (255, 255, 255)
    end, strength = (_BLUE if value >= 0 else _ORANGE), 0.75 * min(abs(value) / scale, 1.0)
    return tuple(round(255 + (x - 255) * strength) for x in end)


def word_starts(tokens: Sequence[str]) -> np.ndarray:
    """Bool [n]: where a word starts. A piece goes on with it if it starts with a letter, digit, apostrophe or mark, or in
    the middle of a character, and the piece before ends so. Special tokens, and scripts without spaces (Chinese,
    Japanese), are never joined."""
    out = np.ones(len(tokens), bool)
    for i in range(1, len(tokens)):
        out[i] = not _goes_on(tokens[i - 1], tokens[i])
    return out


def align(
    first: Sequence[str], second: Sequence[str], first_starts: np.ndarray, second_starts: np.ndarray
) -> tuple[list[tuple[tuple[int, int], tuple[int, int]]], tuple[np.ndarray, np.ndarray]]:
    """Rows ((begin, end) in first, (begin, end) in second) that begin at the same word in both, and what the other lacks.

    The diff is Ratcliff and Obershelp's (difflib). first_starts, second_starts: `word_starts`. Returns the rows, each
    of 16 tokens at least in one text (the last one of 8), and bool arrays that are True at the tokens that are not in the diff's common part.
    """
    differs = np.ones(len(first), bool), np.ones(len(second), bool)
    ends, begin, rows = (len(first), len(second)), (0, 0), []
    if max(ends) > _ALIGNED:
        return [((0, ends[0]), (0, ends[1]))], (~differs[0], ~differs[1])
    for i, j, size in difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        differs[0][i : i + size] = differs[1][j : j + size] = False
        for a, b in zip(range(i, i + size), range(j, j + size), strict=True):
            long = max(a - begin[0], b - begin[1]) >= _ROW and 2 * max(ends[0] - a, ends[1] - b) >= _ROW
            if long and first_starts[a] and second_starts[b]:
                rows.append(((begin[0], a), (begin[1], b)))
                begin = a, b
    return [*rows, ((begin[0], ends[0]), (begin[1], ends[1]))], differs


def plain(token: str) -> str:
    """A token as text that any screen shows: line breaks, control characters and bare bytes written out."""
    return "".join(x for x, _ in _pieces(token)) or "∅"


def signed(value: float, digits: str) -> str:
    return f"{value:+{digits}}".replace("-", "−")


# ---- helpers


def _floats(name: str, tokens: Sequence[str], values: Sequence[Number]) -> np.ndarray:
    """float64, NaN where there is no finite value."""
    out = np.array([math.nan if value is None else float(value) for value in values])
    if len(tokens) != len(out):
        raise ValueError(f"panel {name!r} has {len(tokens)} tokens and {len(out)} values")
    return np.where(np.isfinite(out), out, math.nan)


def _kept(values: np.ndarray, share: int) -> np.ndarray:
    """Bool [n]: all or, of more than `share` tokens, those around the largest magnitudes."""
    if len(values) <= share:
        return np.ones(len(values), bool)
    kept = np.zeros(len(values), bool)
    for i in np.argsort(-np.nan_to_num(np.abs(values)), kind="stable"):
        if (room := share - int(kept.sum())) <= 0:
            break
        window = np.arange(max(0, i - _AROUND), min(len(values), i + _AROUND + 1))
        kept[window[~kept[window]][:room]] = True
    return kept


def _joined(rows, first: np.ndarray, second: np.ndarray):
    """Neighbouring rows of which nothing is drawn are one."""
    out, empty = [], False
    for row in rows:
        nothing = not any(x[begin:end].any() for x, (begin, end) in zip((first, second), row, strict=True))
        if nothing and empty:
            row = tuple((before[0], now[1]) for before, now in zip(out.pop(), row, strict=True))
        out.append(row)
        empty = nothing
    return out


_MARK = re.compile(r"[\u200d\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")  # joins an emoji to what stands before it


def _letter(char: str) -> bool:
    return (char.isalnum() or char in "'’" or unicodedata.category(char)[0] == "M") and (
        unicodedata.east_asian_width(char) not in "WF"
    )


def _goes_on(before: str, token: str) -> bool:
    if not before or not token or _SPECIAL.fullmatch(before) or _SPECIAL.fullmatch(token):
        return False
    last, first = before[-1], token[0]
    if "\udc80" <= first <= "\udcbf" or _MARK.match(first):  # inside a character: 10xxxxxx continues one in UTF-8
        return not last.isspace()
    return last == "\u200d" or (_letter(last) and _letter(first))


_NO_BYTE = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # lone surrogates that stand for no byte
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")
_BIDI = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _pieces(token: str) -> list[tuple[str, bool]]:
    """(text, is it a name for what can't be shown): bare bytes in hexadecimal, U+202E for characters that act unseen.

    Those that turn the direction of writing are among them, so that a token can't reorder its neighbours.
    """
    out: list[tuple[str, bool]] = []
    unseen = all(unicodedata.category(c) in ("Cf", "Mn") for c in token)  # nothing to see in any of it
    for char in token:
        kind = unicodedata.category(char)
        if "\udc80" <= char <= "\udcff":
            out.append((f"{ord(char) - 0xDC00:02X}", True))
        elif char == "\n":
            out.append(("↵", False))
        elif char == "\t":
            out.append(("⇥", False))
        elif kind in ("Cc", "Cs", "Zl", "Zp") or char in _BIDI or unseen:
            out.append((f"U+{ord(char):04X}", True))
        else:
            out.append((char, False))
    return out


def _shown(token: str) -> str:
    text, run = "", ""
    for piece, is_name in [*_pieces(token), ("", False)]:
        if run and not is_name:
            text, run = f'{text}<b class="x">{run.strip()}</b>', ""
        if is_name:
            run += piece + " "
        else:
            text += {"↵": "↵<br>", "⇥": "⇥\t"}.get(piece) or html.escape(piece)
    return text or "∅"


def _span(kind: str, value: float, scale: float, unit: str, content: str) -> str:
    """A token or a word, with its number to point at."""
    if math.isnan(value):
        return f'<span class="{kind}" title="no value">{content}</span>'
    sign, strength = ("p" if value >= 0 else "n"), min(abs(value) / scale, 1.0)
    first, *more = kind.split()
    names = " ".join([first, sign, *more])
    return f'<span class="{names}" style="--v:{strength:.2f}" title="{signed(value, ".3f")} {html.escape(unit)}">{content}</span>'


def _spans(tokens, values, starts, kept, differs, begin, end, scale, unit, word) -> str:
    """Tokens begin..end as HTML, with the number of those that are not kept, and words around the pieces of one."""
    out, i = [], begin
    while i < end:
        if not kept[i]:
            j = next((k for k in range(i, end) if kept[k]), end)
            out.append(f'<span class="cut">{_left_out(j - i)}</span>')
            i = j
            continue
        j = next((k for k in range(i + 1, end) if starts[k] or not kept[k]), end)
        pieces = ""
        for k in range(i, j):
            kind = "t" + " special" * bool(_SPECIAL.fullmatch(tokens[k])) + " d" * bool(differs is not None and differs[k])
            pieces += _span(kind, values[k], scale, unit, _shown(tokens[k]))
        if j > i + 1:
            if any(is_name for k in range(i, j) for _, is_name in _pieces(tokens[k])):
                text = _NO_BYTE.sub("\ufffd", "".join(tokens[i:j]))
                whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                pieces = f'<span class="parts">{pieces}</span><span class="whole">{_shown(whole)}</span>'
            finite = values[i:j][np.isfinite(values[i:j])]
            value = values[i] if word == "first" else float(finite.sum()) if finite.size else math.nan
            pieces = _span("w", value, scale, unit, pieces)
        out.append(pieces)
        i = j
    return "".join(out)


def _left_out(count: int) -> str:
    return f"… {count:,} token{'s' * (count != 1)} left out … "


def _head(name: str, values: np.ndarray, unit: str, word: str) -> str:
    total = f"<small>sum {signed(float(np.nansum(values)), '.2f')} {html.escape(unit)}</small>" if word == "sum" else ""
    return f"<h3>{html.escape(name)}{total}</h3>"


def _text(spans: str) -> str:
    return f'<p class="tokens" dir="auto">{spans or "(no tokens)"}</p>'


_BLUE, _ORANGE = (50, 130, 205), (235, 130, 25)
SWITCH = '<label class="merge"><input type="checkbox"> merge pieces into words</label>'
"""The check box; directly in a page's header it is that of all figures of the page"""
_MERGED = ":is(.heat:has(>.merge>:checked),body:has(>header>.merge>:checked) .heat)"
STYLE = f"""
.heat{{color-scheme:light dark;--hc:#fff;--hi:#1b1d21;--hm:#5b616b;--he:#deded8;--hp:{",".join(map(str, _BLUE))};
--hn:{",".join(map(str, _ORANGE))};background:var(--hc);color:var(--hi);font-family:system-ui,-apple-system,"Segoe UI",sans-serif}}
@media(prefers-color-scheme:dark){{.heat{{--hc:#1b1e24;--hi:#e8e9eb;--hm:#a2a8b3;--he:#2e323a;--hp:45,125,200;--hn:205,100,15}}}}
.heat *{{box-sizing:border-box}}
.heat .grid{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:14px;align-items:start}}
.heat .pairs{{display:grid;gap:14px}}
.heat .panel,.heat .pair{{border:1px solid var(--he);border-radius:8px;padding:12px 14px;min-width:0}}
.heat .pair{{display:grid;grid-template-columns:1fr 1fr;gap:.3rem 1.6rem}}
.heat h3{{font-size:.95rem;margin:0 0 .4rem;display:flex;flex-wrap:wrap;justify-content:space-between;align-items:baseline;gap:0 1rem}}
.heat .cell{{min-width:0}}
.heat h3 small{{color:var(--hm);font-weight:400;font-variant-numeric:tabular-nums}}
.heat .tokens{{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75;margin:0;max-width:none;font-size:.95rem}}
.heat .t,.heat .w{{border-radius:3px;padding:.12em .04em;box-decoration-break:clone;-webkit-box-decoration-break:clone;
-webkit-print-color-adjust:exact;print-color-adjust:exact}}
.heat .w{{padding:0}}
.heat .t.p,{_MERGED} .w.p{{background:rgba(var(--hp),calc(var(--v)*.75))}}
.heat .t.n,{_MERGED} .w.n{{background:rgba(var(--hn),calc(var(--v)*.75))}}
{_MERGED} .w{{padding:.12em .04em}}
{_MERGED} .w .t{{background:none;padding:0;pointer-events:none}}
.heat .whole,{_MERGED} .parts{{display:none}}
{_MERGED} .whole{{display:inline}}
.heat .d{{text-decoration:underline;text-decoration-thickness:1.5px;text-underline-offset:.22em}}
.heat .special,.heat .x{{font:.8em ui-monospace,monospace;border:1px solid var(--hm);border-radius:3px;padding:.1em .3em;margin:0 .15em}}
.heat .x{{padding:0 .2em;margin:0 .08em;border-style:dotted;unicode-bidi:isolate}}
.heat .cut{{color:var(--hm);font-style:italic;font-size:.85em}}
.heat .scale{{display:flex;flex-wrap:wrap;align-items:center;gap:.1rem .5rem;margin:0 0 .4rem;max-width:none;
color:var(--hm);font-size:.875rem;font-variant-numeric:tabular-nums}}
.heat p.cut{{margin:.5rem 0 0}}
.heat .bar{{width:11rem;height:.8em;border-radius:3px;background:linear-gradient(90deg,rgba(var(--hn),.75),
rgba(var(--hn),0) 50%,rgba(var(--hp),0) 50%,rgba(var(--hp),.75));print-color-adjust:exact}}
.merge{{display:block;font-size:.875rem;margin:0 0 .4rem;cursor:pointer}}
@media(max-width:600px){{.heat .pair{{grid-template-columns:1fr}}.heat .pair .cell:nth-of-type(odd):not(:first-of-type){{margin-top:.5rem}}
.heat .pair .cell:nth-of-type(even),.heat .pair h3:nth-of-type(even){{border-left:3px solid var(--he);padding-left:.5rem}}}}
@media(hover:none){{.heat .t[title]:hover::after{{content:attr(title);background:var(--hi);color:var(--hc);border-radius:3px;
padding:0 .35em;margin:0 .2em;font-size:.8em}}}}
"""


