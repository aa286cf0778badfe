"""``rnow eval`` on a tiny project: every kind of subject, what is kept and read back, and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.setup.projects import Project, read_jsonl

from rnow.disk.folder import RunFolder
from rnow.errors import EXIT_INTERRUPTED, InputError, RnowError, StopRequested
from rnow.setup import answering
from rnow.setup import evaluate as evaluate_module
from rnow.setup.build import run
from rnow.setup.eval_report import EvalReport, Evaluated
from rnow.setup.evaluate import Asked, evaluate, hosted_temperatures

MakeModel = Callable[..., Path]
REWARDS = '''
from rnow.core import get_response, reward

@reward
def even(args, messages):
    """About half of the answers of any model."""
    return float(sum(map(ord, get_response(messages))) % 2 == 0)
'''
SECTIONS: dict[str, Any] = {
    "trainer": {"max_steps": 2, "learning_rate": 0.3, "save_step": 1},
    "data": {"val_split": 0.25},
    "evaluation": {"teacher": False, "num_samples": 4},
}
QUICK = Asked(temperatures={1: 1.0, 4: 1.0})
"""One sampling, as a run's own evaluations have it."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel) -> Project:
    """A project with a finished run of two steps, each saved."""
    torch.set_num_threads(1)
    project = make_project(tmp_path_factory.mktemp("evaluated") / "project", tiny_model_dir)
    run(project.config(**SECTIONS), folder=project.folder)
    return project


def make_project(folder: Path, tiny_model_dir: MakeModel) -> Project:
    project = Project(folder, tiny_model_dir)
    (folder / "rewards.py").write_text(REWARDS)
    rows = read_jsonl(folder / "train.jsonl")
    project.write_rows([row | {"rewards": ["even"]} for row in rows])
    return project


@pytest.fixture
def project(trained: Project) -> Iterator[Project]:
    """The same; what a test measures goes with it."""
    yield trained
    for folder in (trained.folder / "evals", trained.run_dir / "evals"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(answering, "load_model", load)


def evaluated(project: Project, *subjects: str, asked: Asked = QUICK, **options: Any) -> EvalReport:
    sections = SECTIONS | options.pop("sections", {})
    console = options.pop("console", None) or Console(file=io.StringIO(), width=200)
    config = project.config(**sections)
    return evaluate(
        config, subjects, folder=project.folder, asked=asked, console=console, **options
    )


def answers(row: Evaluated, temperature: float = 1.0) -> list[dict[str, Any]]:
    return read_jsonl(row.kept.with_name(f"{row.kept.stem}-t{temperature:g}.jsonl"))


def texts(row: Evaluated) -> list[str]:
    return [answer["answer"][-1]["content"] for answer in answers(row)]


# ---- what is measured ----------------------------------------------------------------------------------------------


def test_every_kind_of_subject_in_one_table(project: Project, tmp_path: Path) -> None:
    copied = tmp_path / "somewhere" / "adapter"
    shutil.copytree(project.run_dir / "adapter", copied)
    last = str(project.run_dir / "checkpoints/step-000002")
    names = ["student", "base", "teacher", "tiny", "tiny@1", "runs/tiny/adapter", last, str(copied)]
    report = evaluated(project, *names)
    assert [row.subject.name for row in report.rows] == names
    student, base, teacher, last_step, first_step, adapter, checkpoint, elsewhere = report.rows
    said = {row.subject.name: texts(row) for row in report.rows}
    assert said["student"] == said["base"]
    for name in ("runs/tiny/adapter", last, str(copied)):
        assert said[name] == said["tiny"], name
    different = [said[name] for name in ("student", "teacher", "tiny", "tiny@1")]
    assert all(one != other for one, other in itertools.combinations(different, 2))

    own, of_run = project.folder / "evals", project.run_dir / "evals"
    for row, place, label in (
        (student, own, "student"),
        (base, own, "base"),
        (teacher, own, "teacher"),
        (last_step, of_run, "step-000002"),
        (first_step, of_run, "step-000001"),
        (elsewhere, own, "adapter-somewhere-adapter"),
    ):
        assert row.kept.parent.resolve() == place.resolve()
        assert row.kept.name.startswith(f"{label}-")
    assert last_step.kept.resolve() == adapter.kept.resolve() == checkpoint.kept.resolve()
    assert len([*of_run.glob("*.json")]) == 2, "one file for the run, its adapter and its last step"
    assert [row.subject.trained and row.subject.trained.step for row in report.rows] == [
        None, None, None, 2, 1, 2, 2, None,
    ]  # fmt: skip


def test_pass_at_k_is_that_of_the_answers_that_are_kept(project: Project) -> None:
    report = evaluated(project, "tiny", asked=Asked())
    (row,) = report.rows
    assert row.temperatures == {1: 0.2, 4: 0.6, 8: 0.8}
    for k, temperature in row.temperatures.items():
        marks: dict[str, list[bool]] = {}
        for answer in answers(row, temperature):
            marks.setdefault(answer["prompt_id"], []).append(answer["reward"] >= 1)
        assert {len(found) for found in marks.values()} == {max(4, k)}
        for prompt, found in marks.items():
            subsets = [any(subset) for subset in itertools.combinations(found, k)]
            share = sum(subsets) / len(subsets)
            assert row.pass_at[k][prompt] == pytest.approx(share)
    held_out = {answer["prompt_id"] for answer in answers(row, 0.2)}
    assert report.count == len(held_out) == 4
    assert row.length is not None
    assert 0 < row.length <= 6


def test_it_measures_what_the_run_measured(project: Project) -> None:
    """At the run's temperature: the same prompts, seeds, tools, rewards and samplers, so the same numbers."""
    report = evaluated(project, "student", "tiny")
    rows = {row["name"]: row for row in project.evaluations}
    for row, name in zip(report.rows, ("before", "after"), strict=True):
        (sampling,) = row.values["samplings"]
        measured = {key: value for key, value in rows[name].items() if key in sampling["metrics"]}
        assert {"pass@1", "pass@4", "reward/mean", "completions/mean_length"} <= measured.keys()
        assert {key: sampling["metrics"][key] for key in measured} == measured
        kept = read_jsonl(project.run_dir / "answers" / f"{name}.jsonl")
        assert texts(row) == [answer["answer"][-1]["content"] for answer in kept]


def test_differences_are_paired(project: Project) -> None:
    report = evaluated(project, "student", "tiny", asked=replace(QUICK, most=3))
    student, tiny = report.rows
    assert report.count == len(student.pass_at[1]) == 3
    (difference,) = report.differences()
    for k, found in difference.items():
        gaps = [tiny.pass_at[k][key] - student.pass_at[k][key] for key in student.pass_at[k]]
        assert found.mean == pytest.approx(sum(gaps) / len(gaps))
        assert found.low <= found.mean <= found.high
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["subjects"][1]["pass"]["pass@4"]["temperature"] == 1.0
    (row,) = plain["differences"]
    assert (row["subject"], row["minus"]) == ("tiny", "student")
    assert row["pass"]["pass@1"]["mean"] == pytest.approx(difference[1].mean)


def test_by_itself_it_compares_the_project_s_run_with_its_beginning(project: Project) -> None:
    assert [row.subject.name for row in evaluated(project).rows] == ["student", "tiny"]
    other = {"model": {"name": "not-trained"}}
    begun = project.folder / "runs" / "not-trained"
    (begun / "checkpoints" / ".tmp-1-9").mkdir(parents=True)  # a run is in its first steps
    assert [row.subject.name for row in evaluated(project, sections=other).rows] == ["student"]
    shutil.rmtree(begun)


def test_the_seed_decides_and_leaves_the_prompts(project: Project) -> None:
    first = evaluated(project, "tiny").rows[0]
    said = texts(first)
    again = evaluated(project, "tiny", asked=Asked(temperatures={1: 1.0, 4: 1.0}, again=True))
    assert texts(again.rows[0]) == said
    assert again.rows[0].values == first.values
    other = evaluated(project, "tiny", asked=Asked(temperatures={1: 1.0, 4: 1.0}, seed=7)).rows[0]
    assert other.kept != first.kept
    assert texts(other) != said
    assert other.pass_at[1].keys() == first.pass_at[1].keys()


def test_temperatures_of_any_k() -> None:
    assert hosted_temperatures((1, 4, 8)) == {1: 0.2, 4: 0.6, 8: 0.8}
    assert hosted_temperatures((2, 16)) == {2: 0.2, 16: 0.8}


# ---- what is kept --------------------------------------------------------------------------------------------------


def test_it_is_read_back_until_something_changes(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(project, "student", "tiny", "teacher")
    assert all(row.fresh for row in first.rows)
    with monkeypatch.context() as patch:
        patch.setattr(answering, "load_model", lambda *a, **o: pytest.fail("a model was loaded"))
        second = evaluated(project, "tiny", "student", "teacher", "tiny@2")
        assert not any(row.fresh for row in second.rows)
        assert second.rows[0].values == first.rows[1].values
    assert evaluated(project, "tiny", asked=Asked(temperatures={1: 0.5})).rows[0].fresh
    assert evaluated(project, "tiny", sections={"rollout": {"max_tokens": 5}}).rows[0].fresh
    fresh = Asked(temperatures={1: 1.0, 4: 1.0}, again=True)
    assert evaluated(project, "tiny", asked=fresh).rows[0].fresh
    rewards = project.folder / "rewards.py"
    text = rewards.read_text()
    try:
        rewards.write_text(text.replace("== 0", "== 1"))
        changed = evaluated(project, "tiny").rows[0]
    finally:
        rewards.write_text(text)
    assert changed.fresh
    for key, value in changed.pass_at[1].items():
        assert value == pytest.approx(1 - first.rows[1].pass_at[1][key])
    assert not evaluated(project, "tiny").rows[0].fresh, "it is as it was"


def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], None]) -> None:
    """Something happens once a student is loaded; it is given how many were loaded before."""
    real, loaded = evaluate_module.student_answers, itertools.count()

    @asynccontextmanager
    async def answers(*arguments: Any) -> AsyncIterator[Any]:
        async with real(*arguments) as found:
            happens(next(loaded))
            yield found

    monkeypatch.setattr(evaluate_module, "student_answers", answers)


def test_what_is_edited_while_it_is_measured_with_is_not_kept(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = project.folder / "rewards.py"
    text = rewards.read_text()
    meanwhile(monkeypatch, lambda before: rewards.write_text(text.replace("== 0", "== 1")) and None)
    try:
        with pytest.raises(RnowError, match="changed meanwhile: rewards_hash") as caught:
            evaluated(project, "student")
    finally:
        rewards.write_text(text)
    assert caught.value.fix == "run the same command again"
    assert [*(project.folder / "evals").glob("*.json")] == []


def test_files_that_go_while_others_are_measured(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that training no longer keeps, and what was measured a moment ago."""
    step, aside = project.run_dir / "checkpoints" / "step-000001", project.folder / "aside"

    def go(before: int) -> None:
        if before:
            step.rename(aside)
            shutil.rmtree(project.folder / "evals")

    meanwhile(monkeypatch, go)
    try:
        student, first_step = evaluated(project, "student", "tiny@1").rows
    finally:
        aside.rename(step)
    assert len(student.pass_at[1]) == 4
    assert first_step.kept.is_file()
    assert not evaluated(project, "tiny@1").rows[0].fresh


def test_a_vllm_has_a_folder_of_its_process_alone(tmp_path: Path) -> None:
    """Its logs stay where something failed."""
    own = tmp_path / f"vllm-{os.getpid()}"

    def use(parts: int) -> None:
        with answering.private_folder(RunFolder(tmp_path)) as found:
            found.path.mkdir()
            assert found.path == own
            assert 1 / parts

    use(1)
    assert not own.exists()
    with pytest.raises(ZeroDivisionError):
        use(0)
    assert own.exists()


@pytest.mark.usefixtures("project")
def test_a_damaged_file_is_measured_again(project: Project) -> None:
    (row,) = evaluated(project, "student").rows
    row.kept.write_bytes(row.kept.read_bytes()[:100])
    assert evaluated(project, "student").rows[0].fresh


def test_prompts_of_a_file(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"owl {n}"}], "rewards": ["even"]}
        for n in range(3)
    ]
    plain = {"messages": [{"role": "user", "content": "who judges this?"}]}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, plain]))
    console = Console(file=io.StringIO(), width=200)
    asked = Asked(temperatures={1: 1.0}, prompts=file)
    report = evaluated(project, "student", "tiny", asked=asked, console=console)
    assert (report.prompts, report.count) == ("3 prompts of test.jsonl", 3)
    assert {answer["messages"][0]["content"] for answer in answers(report.rows[1])} == {
        "owl 0", "owl 1", "owl 2",
    }  # fmt: skip
    output = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert output.count("1 of 4 prompts name no reward and are left out") == 1
    first = Asked(temperatures={1: 1.0}, prompts=file, most=2)
    assert evaluated(project, "student", asked=first).count == 2
    # Nothing was held out, and a run that saw all of train.jsonl can still be asked these.
    report = evaluated(project, "student", asked=asked, sections={"data": {"val_split": 0.0}})
    assert report.count == 3


def test_the_base_of_a_student_that_goes_on_from_an_adapter(project: Project) -> None:
    """Whatever else is prepared before it."""
    bare = texts(evaluated(project, "base").rows[0])
    goes_on = {"model": {"adapter": "runs/tiny"}}
    report = evaluated(project, "teacher", "base", "student", "tiny", sections=goes_on)
    _, base, student, run = report.rows
    assert texts(base) == bare
    assert texts(student) == texts(run) != bare


def test_rows_of_sft_are_asked_their_questions(tmp_path: Path, tiny_model_dir: MakeModel) -> None:
    project = make_project(tmp_path / "rows", tiny_model_dir)
    rows = read_jsonl(project.folder / "train.jsonl")
    given = {"role": "assistant", "content": "an answer"}
    project.write_rows([row | {"messages": [*row["messages"], given]} for row in rows])
    sections: dict[str, Any] = {"dataset_type": "sft", "teacher": None, "trainer": {"max_steps": 1}}
    run(project.config(**SECTIONS | sections), folder=project.folder)
    report = evaluated(project, sections=sections)
    assert [row.subject.name for row in report.rows] == ["student", "tiny"]
    assert report.prompts == "4 held-out prompts"
    for row in report.rows:
        asked = {tuple(m["role"] for m in answer["messages"]) for answer in answers(row)}
        assert asked == {("user",)}
    # Rewards judge them, and a run that learns from rows has nothing to do with these.
    (project.folder / "rewards.py").write_text(REWARDS + "\n")
    assert [row.fresh for row in evaluated(project, sections=sections).rows] == [True, True]
    assert [row.fresh for row in evaluated(project, sections=sections).rows] == [False, False]
    # A file of questions is asked as in any other project.
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(rows[0]) + "\n")
    asked_file = Asked(temperatures={1: 1.0}, prompts=file)
    assert evaluated(project, "tiny", asked=asked_file, sections=sections).count == 1


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_loads")
def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(
    project: Project, tmp_path: Path
) -> None:
    def refused(*subjects: str, asked: Asked = QUICK, **options: Any) -> InputError:
        with pytest.raises(InputError) as caught:
            evaluated(project, *subjects, asked=asked, **options)
        return caught.value

    error = refused("tinny")
    assert "no run and no adapter 'tinny'" in error.message
    assert error.fix == "rnow eval tiny"
    error = refused("tiny@7")
    assert error.message == "there is no checkpoint after step 7; there are 1, 2"
    assert error.fix == "rnow eval tiny@2"
    assert refused("tiny", step=7).fix == "rnow eval tiny@2"
    assert "--step is for one run" in refused("tiny", "student", step=1).message
    assert "has no steps" in refused("student", step=1).message
    error = refused("student", sections={"data": {"val_split": 0.0}})
    assert "no prompts are held out" in error.message
    assert "--prompts" in (error.fix or "")
    error = refused("tiny", sections={"data": {"val_split": 0.5}})
    assert "it was trained with data.val_split 0.25, and now it is 0.5" in (error.why or "")
    assert "seed 0" in (refused("tiny", sections={"seed": 1}).why or "")
    missing = Asked(prompts=tmp_path / "missing.jsonl")
    assert refused("tiny", asked=missing).where == "--prompts"
    rl = {"dataset_type": "rl", "teacher": None}
    assert "no teacher to evaluate" in refused("teacher", sections=rl).message
    own = {"teacher": {"path": "self", "system_prompt": "Be brief."}}
    assert refused("teacher", sections=own).fix == "evaluate it as `base`"


@pytest.mark.usefixtures("nothing_loads")
def test_texts_are_no_prompts(project: Project) -> None:
    with pytest.raises(InputError, match="they are no prompts") as caught:
        evaluated(project, "student", sections={"dataset_type": "midtrain", "teacher": None})
    assert "--prompts" in (caught.value.fix or "")


@pytest.mark.usefixtures("nothing_loads")
def test_a_run_of_another_project_is_refused(
    project: Project, tmp_path: Path, tiny_model_dir: MakeModel
) -> None:
    other = make_project(tmp_path / "other", tiny_model_dir)
    other.write_rows(read_jsonl(other.folder / "train.jsonl")[::-1])
    with pytest.raises(InputError, match="it may have been trained on them") as caught:
        evaluated(other, str(project.run_dir))
    assert caught.value.title == "Another project's run"
    assert "dataset_hash" in (caught.value.why or "")
    assert "--prompts" in (caught.value.fix or "")


@pytest.mark.usefixtures("nothing_loads")
def test_rows_without_rewards_say_what_to_do(tmp_path: Path, tiny_model_dir: MakeModel) -> None:
    bare = Project(tmp_path / "bare", tiny_model_dir, rewards=False)
    with pytest.raises(InputError, match="names a reward") as caught:
        evaluated(bare, "student")
    assert "rewards.py" in (caught.value.fix or "")


@pytest.mark.usefixtures("nothing_loads")
def test_a_run_without_a_checkpoint(project: Project) -> None:
    begun = project.folder / "runs" / "begun"
    begun.mkdir()
    try:
        shutil.copy(project.run_dir / "run.json", begun)
        with pytest.raises(InputError, match="has no adapter yet"):
            evaluated(project, "begun")
    finally:
        shutil.rmtree(begun)


def test_rewards_that_all_fail_are_no_pass_rate(tmp_path: Path, tiny_model_dir: MakeModel) -> None:
    broken = make_project(tmp_path / "broken", tiny_model_dir)
    (broken.folder / "rewards.py").write_text(REWARDS.replace("return", "return 1 / 0 +"))
    with pytest.raises(RnowError, match="every reward of every rollout failed") as caught:
        evaluated(broken, "student")
    assert "ZeroDivisionError" in str(caught.value)
    assert [*(broken.folder / "evals").glob("*.json*")] == []


# ---- stopping ------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_done(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluate_module.student_answers
    asked: list[int] = []

    def pressed(*arguments: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_module, "student_answers", pressed)
        with pytest.raises(StopRequested) as caught:
            evaluated(project, "student", "tiny")
    assert caught.value.exit_code == EXIT_INTERRUPTED
    assert "are kept" in (caught.value.why or "")
    assert [*(project.run_dir / "evals").glob("*")] == []
    student, tiny = evaluated(project, "student", "tiny").rows
    assert (student.fresh, tiny.fresh) == (False, True)
