"""What a run shows, read back as text at several widths."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from rnow.display.display import Display, QuietDisplay, wants_live
from rnow.display.downloads import Download
from rnow.display.history import StepHistory, stage_seconds
from rnow.display.live_table import LiveTable, choose_columns
from rnow.display.plain_lines import PlainLines
from rnow.display.tables import headline, result_table

PLAN = [
    "student: models/student (0.21M parameters, LoRA rank 32)",
    "teacher: models/teacher (0.62M parameters)",
    "objective: on-policy distillation, sampled reverse KL, ppo",
    "device: CPU (2 cores), float32",
    "run: runs/quickstart",
]
CODE = [
    "    from peft import AutoPeftModelForCausalLM",
    '    model = AutoPeftModelForCausalLM.from_pretrained("runs/quickstart/adapter")',
]


class Clock:
    """A clock the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def step_metrics(step: int, **more: float) -> Mapping[str, float]:
    return {
        "teacher_kl": 0.4 * math.exp(-step / 80),
        "reward/mean": 0.5 + step / 1000,
        "throughput/completion_tokens_per_s": 2_800.0,
        "time/rollout": 0.20,
        "time/teacher": 0.02,
        "time/update": 0.08,
        "time/sync": 0.01,
        "entropy": 0.3,
        "completions/mean_length": 9.1,
    } | more


def recorder(width: int, **options: Any) -> Console:
    """A console like a colour terminal of ``width`` columns that writes to memory."""
    settings: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "height": 40}
    return Console(file=io.StringIO(), width=width, record=True, **(settings | options))


def written(console: Console) -> str:
    return console.export_text(clear=False)


def drive(display: Display, clock: Clock, *, steps: int, total: int, seconds: float = 0.3) -> None:
    for step in range(1, steps + 1):
        display.stage("rollout")
        clock.now += seconds
        display.step(step, total, step_metrics(step))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(request: pytest.FixtureRequest, clock: Clock) -> Iterator[tuple[LiveTable, Console]]:
    console = recorder(getattr(request, "param", 80))
    display = LiveTable(console, clock=clock)
    yield display, console
    display.close()


def picture(display: LiveTable, width: int, **options: Any) -> list[str]:
    console = recorder(width, **options)
    console.print(display.picture(width))
    return written(console).splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_every_line_fits_and_no_title_is_cut(width: int, clock: Clock) -> None:
    display = LiveTable(recorder(width), clock=clock)
    try:
        display.start(PLAN)
        drive(display, clock, steps=123, total=280)
        lines = picture(display, width)
    finally:
        display.close()
    assert max(cell_len(line.rstrip()) for line in lines) <= width
    assert not any("…" in line for line in lines)
    assert lines[1].split()[:2] == ["step", "teacher_kl"]


def test_columns_leave_in_order_of_importance(clock: Clock) -> None:
    history = StepHistory(clock)
    history.add(1, 280, step_metrics(1))

    def shown(width: int) -> list[str]:
        return [column.title for column in choose_columns(width, history)]

    everything = "step teacher_kl trend reward tok/s rollout teacher update other entropy length"
    assert shown(120) == everything.split()
    assert shown(80) == [
        "step",
        "teacher_kl",
        "trend",
        "reward",
        "tok/s",
        "rollout",
        "teacher",
        "update",
    ]
    assert shown(32) == ["step", "teacher_kl", "reward"]
    assert shown(5) == ["step"]


def test_reward_column_only_when_there_is_a_reward(clock: Clock) -> None:
    history = StepHistory(clock)
    history.add(1, 10, {"teacher_kl": 0.1})
    assert "reward" not in [column.title for column in choose_columns(120, history)]


ROW_METRICS = {"loss": 2.5, "entropy": 1.0, "time/batch": 0.1, "time/update": 2.0, "time/step": 2.2}


def test_a_run_that_learns_from_rows_shows_its_loss(clock: Clock) -> None:
    display = LiveTable(recorder(120), clock=clock)
    try:
        display.start(PLAN)
        for step in (1, 2):
            clock.now += 3
            display.step(step, 9, {**ROW_METRICS, "loss": 3.5 - step})
        shown = picture(display, 120)
    finally:
        display.close()
    assert shown[1].split() == ["step", "loss", "trend", "update", "other", "entropy"]
    assert shown[-3].split()[:2] == ["2/9", "1.500"]
    assert "teacher" not in "".join(shown)
    console = recorder(120)
    plain = PlainLines(console, clock=clock)
    plain.step(9, 9, ROW_METRICS)
    assert written(console).startswith("step 9/9  loss 2.500  update 2.00s")
    plain.evaluation("after", {"loss": 2.5, "perplexity": 12.18})
    assert "evaluation after:  loss 2.500  perplexity 12.2" in written(console)


def test_table_shows_the_newest_step_and_thins_fast_ones(
    live: tuple[LiveTable, Console], clock: Clock
) -> None:
    display, _ = live
    display.start(PLAN)
    drive(display, clock, steps=123, total=280)
    steps = [line.split()[0] for line in picture(display, 80) if "/280" in line]
    assert steps == [f"{n}/280" for n in (60, 70, 80, 90, 100, 110, 120, 123)]


def test_slow_steps_are_all_shown(live: tuple[LiveTable, Console], clock: Clock) -> None:
    display, _ = live
    display.start(PLAN)
    drive(display, clock, steps=5, total=20, seconds=30)
    lines = picture(display, 80)
    assert [line.split()[0] for line in lines if "/20" in line] == [f"{n}/20" for n in range(1, 6)]
    assert "ETA 7:30" in lines[-2]
    assert "25%" in lines[-2]
    assert "elapsed 2:30" in lines[-2]
    assert "rollout" in lines[-1]


def test_eta_does_not_count_loading(clock: Clock) -> None:
    display = LiveTable(recorder(80), clock=clock)
    history = StepHistory(clock)
    clock.now = 100
    history.restart_clock()
    clock.now = 101
    history.add(1, 11, {})
    assert history.seconds_left() == pytest.approx(10)
    display.close()


def test_eta_counts_steps_not_what_is_between_them(clock: Clock) -> None:
    history = StepHistory(clock)
    for step, seconds in ((1, 9.0), (2, 1.0), (3, 3.0)):
        clock.now += 100  # an evaluation
        history.add(step, 13, {"time/step": seconds})
    assert history.seconds_left() == pytest.approx(20)


def test_headline_metrics() -> None:
    results = {
        "reward/mean": 0.5,
        "tokens/total": 9.0,
        "teacher_kl": 0.1,
        "pass@4": 0.9,
        "pass@1": 0.5,
    }
    assert list(headline(results)) == ["pass@1", "pass@4", "teacher_kl"]
    assert list(headline({"tokens/total": 9.0, "reward/mean": 0.5})) == ["reward/mean"]
    assert headline({"mine": 1.0}) == {"mine": 1.0}


def test_missing_and_non_finite_metrics_are_drawn(
    live: tuple[LiveTable, Console], clock: Clock
) -> None:
    display, _ = live
    display.start([])
    display.step(1, 3, {"teacher_kl": math.nan, "time/rollout": math.inf})
    display.step(2, 3, {})
    display.step(3, 3, {"teacher_kl": math.inf, "reward/mean": -math.inf})
    text = "\n".join(picture(display, 80))
    assert "nan" in picture(display, 80)[3]
    assert "-inf" in text


def test_ascii_terminal_gets_ascii_only(clock: Clock) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=stream, width=80, force_terminal=True, color_system=None, height=40)
    display = LiveTable(console, clock=clock)
    display.start(PLAN)
    drive(display, clock, steps=30, total=30)
    display.note("a note")
    display.warn("a warning")
    display.evaluation("before", {"pass@1": 0.5})
    display.evaluation("after", {"pass@1": 0.9})
    display.finish(["adapter: x"])
    stream.flush()
    raw = stream.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert b"#####" in raw


@pytest.mark.parametrize("live", [80, 120], indirect=True)
def test_end_of_a_run(live: tuple[LiveTable, Console], clock: Clock) -> None:
    display, console = live
    display.start(PLAN)
    display.evaluation("before", {"pass@1": 0.541, "teacher_kl": 0.4132})
    display.evaluation("teacher", {"pass@1": 0.983})
    drive(display, clock, steps=4, total=4)
    display.evaluation("after", {"pass@1": 0.941, "teacher_kl": 0.0512})
    display.finish(["adapter: runs/quickstart/adapter", "", "Use it:", *CODE])
    text = written(console)
    lines = [line.rstrip() for line in text.splitlines()]
    assert "student    models/student (0.21M parameters, LoRA rank 32)" in text
    rows = [line.split() for line in lines[lines.index("") :] if "█" in line]
    assert [row[0] for row in rows if row[0] in ("before", "after", "teacher")] == [
        "before",
        "teacher",
        "after",
    ]
    assert lines[-2:] == CODE  # unframed, so that they can be copied
    assert "adapter     runs/quickstart/adapter" in lines


def test_the_end_of_a_run_breaks_no_word_and_no_path(clock: Clock) -> None:
    console = recorder(60)
    display = LiveTable(console, clock=clock)
    said = "held-out answers, 5 of 256 prompts, changed ones first; all are in runs/q/answers"
    path = "adapter: /home/someone/my projects/" + "deep/" * 12 + "adapter"
    display.finish([said, path, *CODE])
    lines = [line.strip() for line in written(console).splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("held-out"))
    assert " ".join(lines[at : at + 2]) == said
    assert max(map(len, lines[at : at + 2])) <= 60
    assert lines[at + 2].endswith(path.removeprefix("adapter: "))
    assert lines[-2:] == [line.strip() for line in CODE]


def test_bars_are_to_scale() -> None:
    console = recorder(120, color_system=None)
    console.print(result_table({"before": {"acc": 0.5}, "after": {"acc": 1.0}}, console))
    before, after = (line.count("█") for line in written(console).splitlines() if "█" in line)
    assert (before, after) == (12, 24)


def test_many_evaluations_keep_the_first_and_the_newest() -> None:
    console = recorder(80, color_system=None)
    results = {f"step {n}": {"acc": 0.5} for n in range(30)}
    console.print(result_table(results, console))
    shown = [line.split()[1] for line in written(console).splitlines() if line.startswith("step")]
    assert shown == ["0", "1", *map(str, range(22, 30))]


@pytest.mark.parametrize("form", [LiveTable, PlainLines])
def test_hostile_text_cannot_reach_the_terminal(form: type[Any], clock: Clock) -> None:
    console = recorder(80, color_system=None, legacy_windows=False)
    display = form(console, clock=clock)
    evil = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]"
    display.start([f"student: {evil}", evil])
    display.stage(evil)
    display.note(evil)
    display.warn(evil)
    display.evaluation(evil, {evil: 0.5})
    display.evaluation("after", {evil: 0.5})
    display.step(1, 1, {"teacher_kl": 0.1})
    display.finish([evil, f"    {evil}"])
    raw = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "\x1b[2J" not in raw.replace("\x1b[2K", "")
    assert "\x1b]0" not in raw
    assert "\x07" not in raw
    assert "[bold red]x[/]" in raw  # markup is text, too


def test_close_is_safe_at_any_time_and_gives_the_cursor_back() -> None:
    console = recorder(80)
    display = LiveTable(console)
    display.close()
    display.start(PLAN)
    display.stage("rollout")
    display.close()
    display.close()
    raw = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")


def test_an_early_end_leaves_no_spinner_behind(clock: Clock) -> None:
    console = recorder(80, color_system=None)
    display = LiveTable(console, clock=clock)
    display.stage("checking")
    display.close()
    raw = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert raw.endswith("\x1b[1A\x1b[2K") or "checking" not in raw.split("\x1b[2K")[-1]
    drive(display, clock, steps=2, total=4)
    display.close()
    assert "rollout\n" not in written(console).splitlines(keepends=True)[-1]


def test_plain_lines_are_throttled_but_keep_first_and_last(clock: Clock) -> None:
    console = recorder(80, force_terminal=False)
    display = PlainLines(console, clock=clock)
    display.start(PLAN)
    display.stage("loading the teacher")
    drive(display, clock, steps=10, total=10, seconds=0.3)
    display.finish(["adapter: a", *CODE])
    lines = written(console).splitlines()
    assert lines[: len(PLAN)] == PLAN
    assert lines[len(PLAN)] == "loading the teacher ..."
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["1/10", "5/10", "9/10", "10/10"]
    assert (
        "step 1/10  teacher_kl 0.395  reward 0.501  2800 tok/s  "
        "rollout 0.20s, teacher 0.02s, update 0.08s, other 0.01s  ETA 0:03"
    ) in lines
    assert lines[-2:] == CODE


def test_plain_lines_show_where_an_early_end_was(clock: Clock) -> None:
    console = recorder(80, force_terminal=False)
    display = PlainLines(console, clock=clock)
    drive(display, clock, steps=3, total=10, seconds=0.1)
    display.close()
    assert [line.split()[1] for line in written(console).splitlines()] == ["1/10", "3/10"]


def test_plain_output_has_no_escape_codes(clock: Clock) -> None:
    console = recorder(80, force_terminal=False, color_system=None)
    display = PlainLines(console, clock=clock)
    display.start(PLAN)
    drive(display, clock, steps=3, total=3)
    display.evaluation("before", {"acc": 0.5})
    display.evaluation("after", {"acc": 0.9})
    display.finish(["done"])
    assert "\x1b" not in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("terminal", "environment", "live"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, True),
        (True, {"NO_COLOR": ""}, True),
        (True, {"CI": "true"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_when_the_table_is_live(terminal: bool, environment: dict[str, str], live: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, _environ=environment)
    assert wants_live(console, environment) is live


def test_other_is_what_no_stage_accounts_for() -> None:
    timed = {"time/rollout": 1.0, "time/update": 2.0, "time/reward": 0.5, "loss": 1.0}
    assert stage_seconds(timed) == {"rollout": 1.0, "update": 2.0, "other": 0.5}
    assert stage_seconds(timed | {"time/step": 4.0})["other"] == 1.0
    assert stage_seconds({"loss": 1.0}) == {}


def test_history_stays_bounded(clock: Clock) -> None:
    history = StepHistory(clock)
    for step in range(1, 5001):
        history.add(step, 5000, {})
    assert len(history.rows) < 5000
    assert history.done == 5000


def test_quiet_display_is_a_display() -> None:
    display: Display = QuietDisplay()
    display.start([])
    display.download(Download(name="m", done=1, total=2, rate=1.0))
    display.saved(1, "checkpoints/step-000001")
    display.close()
