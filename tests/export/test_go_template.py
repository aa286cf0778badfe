"""The part of Go's text/template that our Modelfiles use, held against Go itself where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
from tests.export.go import go_executes

from rnow.export.go_template import TemplateError, parse

MESSAGES = [
    {"Role": "system", "Content": "Be <b>brief</b>."},
    {"Role": "user", "Content": '{{ .System }} & "quotes"\n'},
    {"Role": "assistant", "Content": ""},
]
DATA: dict[str, Any] = {"Messages": MESSAGES, "System": "Be brief.", "None": ""}

TEMPLATES = {
    "plain } text {": "plain } text {",
    "{{ .System }}": "Be brief.",
    '{{ "{{ \\"x\\" }}\\n" }}!': '{{ "x" }}\n!',
    "{{ range .Messages }}[{{ .Role }}]{{ end }}": "[system][user][assistant]",
    '{{ range .Messages }}{{ if eq .Role "user" "system" }}{{ .Content }}{{ else }}-{{ end }}{{ end }}': (
        'Be <b>brief</b>.{{ .System }} & "quotes"\n-'
    ),
    '{{ if .None }}a{{ else if not .System }}b{{ else if and .System (ne .System "x") }}c{{ else }}d{{ end }}': "c",
    '{{ if or .None "" }}a{{ else }}b{{ end }}': "b",
    '{{ $before := "" }}{{ range .Messages }}{{ if eq $before "" }}<{{ end }}{{ .Role }}{{ $before = .Role }}{{ end }}{{ $before }}': (
        "<systemuserassistantassistant"
    ),
    '{{ $x := "a" }}{{ if .System }}{{ $x := "b" }}{{ $x }}{{ end }}{{ $x }}': "ba",
    '{{ $x := "a" }}{{ if .System }}{{ $x = "b" }}{{ end }}{{ $x }}{{ $.System }}': "bBe brief.",
    "{{range .Messages}}{{.Content}}{{end}}": 'Be <b>brief</b>.{{ .System }} & "quotes"\n',
}
BROKEN = [
    "{{ if .System }}",
    "{{ end }}",
    "{{ if .System }}a{{ else }}b{{ else if .None }}c{{ end }}",
    "{{ .System",
    "{{ }}",
    '{{ eq "a" }}',
    "{{ (.System }}",
    "{{ $before = .System }}",
]
REFUSED = [
    "{{- .System }}",
    "{{ .System | json }}",
    "{{ len .System }}",
    "{{/* c */}}",
    "{{ .Missing }}",
]
"""Go takes these, and they are not understood here."""


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_written(template: str) -> None:
    assert parse(template).execute(DATA) == TEMPLATES[template]


@pytest.mark.parametrize("template", [*BROKEN, *REFUSED])
def test_what_is_not_understood_is_refused(template: str) -> None:
    with pytest.raises(TemplateError):
        parse(template).execute(DATA)


def test_go_writes_the_same() -> None:
    answers = go_executes([*TEMPLATES, *BROKEN], DATA)
    found = dict(zip([*TEMPLATES, *BROKEN], answers, strict=True))
    assert {t: found[t].get("text") for t in TEMPLATES} == TEMPLATES
    assert all("error" in found[template] for template in BROKEN)
