"""Go's own text/template, where Go is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
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
