"""The files of templates/on-distill-agent: what they say, the reward, the converter, and the tool in its host."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.web.site import serve

from rnow.config import load_config
from rnow.core import RewardArgs
from rnow.errors import InputError
from rnow.project.templates import find_template, plan_init, write_template
from rnow.text.install import install_command
from rnow.web.chromium import find_chromium, require_packages

FOLDER = Path(__file__).resolve().parents[2] / "templates" / "on-distill-agent"

# The columns of the dataset; the contents are ours.
ROWS = [
    {
        "prompt": "Which medicine did trial NCT00000000 compare with placebo? Output: INGREDIENT: name",
        "gold": "Examplinib",
        "task_name": "ingredient",
        "split": "MedBrowseComp_50",
    },
    {
        "prompt": "When did trial NCT00000001 start? Output: Start date: YYYY-MM",
        "gold": "2011-04",
        "task_name": "start_date",
        "split": "MedBrowseComp_50",
    },
    {
        "prompt": "What was the share price in $ of the maker on 1 March 2020? PRICE: x",
        "gold": "$1,234.50",
        "task_name": "stock",
        "split": "MedBrowseComp_50",
    },
]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"template_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert_dataset = _load("convert_dataset")
rewards = _load("rewards")


def encode(cell: str) -> str:
    """As the dataset's authors do."""
    return base64.b64encode("".join(chr(ord(c) + 3) for c in cell).encode()).decode()


def encoded(row: dict[str, str], *, names: bool) -> dict[str, str]:
    return {encode(name) if names else name: encode(value) for name, value in row.items()}


# -- the files


def test_the_config_says_what_was_promised() -> None:
    config = load_config(FOLDER).config
    assert config.dataset_type == "distill"
    assert config.model.path == "Qwen/Qwen3-8B"
    assert config.teacher is not None
    assert config.teacher.path == "Qwen/Qwen3-32B"
    assert (config.data.batch_size, config.data.group_size) == (4, 4)
    assert config.algorithm.kl_penalty_coef == 0.1
    assert config.rollout.max_turns == 10
    assert config.rollout.max_tokens == 4096
    assert config.rollout.termination_policy == "last_tool"


def test_every_row_uses_what_exists() -> None:
    rows = [json.loads(line) for line in (FOLDER / "train.jsonl").read_text().splitlines()]
    assert len(rows) >= 16
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["system", "user"]
        assert row["messages"][0]["content"] == convert_dataset.SYSTEM
        assert row["tools"] == ["browse"]
        assert row["rewards"] == ["answer_match"]
        assert row["metadata"]["answers"]
        assert row["metadata"]["source"].startswith("https://")
        for answer in row["metadata"]["answers"]:
            assert rewards.normalise(answer) not in rewards.normalise(row["messages"][1]["content"])
            assert _score(f"The answer is {answer}.", row["metadata"]["answers"]) == 1.0
        assert _score("I do not know.", row["metadata"]["answers"]) == 0.0


def test_the_tool_names_its_variables() -> None:
    """Only variables whose names stand in tools.py reach it, so each that .env.example offers has to."""
    source = (FOLDER / "tools.py").read_text()
    offered = re.findall(r"(RNOW_[A-Z_]+)=", (FOLDER / ".env.example").read_text())
    assert offered
    for name in offered:
        assert f'"{name}"' in source


def test_init_writes_every_file(tmp_path: Path) -> None:
    write_template(plan_init(find_template("on-distill-agent"), tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        ".env.example",
        "CLAUDE.md",
        "README.md",
        "config.yml",
        "convert_dataset.py",
        "requirements.txt",
        "rewards.py",
        "tools.py",
        "train.jsonl",
    }


def test_init_says_how_to_set_it_up() -> None:
    commands = find_template("on-distill-agent").setup_commands()
    assert commands == [
        install_command("agents"),
        "pip install -r requirements.txt",
        "crawl4ai-setup",
    ]
    assert find_template("distill").setup_commands() == []


# -- the reward


def _score(response: str, answers: list[str]) -> float:
    args = RewardArgs(metadata={"answers": answers})
    return rewards.answer_match(args, [{"role": "assistant", "content": response}])


@pytest.mark.parametrize(
    ("response", "answers", "score"),
    [
        ("It is Naloxone.", ["naloxone"], 1.0),
        ("naloxone-like", ["naloxone"], 1.0),
        ("naloxonelike", ["naloxone"], 0.0),
        ("H. pylori, found in 1982", ["Helicobacter pylori", "H. pylori"], 1.0),
        ("HER2/neu", ["HER2"], 1.0),
        ("The price was $1,234.50 then.", ["1234.5", "$1,234.50"], 1.0),
        ("In 11922", ["1922"], 0.0),
        ("Émile", ["emile"], 1.0),
        ("STRASSE", ["straße"], 1.0),
        ("<think>naloxone?</think>No idea.", ["naloxone"], 0.0),
        ("", ["naloxone"], 0.0),
        ("anything", [""], 0.0),
        ("anything", ["..."], 0.0),
        ("anything", [], 0.0),
    ],
)
def test_answer_match(response: str, answers: list[str], score: float) -> None:
    assert _score(response, answers) == score


_TEXT = st.text(st.characters(blacklist_characters="<>"), max_size=40)


@given(_TEXT, _TEXT)
def test_an_answer_is_found_where_it_stands_alone(before: str, answer: str) -> None:
    expected = float(bool(rewards.normalise(answer)))
    assert _score(f"{before} | {answer} |", [answer]) == expected


# -- the converter


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("encode_cells", [False, True])
def test_rows_of_the_dataset(encode_cells: bool, names: bool) -> None:
    source = [encoded(row, names=names) if encode_cells else row for row in ROWS]
    rows = convert_dataset.convert(source, "MedBrowseComp_50", None)
    assert len(rows) == 3
    for row, original in zip(rows, ROWS, strict=True):
        assert row["messages"][1] == {"role": "user", "content": original["prompt"]}
        assert row["tools"] == ["browse"]
        assert row["rewards"] == ["answer_match"]
        assert row["metadata"] == {
            "answers": [original["gold"]],
            "task": original["task_name"],
            "split": "MedBrowseComp_50",
        }


@given(st.text(st.characters(blacklist_categories=["C", "Z"]), min_size=1))
def test_decoding_undoes_the_encoding(text: str) -> None:
    assert convert_dataset.decode(encode(text)) == text


@pytest.mark.parametrize(
    "text", ["drug", "", "NCT00000000", "2011-04", "Aspirin", "gold", "a b", "===="]
)
def test_plain_cells_stay(text: str) -> None:
    row = {"prompt": "A question in plain words?", "gold": text, "task_name": text}
    assert convert_dataset.decode_row(row) == row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "gold": "a"}, "no column 'prompt'"),
        ({"prompt": "q", "answer": "a"}, "no question or no answer"),
        ({"prompt": "q", "gold": None}, "no question or no answer"),
        ({"prompt": " ", "gold": "a"}, "no question or no answer"),
    ],
)
def test_another_schema_is_an_error(row: dict[str, Any], message: str) -> None:
    with pytest.raises(convert_dataset.ConversionError, match=f"row 1 of split: .*{message}"):
        convert_dataset.convert([ROWS[0], row], "split", None)


class Terminal:
    """Standard input of somebody who types ``answer``; None: no terminal."""

    def __init__(self, answer: str | None) -> None:
        self._answer = answer

    def isatty(self) -> bool:
        return self._answer is not None

    def readline(self) -> str:
        assert self._answer is not None
        return self._answer + "\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The dataset is at hand, the folder is empty; gives the splits that were asked for."""
    asked: list[str] = []

    def load(split: str) -> list[dict[str, str]]:
        asked.append(split)
        return ROWS

    monkeypatch.setattr(convert_dataset, "load", load)
    monkeypatch.setattr(sys, "stdin", Terminal(None))
    monkeypatch.chdir(tmp_path)
    return asked


def _lines(path: str = "train.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "split", "count"),
    [
        ([], "MedBrowseComp_605", 3),
        (["--split", "50"], "MedBrowseComp_50", 3),
        (["--split", "MedBrowseComp_50"], "MedBrowseComp_50", 3),
        (["--split", "CUA", "--limit", "2"], "MedBrowseComp_CUA", 2),
        (["--limit", "100"], "MedBrowseComp_605", 3),
    ],
)
def test_converting(
    hub: list[str], options: list[str], split: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_dataset.main(options) == 0
    assert hub == [split]
    rows = _lines()
    assert len(rows) == count
    assert {row["metadata"]["split"] for row in rows} == {split}
    said = capsys.readouterr().err
    assert "test set" in said
    assert f"{count} questions written" in said
    assert [path.name for path in Path().iterdir()] == ["train.jsonl"]


def test_the_templates_own_rows_are_replaced_unasked(hub: list[str]) -> None:
    write_template(plan_init(find_template("on-distill-agent"), Path()))
    assert convert_dataset.main([]) == 0
    assert len(_lines()) == 3


def test_any_other_file_is_replaced_only_after_a_yes(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.jsonl").write_text("mine\n")
    assert convert_dataset.main([]) == 2
    assert "--yes" in capsys.readouterr().err
    for answer in ("", "no", "n", "yesterday"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert convert_dataset.main([]) == 2
    assert hub == []
    assert Path("train.jsonl").read_text() == "mine\n"
    assert convert_dataset.main(["--output", "other.jsonl"]) == 0
    assert len(_lines("other.jsonl")) == 3
    monkeypatch.setattr(sys, "stdin", Terminal("Yes"))
    assert convert_dataset.main([]) == 0
    assert len(_lines()) == 3
    Path("train.jsonl").write_text("mine\n")
    monkeypatch.setattr(sys, "stdin", Terminal(None))
    assert convert_dataset.main(["--yes"]) == 0
    assert len(_lines()) == 3


@pytest.mark.parametrize(
    ("fault", "next_thing"),
    [
        (OSError("offline"), "type the same again"),
        (convert_dataset.ConversionError("odd"), "not as expected"),
        (ImportError("datasets"), "install -r requirements.txt"),
    ],
)
def test_a_fault_leaves_the_old_file(
    hub: list[str],
    fault: Exception,
    next_thing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(split: str) -> Iterator[dict[str, str]]:
        yield ROWS[0]
        raise fault

    monkeypatch.setattr(convert_dataset, "load", load)
    Path("train.jsonl").write_text("mine\n")
    assert convert_dataset.main(["--yes"]) == 1
    assert Path("train.jsonl").read_text() == "mine\n"
    assert len(list(Path().iterdir())) == 1
    assert next_thing in capsys.readouterr().err


def test_a_limit_is_positive(hub: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        convert_dataset.main(["--limit", "0"])
    assert caught.value.code == 2


# -- the tool, in the process that runs it


def _missing() -> str | None:
    try:
        require_packages()
        find_chromium()
    except InputError as error:
        return error.message
    return None


@pytest.mark.agents
@pytest.mark.skipif(_missing() is not None, reason=str(_missing()))
def test_the_tool_browses_from_its_host(tmp_path: Path) -> None:
    from rnow.project.secrets import load_secrets
    from rnow.usercode.host import CodeHost

    write_template(plan_init(find_template("on-distill-agent"), tmp_path))
    with serve() as site:
        (tmp_path / ".env").write_text(f"RNOW_BROWSE_ALLOW={site.authority}\n")
        host = CodeHost(tmp_path / "tools.py", "tools", secrets=load_secrets(tmp_path))

        async def browse(url: str) -> Any:
            payload = {"arguments": {"url": url}, "metadata": {}, "variables": {}}
            return await host.call("browse", payload, timeout=60)

        async def scenario() -> None:
            outcomes = await asyncio.gather(*(browse(site.url("/script")) for _ in range(6)))
            assert [outcome.status for outcome in outcomes] == ["ok"] * 6
            assert all("naloxone" in outcome.value for outcome in outcomes)
            refused = await browse("http://169.254.169.254/latest/meta-data/")
            assert refused.status == "raised"
            assert "not on the public web" in refused.error
            again = await browse(site.url("/aspirin"))
            assert "acetylsalicylic" in again.value

        try:
            (info,) = host.functions
            assert info.name == "browse"
            asyncio.run(scenario())
        finally:
            host.close()
