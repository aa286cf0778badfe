"""The page of a run: what is in it, that nothing in it acts, and that it is small."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.runs import (
    CONFIG,
    data_of,
    make_run,
    metrics_row,
    rollout_row,
    write_lines,
    write_transcript,
)

from rnow.disk.folder import RunFolder
from rnow.report.build import build_report, has_something, write_report
from rnow.report.page import ASSETS
from rnow.report.statistics import spread

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>[/red]\x1b[31m\u202e\u2066<|im_end|>{{ 7*7 }}"


class Elements(HTMLParser):
    """Tags of a page with their attributes, and the text of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            tag, text = self.raw[-1]
            self.raw[-1] = (tag, text + data)


def hostile_run(path: Path) -> RunFolder:
    folder = make_run(path, config=CONFIG | {"project_name": HOSTILE, "model": {"path": HOSTILE}})
    row = rollout_row(
        1,
        0,
        tokens=[HOSTILE, "b", HOSTILE],
        messages=[{"role": HOSTILE, "content": HOSTILE}],
        answer=[{"role": "assistant"}, {"role": "tool", "name": HOSTILE, "content": HOSTILE}],
        error=HOSTILE,
        rewards={HOSTILE: 1.0},
        reward_errors={HOSTILE: HOSTILE},
        status=HOSTILE,
        dataset=HOSTILE,
        id=HOSTILE,
        prompt_id=HOSTILE,
        teacher=HOSTILE,
    )
    write_transcript(folder.transcripts, 1, [row])
    write_lines(folder.metrics, [metrics_row(1, 1, **{f"reward/{HOSTILE}": 1.0})])
    rows = [{"name": HOSTILE, "step": 0, HOSTILE: 1.0, "settings": HOSTILE}]
    write_lines(folder.evaluations, rows)
    return folder


def test_all_of_a_run_is_in_it(tmp_path: Path) -> None:
    page = build_report(make_run(tmp_path / "tiny"))
    data = data_of(page)
    assert data["name"] == "tiny"
    assert data["state"] == "finished after 4 steps"
    assert data["steps"] == [1, 2, 3, 4]
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[:3] == ["KL to the teacher", "Loss", "Reward"]
    assert {"Entropy of the student", "Length of an answer", "How answers end", "Time of a step", "Speed"} <= set(titles)  # fmt: skip
    assert [chart["title"] for chart in data["places"]] == [
        "KL by place in the answer",
        "Entropy by place in the answer",
    ]
    assert {row["text"] for row in data["tokens"]} == {"a", "b", "c"}
    assert len(data["rollouts"]) == 16
    assert len(data["pairs"]) == 4
    assert data["evaluation"]["columns"][0]["name"] == "before"
    assert data["heldOut"]
    assert data["settings"]["keys"]
    assert data["tiles"][0] == ["KL to the teacher, nats per token", "0.100", "0.775 in the first steps"]  # fmt: skip


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    elements = Elements(build_report(make_run(tmp_path / "tiny")).decode())
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base"), tag
        assert not {"src", "srcset", "style", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    policy = policy_of(elements)
    assert policy["default-src"] == ["'none'"]
    assert "unsafe" not in str(policy)


def policy_of(elements: Elements) -> dict[str, list[str]]:
    (text,) = [
        attributes["content"] or ""
        for tag, attributes in elements.found
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    return {words[0]: words[1:] for part in text.split(";") if (words := part.split())}


@pytest.mark.parametrize("hostile", [False, True])
def test_only_its_own_scripts_and_styles_may_act(tmp_path: Path, *, hostile: bool) -> None:
    folder = hostile_run(tmp_path / "p") if hostile else make_run(tmp_path / "p")
    elements = Elements(build_report(folder).decode())
    policy = policy_of(elements)
    kinds = [attributes.get("type") for tag, attributes in elements.found if tag == "script"]
    assert kinds == ["application/json", None, None, None]
    for tag, allowed in (("script", "script-src"), ("style", "style-src")):
        texts = [text for kind, text in elements.raw if kind == tag]
        acting = texts[1:] if tag == "script" else texts
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in acting]
        assert policy[allowed] == [f"'sha256-{digest}'" for digest in digests]
    for path in (*ASSETS.glob("*.js"), *ASSETS.glob("*.css")):
        assert not re.search(r"</(script|style)", path.read_text(), re.IGNORECASE), path.name


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = hostile_run(tmp_path / "p")
    page = build_report(folder)
    start = page.index(b'id="data">')
    embedded = page[start : page.index(b"</script>", start)].decode("ascii")
    assert not set("<&\x1b\u202e") & set(embedded[len('id="data">') :])
    data = data_of(page)
    shown = data["texts"][0]
    # What was there is still to be seen, what would act is written out.
    assert "</script><script>alert(1)</script>" in json.dumps(data["prompts"])
    assert "\\x1b[31m\\u202e" in data["prompts"][0][0][1]
    assert "\x1b" not in shown
    assert data["rollouts"][0]["i"].startswith("</script>")


def test_the_name_of_the_folder_is_text_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>&\u202e'name")
    page = build_report(folder).decode()
    assert "<title>&lt;b&gt;&amp;\\u202e&#39;name - rnow report</title>" in page
    assert "<b>" not in page[: page.index("<style>")]


def test_rows_learned_without_answers(tmp_path: Path) -> None:
    """A run of sft has its loss and no empty chart."""
    folder = RunFolder(tmp_path / "sft")
    write_lines(folder.metrics, [{"step": s, "loss": 2.0 / s, "lr": 0.1} for s in (1, 2, 3)])
    folder.facts.write_text(json.dumps({"config": {"dataset_type": "sft", "model": {"path": "s"}}}))
    data = data_of(build_report(folder))
    assert [chart["title"] for chart in data["charts"]] == ["Loss"]
    assert data["rollouts"] == data["pairs"] == data["tokens"] == data["places"] == []
    assert data["evaluation"] is None
    assert data["state"] == "after step 3; not finished"
    assert data["tiles"][0][0] == "loss"


def test_rewards_learned_without_a_teacher(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "rl")
    write_lines(folder.metrics, [{"step": s, "loss": 0.1, "reward/mean": s / 4} for s in (1, 2)])
    shutil.rmtree(folder.transcripts)
    write_transcript(folder.transcripts, 1, [rollout_row(1, 0, kl=None, teacher=None)])
    data = data_of(build_report(folder))
    assert [chart["title"] for chart in data["charts"]] == ["Loss", "Reward"]
    assert data["tokens"] == []
    assert [chart["title"] for chart in data["places"]] == ["Entropy by place in the answer"]
    assert "kl" not in data["rollouts"][0]


@pytest.mark.parametrize("cut", ["metrics.jsonl", "evaluations.jsonl", "run.json", "summary.json"])
def test_a_folder_that_lost_something_still_has_a_page(tmp_path: Path, cut: str) -> None:
    folder = make_run(tmp_path / "tiny")
    path = folder.path / cut
    path.write_bytes(path.read_bytes()[:-3])
    assert data_of(build_report(folder))["rollouts"]
    path.unlink()
    assert data_of(build_report(folder))["rollouts"]


def test_a_config_that_only_the_yaml_file_has(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "tiny")
    folder.facts.unlink()
    folder.config.write_text("dataset_type: distill\nmodel: {path: a}\nteacher: {path: b}\n")
    keys = {item["key"] for item in data_of(build_report(folder))["settings"]["keys"]}
    assert keys == {"dataset_type", "model.path", "teacher.path"}


def test_there_must_be_something(tmp_path: Path) -> None:
    assert not has_something(RunFolder(tmp_path))
    assert has_something(make_run(tmp_path / "tiny"))


def test_it_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "tiny")
    path = write_report(folder)
    assert path == folder.report
    before = path.read_bytes()

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rnow.disk.files.write_synced", full)
    with pytest.raises(OSError, match="No space"):
        write_report(folder)
    assert path.read_bytes() == before
    assert not list(folder.path.glob(".report*"))


def test_200_steps_take_less_than_5_mb(tmp_path: Path) -> None:
    """Sixteen rollouts a step of 200 tokens each, over a vocabulary of words of other scripts."""
    folder = make_run(tmp_path / "long", steps=200, prompts=1)
    words = [f"\u4e2d{number}" for number in range(3000)]
    for step in spread(range(1, 201), 40):
        rows = [
            rollout_row(
                step,
                16 * step + at,
                tokens=[words[(step * 31 + at * 7 + place * 13) % 3000] for place in range(200)],
                kl=[(place * 37 % 100) / 50 for place in range(200)],
            )
            for at in range(16)
        ]
        write_transcript(folder.transcripts, step, rows)
    page = build_report(folder)
    assert 1e6 < len(page) < 5e6
    data = data_of(page)
    assert len({packed["s"] for packed in data["rollouts"]}) == 40


def test_2000_steps_are_thinned_and_not_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "long", steps=3)
    write_lines(folder.metrics, [metrics_row(step, 2000) for step in range(1, 2001)])
    first = folder.transcripts / "step-000001.parquet"
    for step in range(4, 2001):
        (folder.transcripts / f"step-{step:06d}.parquet").hardlink_to(first)
    began = time.process_time()
    data = data_of(build_report(folder))
    assert time.process_time() - began < 10
    assert data["width"] == 4
    assert len(data["steps"]) == 500
    assert data["lookedAt"]["steps"] == 40
    assert data["rule"].startswith("160 of 160 rollouts; from 40 of 2,000 steps")
