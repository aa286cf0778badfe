"""A comparison as one HTML file: curves over each other, no script, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from rnow.comparing.compared import Comparison
from rnow.comparing.evaluations import Measured
from rnow.comparing.runs import Course, thinned
from rnow.config.overrides import show
from rnow.display.terminal import escape_control, format_number
from rnow.training.intervals import HOW, Interval

POINTS = 300
"""At most so many points of a curve."""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 220, 56, 24, 10
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Told apart by colour-blind readers too (Okabe and Ito 2008); past the last they come again, dashed."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --faint: #8888; --rule: #8884; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --paper: #16171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       margin: 0 auto; max-width: 1240px; padding: 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
svg .rule { stroke: var(--rule); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td { overflow-wrap: anywhere; } .faint { opacity: .7; }
"""


def render(found: Comparison) -> str:
    """The whole page."""
    title = f"rnow: {', '.join(run.label for run in found.runs)}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        "<h1>Runs side by side</h1>",
        _legend(found),
        "<h2>Over the steps</h2>",
        '<div class="charts">',
        *(_chart(found, name, courses) for name, courses in found.courses.items()),
        "</div>",
        "<h2>First, last and best</h2>",
        '<p class="faint">First and last are means over a tenth of the steps.</p>',
        _table(("metric", "run", "first", "last", "best (step)"), _course_rows(found)),
    ]
    labels = [run.label for run in found.runs]
    if found.measured:
        parts += [
            "<h2>Evaluations</h2>",
            f'<p class="faint">{_text(HOW)}.</p>',
            _table(("evaluation", *labels), _measured_rows(found)),
        ]
    parts.append("<h2>Differing settings</h2>")
    rows = [[key, *map(show, values)] for key, values in found.settings.items()]
    parts.append(_table(("key", *labels), rows) if rows else "<p>The configs are the same.</p>")
    if found.contents:
        parts.append(f"<p>Other contents: {_text(', '.join(found.contents))}.</p>")
    return "\n".join([*parts, "</body></html>", ""])


def _legend(found: Comparison) -> str:
    items = (
        f'<li><svg width="28" height="10" style="width:28px" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="28" y2="5" {_stroke(place)}/></svg> '
        f"{_text(run.label)}, {run.steps} steps</li>"
        for place, run in enumerate(found.runs)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _chart(found: Comparison, name: str, courses: Sequence[Course | None]) -> str:
    """The curves of one metric over each other, as an SVG; steps go right."""
    values = [value for one in courses if one for value in one.values]
    low, high = min(values), max(values)
    span, count = (high - low) or 1.0, max(1, min(POINTS, found.end))

    def across(place: float) -> float:
        return LEFT + (place + 0.5) / count * (WIDTH - LEFT)

    def up(value: float) -> float:
        share = (value - low) / span if high > low else 0.5
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    lines = []
    for place, (run, one) in enumerate(zip(found.runs, courses, strict=True)):
        if one is None:
            continue
        points = [
            (across(x), up(y))
            for x, y in enumerate(thinned(one, end=found.end, count=count))
            if math.isfinite(y)
        ]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        mark = points[-1]
        lines.append(
            f'<g {_stroke(place)} fill="none"><title>{_text(run.label)}</title><polyline points="{drawn}"/>'
            f'<circle cx="{mark[0]:.1f}" cy="{mark[1]:.1f}" r="2"/></g>'
        )
    ticks = [
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{format_number(value)}</text>'
        for value in dict.fromkeys((low, (low + high) / 2, high))
    ]
    ends = (
        f'<text x="{LEFT}" y="{HEIGHT - 6}">step 1</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">{found.end}</text>'
    )
    return (
        f"<figure><figcaption>{_text(name)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(name)} over the steps">'
        f"{''.join(ticks)}{ends}{''.join(lines)}</svg></figure>"
    )


def _stroke(place: int) -> str:
    dashes = ' stroke-dasharray="6 4"' if place // len(COLOURS) % 2 else ""
    return f'stroke="{COLOURS[place % len(COLOURS)]}" stroke-width="1.8"{dashes}'


def _course_rows(found: Comparison) -> Iterator[list[str]]:
    for name, courses in found.courses.items():
        for run, one in zip(found.runs, courses, strict=True):
            if one is not None:
                best = "" if one.best is None else f"{format_number(one.best[1])} ({one.best[0]})"
                yield [name, run.label, format_number(one.first), format_number(one.last), best]


def _measured_rows(found: Comparison) -> Iterator[list[str]]:
    for name, row in found.measured.items():
        yield [name, *map(_measured, row)]
        differences = found.differences(name)
        if any(differences):
            yield [f"minus {found.runs[0].label}", "", *map(_difference, differences)]


def _measured(one: Measured | None) -> str:
    if one is None:
        return "-"
    interval = one.interval
    bounds = "" if interval is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{format_number(one.value)}{bounds}"


def _difference(value: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _table(head: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    heads = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    lines = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    """Text from anywhere, inert: markup and bidirectional overrides are letters."""
    return escape(escape_control(text))
