"""The part of Go's text/template that our Modelfiles use, held against Go itself where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

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


PROGRAM = """
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var asked struct {
		Templates []string
		Data      struct {
			Messages []*message
			System   string
			None     string
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	answers := []map[string]string{}
	for _, text := range asked.Templates {
		answer := map[string]string{}
		parsed, err := template.New("").Option("missingkey=zero").Parse(text)
		var out bytes.Buffer
		if err == nil {
			data := map[string]any{"Messages": asked.Data.Messages, "System": asked.Data.System, "None": asked.Data.None}
			err = parsed.Execute(&out, data)
		}
		if err != nil {
			answer["error"] = err.Error()
		} else {
			answer["text"] = out.String()
		}
		answers = append(answers, answer)
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}
"""


def go_executes(templates: list[str], data: dict[str, Any], place: Path) -> list[dict[str, str]]:
    """What Go's own package makes of them."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed")
    (place / "main.go").write_text(PROGRAM)
    done = subprocess.run(
        [go, "run", "main.go"],
        cwd=place,
        env={
            "PATH": str(Path(go).parent),
            "HOME": str(place),
            "GOFLAGS": "-mod=mod",
            "GO111MODULE": "off",
        },
        input=json.dumps({"Templates": templates, "Data": data}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_go_writes_the_same(tmp_path: Path) -> None:
    answers = go_executes([*TEMPLATES, *BROKEN], DATA, tmp_path)
    found = dict(zip([*TEMPLATES, *BROKEN], answers, strict=True))
    assert {t: found[t].get("text") for t in TEMPLATES} == TEMPLATES
    assert all("error" in found[template] for template in BROKEN)
