"""Go's own text/template, where Go is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

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


@cache
def _program() -> Path:
    """Built once."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed")
    place = Path(tempfile.mkdtemp(prefix="rnow-go-"))
    (place / "main.go").write_text(PROGRAM)
    done = subprocess.run(
        [go, "build", "-o", "program", "main.go"],
        cwd=place,
        env=os.environ | {"GOCACHE": str(place / "cache"), "GO111MODULE": "off"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place / "cache", ignore_errors=True)
    return place / "program"


def go_executes(templates: list[str], data: dict[str, Any]) -> list[dict[str, str]]:
    """What Go's own package makes of them: ``text``, or the ``error``."""
    done = subprocess.run(
        [str(_program())],
        input=json.dumps({"Templates": templates, "Data": data}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)
