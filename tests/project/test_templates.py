"""`rnow init`'s copying: what is written, what is left alone, and what a template must hold."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.config import load_config
from rnow.config.json_schema import MADE_BY
from rnow.errors import InputError
from rnow.project import templates
from rnow.project.templates import (
    MODELINE,
    SCHEMA,
    Template,
    find_template,
    load_templates,
    plan_init,
    set_project_name,
    write_schema,
    write_template,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def template(tmp_path: Path) -> Template:
    folder = tmp_path / "template"
    (folder / "models").mkdir(parents=True)
    (folder / "__pycache__").mkdir()
    (folder / "config.yml").write_text("# A demo.\nproject_name: demo  # the name\nkey: 1\n")
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "models" / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "__pycache__" / "x.pyc").write_bytes(b"")
    return Template(name="demo", folder=folder, description="A demo.")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_into_an_empty_folder(template: Template, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "project"
    plan = plan_init(template, target)
    assert not target.exists()
    written = write_template(plan)
    assert [str(path) for path in written] == ["config.yml", "models/weights.bin", "train.jsonl"]
    expected = snapshot(template.folder)
    del expected["__pycache__/x.pyc"]
    assert snapshot(target) == expected


def test_existing_files_are_left_alone(template: Template, tmp_path: Path) -> None:
    target = tmp_path / "project"
    target.mkdir()
    (target / "config.yml").write_text("mine: 1\n")
    (target / "train.jsonl").write_text("{}\n")
    (target / "notes.txt").write_text("keep me")
    plan = plan_init(template, target)
    assert [str(path) for path in plan.conflicts] == ["config.yml"]
    assert [str(path) for path in plan.same] == ["train.jsonl"]
    write_template(plan, project_name="other")
    after = snapshot(target)
    assert after["config.yml"] == b"mine: 1\n"
    assert after["notes.txt"] == b"keep me"
    assert "models/weights.bin" in after


def test_chosen_files_are_overwritten_with_their_mode(template: Template, tmp_path: Path) -> None:
    target = tmp_path / "project"
    target.mkdir()
    config = target / "config.yml"
    config.write_text("mine: 1\n")
    config.chmod(0o640)
    write_template(plan_init(template, target), overwrite=[Path("config.yml")])
    assert config.read_bytes() == (template.folder / "config.yml").read_bytes()
    assert stat.S_IMODE(config.stat().st_mode) == 0o640


def test_a_dangling_link_is_a_conflict(template: Template, tmp_path: Path) -> None:
    target = tmp_path / "project"
    target.mkdir()
    (target / "config.yml").symlink_to(tmp_path / "elsewhere")
    plan = plan_init(template, target)
    assert [str(path) for path in plan.conflicts] == ["config.yml"]
    write_template(plan)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["models", "."])
def test_a_file_where_a_folder_is_needed(template: Template, tmp_path: Path, name: str) -> None:
    target = tmp_path / "project"
    blocked = target / name
    blocked.parent.mkdir(parents=True, exist_ok=True)
    if name == ".":
        target.write_text("a file")
    else:
        target.mkdir(exist_ok=True)
        blocked.write_text("a file")
    with pytest.raises(InputError, match="is a file where a folder is needed"):
        plan_init(template, target)


def test_a_folder_where_a_file_is_needed(template: Template, tmp_path: Path) -> None:
    (tmp_path / "project" / "config.yml").mkdir(parents=True)
    with pytest.raises(InputError, match="is a folder where a file is needed"):
        plan_init(template, tmp_path / "project")


def test_a_failed_write_is_an_input_error_without_leftovers(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "project"
    plan = plan_init(template, target)

    def refuse(self: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        write_template(plan)
    assert snapshot(target) == {}


def test_what_templates_share_is_copied_from_the_one_that_has_it(
    template: Template, tmp_path: Path
) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "config.yml").write_text("# Another.\n")
    (folder / "shared.txt").write_text("# from elsewhere\ntemplate/models\ntemplate/train.jsonl\n")
    second = Template(name="second", folder=folder, description="Another.")
    written = write_template(plan_init(second, tmp_path / "project"))
    assert [str(path) for path in written] == ["config.yml", "models/weights.bin", "train.jsonl"]
    assert snapshot(tmp_path / "project") == {
        "config.yml": b"# Another.\n",
        "models/weights.bin": bytes(range(256)),
        "train.jsonl": b"{}\n",
    }
    again = plan_init(second, tmp_path / "project")
    assert (again.new, again.conflicts, len(again.same)) == ((), (), 3)


@pytest.mark.parametrize("name", sorted(load_templates()))
def test_what_a_template_shares_is_there(name: str) -> None:
    missing = [source for source in find_template(name).files().values() if not source.is_file()]
    assert missing == []
    shared = ROOT / "templates" / name / "shared.txt"
    if shared.is_file():
        named = [line for line in shared.read_text().splitlines() if not line.startswith("#")]
        assert all((ROOT / "templates" / line).exists() for line in named)


def test_the_schema_is_renewed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    target = tmp_path / SCHEMA
    assert write_schema(tmp_path)
    assert json.loads(target.read_text())["$comment"] == MADE_BY
    assert not write_schema(tmp_path), "it is there"
    target.write_text(json.dumps({"$comment": MADE_BY, "of": "an earlier version"}))
    assert write_schema(tmp_path)
    target.unlink()
    os.mkfifo(target)  # would be waited on for ever
    assert not write_schema(tmp_path)
    target.unlink()
    target.symlink_to("nowhere")
    assert not write_schema(tmp_path)
    assert target.is_symlink()


def test_unknown_template_gets_a_suggestion() -> None:
    with pytest.raises(InputError) as caught:
        find_template("Distil")
    assert caught.value.fix == "use --template distill"
    with pytest.raises(InputError) as caught:
        find_template("xyz")
    assert "distill" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("before", "name", "after"),
    [
        ("project_name: old\nkey: 1\n", "new", "project_name: new\nkey: 1\n"),
        ("project_name: old  # why\n", "new", "project_name: new  # why\n"),
        ("project_name: 'a # b' # why\n", "new", "project_name: new # why\n"),
        ('project_name: "a\\"b"\n', "new", "project_name: new\n"),
        ("project_name:\nkey: 1\n", "new", "project_name: new\nkey: 1\n"),
        ("project_name: old name", "new", "project_name: new"),
        ("# top\n\nkey: 1\n", "new", "# top\n\nproject_name: new\nkey: 1\n"),
        ("data:\n  project_name: x\n", "new", "project_name: new\ndata:\n  project_name: x\n"),
        ("project_name: old\n", "no", 'project_name: "no"\n'),
        ("project_name: old\n", "2024", 'project_name: "2024"\n'),
        ("project_name: old\n", "a: b # c", 'project_name: "a: b # c"\n'),
        ("project_name: old\n", "back\\1slash", 'project_name: "back\\\\1slash"\n'),
        ("", "new", "project_name: new\n"),
    ],
)
def test_set_project_name(before: str, name: str, after: str) -> None:
    assert set_project_name(before, name) == after


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
def test_any_name_is_read_back_as_text(name: str) -> None:
    import yaml

    text = set_project_name("# c\nproject_name: old # keep\nkey: 1\n", name)
    assert yaml.safe_load(text) == {"project_name": name, "key": 1}
    assert "# keep" in text


@pytest.mark.parametrize("name", sorted(load_templates()))
def test_every_template_is_a_valid_project(name: str, tmp_path: Path) -> None:
    item = find_template(name)
    assert item.description.endswith((".", ")"))
    assert "$schema" not in item.description
    lines = (item.folder / "config.yml").read_text().splitlines()
    assert lines[:2] == [MODELINE, f"# {item.description}"]
    write_template(plan_init(item, tmp_path), project_name="my project")
    loaded = load_config(tmp_path)
    assert loaded.config.project_name == "my project"
    assert loaded.warnings == []
    # What a teacher has yet to answer is what its rows are made of.
    asked = tmp_path / "prompts.jsonl"
    file = asked if asked.is_file() else tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) >= max(16, loaded.config.data.batch_size)
    assert len({json.dumps(row.get("messages") or row["text"]) for row in rows}) == len(rows)


def test_the_checkout_has_both_templates() -> None:
    assert {"distill", "quickstart"} <= {path.name for path in (ROOT / "templates").iterdir()}
    assert templates.templates_folder() == ROOT / "templates"


@pytest.mark.slow
def test_the_wheel_carries_the_templates(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.startswith("rnow_local-")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    shipped = snapshot(unpacked / "rnow" / "_templates")
    sources = {
        name: content
        for name, content in snapshot(ROOT / "templates").items()
        if not {"__pycache__", "runs", "rollouts"}.intersection(Path(name).parts)
    }
    assert sources.items() <= shipped.items()
    listed = subprocess.run(
        [sys.executable, "-m", "rnow", "init", "--list"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "distill" in listed.stdout
    where = subprocess.run(
        [
            sys.executable,
            "-c",
            "from rnow.project.templates import templates_folder; print(templates_folder())",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()) == unpacked / "rnow" / "_templates"
