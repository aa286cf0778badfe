"""Data and a template put together to one HTML file that needs nothing else and may do nothing else: of a run, or of several."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rnow.report.text import to_script

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uplot.css", "report.css")
SCRIPTS = ("uplot.js", "page.js")
"""Before the script of the page's own kind."""

NOTICE = "uplot.LICENSE"


def render(
    data: Mapping[str, object], *, title: str, kind: Literal["report", "compare"] = "report"
) -> bytes:
    """The page. ``data`` is what its script reads; ``title`` is text, safe already; ``kind`` names its template and its script.

    Nothing but the styles and scripts of this package runs in it, each known by its hash, and it can reach no network: whatever
    texts of models are in ``data``, they stay texts.
    """
    style = "\n".join(_asset(name) for name in STYLES)
    scripts = [_asset(name) for name in (*SCRIPTS, f"{kind}.js")]
    policy = (
        "default-src 'none'; "
        f"style-src {_hash(style)}; script-src {' '.join(map(_hash, scripts))}; "
        "base-uri 'none'; form-action 'none'"
    )
    html = (
        _environment()
        .get_template(f"{kind}.html")
        .render(
            title=title,
            kind=kind,
            policy=policy,
            notice=_asset(NOTICE),
            style=Markup(style),
            scripts=[Markup(script) for script in scripts],
            data=Markup(to_script(data)),
        )
    )
    return html.encode()


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
