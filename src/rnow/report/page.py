"""Data and a template put together to one HTML file that needs nothing else and may do nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rnow.report.text import to_script

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uplot.css", "report.css")
SCRIPTS = ("uplot.js", "report.js")
NOTICE = "uplot.LICENSE"


def render(data: Mapping[str, object], *, title: str) -> bytes:
    """The page. ``data`` is what its script reads; ``title`` is text, safe already.

    Nothing but the styles and scripts of this package runs in it, each known by its hash, and it can reach no network: whatever
    texts of models are in ``data``, they stay texts.
    """
    style = "\n".join(_asset(name) for name in STYLES)
    scripts = [_asset(name) for name in SCRIPTS]
    policy = (
        "default-src 'none'; "
        f"style-src {_hash(style)}; script-src {' '.join(map(_hash, scripts))}; "
        "base-uri 'none'; form-action 'none'"
    )
    html = (
        _environment()
        .get_template("report.html")
        .render(
            title=title,
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
