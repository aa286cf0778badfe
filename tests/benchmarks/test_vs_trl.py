"""``benchmarks/vs_trl.py``: a busy machine is refused, sides that differ are too, figures are what they say, the command runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.benchmarks.scripts import BENCHMARKS, load_benchmark

from rnow.config import Config
from rnow.config.estimator import kl_estimator


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_benchmark("vs_trl")


@pytest.fixture(scope="module")
def shown(script: ModuleType) -> Any:
    return script.shown


@pytest.fixture(scope="module")
def sides(script: ModuleType) -> ModuleType:
    return sys.modules["vs_trl_sides"]


# ---- an idle machine --------------------------------------------------------------------------------------------------


def test_work_of_all_cores_is_read_from_the_kernel(script: ModuleType) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    #            user nice system idle iowait irq softirq steal guest guest_nice
    stat = f"cpu  {ticks} {ticks} {ticks} 900 900 {ticks} {ticks} {ticks} 50 50\ncpu0 1 1 1 1"
    assert script.busy_seconds(stat) == 6.0


def test_own_work_is_none_of_others(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # (wall seconds, busy seconds but for our own): 2 s later others have worked 3 s.
    moments = iter([(10.0, 100.0), (12.0, 103.0)])
    monkeypatch.setattr(script.Others, "_now", staticmethod(lambda: next(moments)))
    with script.Others() as others:
        pass
    assert others.cores == 1.5


def test_a_busy_machine_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.refuse_busy(0.05, anyway=False)
    with pytest.raises(SystemExit, match=r"keep 0\.50 cores busy.*\n.*add --busy"):
        script.refuse_busy(0.5, anyway=False)
    assert not capsys.readouterr().out
    script.refuse_busy(0.5, anyway=True)
    assert "0.50 cores" in capsys.readouterr().out


def test_the_command_measures_nothing_on_a_busy_machine(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script.time, "sleep", lambda seconds: None)
    moments = iter([(0.0, 0.0), (2.0, 2.0)])
    monkeypatch.setattr(script.Others, "_now", staticmethod(lambda: next(moments)))
    monkeypatch.setattr(script, "measure", lambda *given, **named: pytest.fail("it measured"))
    monkeypatch.setattr(sys, "argv", ["vs_trl.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"1\.00 cores busy"):
        script.main()
    assert not [*tmp_path.iterdir()]


# ---- TRL's environment ------------------------------------------------------------------------------------------------


def test_an_environment_that_is_there_is_used_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "VENV", tmp_path)
    called: list[list[str]] = []
    monkeypatch.setattr(script, "_call", lambda command: called.append([*map(str, command)]))
    assert script.trl_python() == tmp_path / "bin" / "python"
    make, install = called
    assert make[1:] == ["-m", "venv", str(tmp_path)]
    assert "trl==1.16.0" in install
    assert f"torch=={metadata.version('torch').partition('+')[0]}" in install
    script.trl_python()
    assert len(called) == 2, "the second time it is there"
    (tmp_path / "installed.json").write_text('{"trl": "1.15.0"}')
    script.trl_python()
    assert len(called) > 2, "of another version it is brought up to date"


# ---- the sides --------------------------------------------------------------------------------------------------------


def task_of(sides: ModuleType, **given: Any) -> Any:
    values: dict[str, Any] = {"side": "default", "project": ".", "settings": {}, "seed": 0}
    values |= {"prompts": 2, "group": 2, "new": 8, "learning_rate": 1e-4, "began": 0.0}
    return sides.Task(**values | given)


def test_the_sides_are_what_they_are_called(script: ModuleType) -> None:
    base = script._config(script.SIZES["a"])
    configs = {name: Config(**base, **settings) for name, settings in script.SIDES.items()}
    assert kl_estimator(configs["sampled"]) == "sampled"
    exact = configs["exact"]
    assert kl_estimator(exact) == "exact"
    assert (exact.algorithm.divergence, exact.algorithm.kl_penalty_coef) == ("reverse", 1.0)
    trainer = exact.trainer
    assert (trainer.adam_beta1, trainer.adam_beta2, trainer.weight_decay) == (0.9, 0.95, 0.0)
    assert (trainer.max_grad_norm, trainer.lr_schedule, trainer.warmup_steps) == (
        1.0,
        "constant",
        0,
    )
    assert configs["default"].algorithm == Config(dataset_type="distill", model={"path": "x"}, teacher={"path": "y"}).algorithm  # fmt: skip


def test_completions_of_another_length_end_a_side(sides: ModuleType, tmp_path: Path) -> None:
    watch = sides.Watch(task_of(sides, steps=3), tmp_path)
    watch.sampled(4, 32)
    for completions, tokens in ((4, 31), (3, 24)):
        with pytest.raises(RuntimeError, match=f"{completions} completions of {tokens} tokens"):
            watch.sampled(completions, tokens)
    watch = sides.Watch(task_of(sides, seconds=1.0), tmp_path)
    watch.sampled(4, 31)  # stop tokens end answers in learning


def test_a_training_is_cut_by_its_clock(
    sides: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr(sides.time, "perf_counter", lambda: now[0])
    watch = sides.Watch(task_of(sides, seconds=4.0, marks=4), tmp_path)
    adapter = {"x": torch.zeros(2)}
    watch.begin(adapter)
    over = []
    # The third step passes two marks; keeping an adapter aside takes 100 s that are not the training's.
    for spent in (0.6, 0.6, 2.0, 1.0):
        now[0] += spent
        watch.sampled(4, 32)

        def keep() -> dict[str, torch.Tensor]:
            now[0] += 100.0
            return adapter

        over.append(watch.step({"rollout": 0.1, "teacher": 0.1, "kl": 1.0}, keep))
    assert over == [False, False, False, True]
    assert [step["seconds"] for step in watch.steps] == pytest.approx([0.6, 0.6, 2.0, 1.0])
    assert watch.steps[2]["update"] == pytest.approx(1.8), "what is in no other stage"
    assert [point["step"] for point in watch.points] == [2, 3, 3, 4]
    assert [point["seconds"] for point in watch.points] == pytest.approx([1.2, 3.2, 3.2, 4.2])
    assert watch.points[-1]["tokens"] == 128
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}.safetensors" for n in range(4)]  # fmt: skip


def test_sides_that_began_elsewhere_are_refused(script: ModuleType) -> None:
    one = {"size": "a", "seed": 0, "side": "trl", "adapter": "x", "prompts": ["p", "q"]}
    one["versions"] = {"torch": "2.13.0"}
    script.check_same([one, one | {"side": "exact", "prompts": ["p"], "versions": {"torch": "2.13.0+cpu"}}])  # fmt: skip
    script.check_same([one, one | {"seed": 1, "adapter": "y"}])
    for what, other in (
        ("initial adapter", {"adapter": "y"}),
        ("prompts", {"prompts": ["p", "r"]}),
        ("versions", {"versions": {"torch": "2.12.0"}}),
    ):
        with pytest.raises(SystemExit, match=f"size a: exact and trl have other {what}"):
            script.check_same([one, one | {"side": "exact"} | other])


# ---- statistics -------------------------------------------------------------------------------------------------------


def process(side: str, pair: int, seconds: float, peak: float) -> dict[str, Any]:
    """Two slow steps, then three of about ``seconds``."""
    steps = [
        {"seconds": wall, "rollout": wall / 2, "teacher": wall / 8, "update": wall / 4}
        | {"kl": 5.0, "grad_norm": 2.0, "tokens": 100 * (n + 1)}
        for n, wall in enumerate([90.0, 80.0, seconds, 1.5 * seconds, 0.5 * seconds])
    ]
    return {"what": "speed", "size": "a", "side": side, "pair": pair, "accumulation": 1, "seed": 0} | {
        "steps": steps, "peak_mb": peak, "loaded_mb": 300.0, "weights_mb": 40.0, "first_step_s": 9.0, "others": 0.0, "gemm": [50.0, 60.0],
    }  # fmt: skip


def speed_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    # The machine slows down from pair to pair: ratios within one do not care.
    for pair, slow in enumerate((1.0, 2.0, 4.0)):
        rows += [process("trl", pair, slow, 400.0), process("exact", pair, slow / 2, 100.0)]
    return rows


def test_a_process_is_its_median_step_without_the_first(shown: Any) -> None:
    found = shown.of_process(process("trl", 0, 2.0, 400.0), 2)
    assert found["seconds"] == 2.0
    assert found["tokens_per_s"] == 50.0
    assert (found["rollout"], found["rest"]) == (1.0, 0.25)


def test_ratios_are_taken_within_a_pair(shown: Any) -> None:
    trl, exact = shown.compare(speed_rows(), 2)
    assert (trl["side"], exact["side"], exact["pairs"]) == ("trl", "exact", 3)
    speed = exact["tokens_per_s"]
    assert (speed.value, speed.low, speed.high) == (100.0, 50.0, 200.0)
    assert exact["speed"] == shown.Spread(value=2.0, low=2.0, high=2.0)
    assert exact["memory"].value == 0.25
    (alone,) = shown.compare([row for row in speed_rows() if row["side"] == "exact"], 2)
    assert "speed" not in alone


def test_disturbed_measurements_are_told(shown: Any) -> None:
    rows = speed_rows()
    rows[3]["others"] = 0.7
    rows.append({"what": "learning", "template": "b", "others": 0.2})
    assert shown.disturbances(rows) == ["a exact pair 2: 0.70 cores", "b learning: 0.20 cores"]


def learning_rows() -> list[dict[str, Any]]:
    """KL falls to 0.01 in 4 s on one side, to 0.1 on the other, of which each step takes 3 s; the latter samples half as much."""
    start = {"step": 0, "tokens": 0, "seconds": 0.0, "kl": 1.0, "accuracy": 0.2}
    rows: list[dict[str, Any]] = [{"what": "start", "template": "a", **start}]
    for side, rate, every, tokens in (("exact", 2.0, 1, 100), ("trl", 1.0, 3, 50)):
        for seed in range(1, 6):
            points = [
                {"step": s, "tokens": tokens * s, "seconds": float(s), "accuracy": 0.2 + s / 10}
                | {"kl": 10 ** (-rate * s / 4) * (1 + 0.001 * seed)}
                for s in range(every, 5 + every - 1, every)
            ]
            rows.append(
                {"what": "run", "template": "a", "arm": side, "learning_rate": 1e-3, "seed": seed}
                | {"purpose": "measure", "asked_seconds": 4.0, "points": points}
            )
    return rows


def test_learning_is_compared_at_exactly_equal_seconds_and_tokens(shown: Any) -> None:
    start, *rows = learning_rows()
    cut = shown.at_seconds(rows[-1]["points"], start, 4.0)
    assert [point["seconds"] for point in cut] == [3.0, 4.0], "its last step ended after 6 s"
    assert cut[-1]["tokens"] == pytest.approx(200)
    assert cut[-1]["accuracy"] == pytest.approx(0.6)
    assert shown.at_seconds(rows[0]["points"], start, 4.0)[-1]["kl"] == pytest.approx(
        0.01, rel=1e-2
    )
    trl, exact = shown.learned([start, *rows])
    assert (trl["arm"], exact["arm"]) == ("trl", "exact")
    assert trl["kl"].value == pytest.approx(0.1, rel=1e-2)
    assert exact["kl"].value == pytest.approx(0.01, rel=1e-2)
    assert exact["at_tokens"] == pytest.approx(200)
    assert exact["kl_at_tokens"].value == pytest.approx(0.1, rel=1e-2)


# ---- what is written --------------------------------------------------------------------------------------------------


def results_of(*, busy: bool) -> dict[str, Any]:
    plan = {"what": "plan", "busy": busy, "pairs": 3, "dropped": 2, "trl": "1.16.0"}
    plan |= {"titles": {"a": "small, of 1,000 ids, 4 x 25 tokens"}, "dates": ["1", "2"]}
    trial = process("trl", 0, 2.0, 400.0) | {"what": "trial", "accumulation": 2}
    names = ("torch", "transformers", "peft", "python", "date")
    machine = {"cpu": "some core", **dict.fromkeys(names, "2")}
    rows = [plan, trial, *speed_rows(), *learning_rows()]
    return json.loads(json.dumps({"machine": machine, "rows": rows}))


def test_the_page_has_every_figure(shown: Any) -> None:
    text = shown.page(results_of(busy=False))
    assert "busy" not in text
    assert "50 to 60 GFLOP/s" in text
    assert "micro-batches, tried once (2: 2.00 s a step, 400 MB)" in text
    assert (
        "| exact | 100 (50 to 200) | 2.00 (2.00 to 2.00) | 1.000 (0.500 to 2.000) | 0.500 |" in text
    )
    assert "**(a)** small, of 1,000 ids, held-out prompts after 4 s of training, 5 seeds" in text
    assert "| exact | 0.001 | 0.010" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert tables == [15] * 4 + [8] * 4
    assert "mean nothing" in shown.page(results_of(busy=True))
    disturbed = results_of(busy=False)
    disturbed["rows"][2]["others"] = 0.7
    assert "; others worked beside 1 of 7 measurements." in shown.short(disturbed)


def test_the_short_table_goes_into_the_readme(script: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{script.BEGIN}\nof an earlier run\n{script.END}\nafter\n")
    for _ in range(2):
        script.write_docs(results_of(busy=False), readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{script.BEGIN}\n(a) small, of 1,000 ids, 4 x 25 tokens. some core, one core; TRL 1.16.0")  # fmt: skip
    assert text.endswith(f"{script.END}\nafter\n")
    assert "| a | exact | 100 | 2.00 (2.00 to 2.00) | 100 | 0.25 | 9.0 |" in text
    assert "| a, 4 s | trl | 0.100" in text
    with pytest.raises(SystemExit, match="busy machine"):
        script.write_docs(results_of(busy=True), readme)
    assert readme.read_text() == text
    with pytest.raises(SystemExit, match="no place for the table"):
        script.write_docs(results_of(busy=False), BENCHMARKS / "README.md")


def test_parts_are_added_to_what_was_measured_before(script: ModuleType, tmp_path: Path) -> None:
    kept = tmp_path / script.KEPT
    options = ["--add", "--sizes", "--learning", "b"]
    with pytest.raises(SystemExit, match="measure without --add"):
        script.parts_kept(script.parse(options), kept)
    results = results_of(busy=False) | {"machine": script.machine()}
    kept.write_text(json.dumps(results))
    days, rows = script.parts_kept(script.parse(options), kept)
    assert (days, rows) == (["1", "2"], results["rows"][1:])
    for again, what in ((["--sizes", "a", "--learning"], "speed"), (["--sizes"], "run")):
        rows = script.parts_kept(script.parse(["--add", *again]), kept)[1]
        assert rows, "the other part stays"
        assert what not in {row["what"] for row in rows}
    kept.write_text(json.dumps(results | {"machine": {**script.machine(), "torch": "1.0"}}))
    with pytest.raises(SystemExit, match=r"torch 1\.0: nothing can be added"):
        script.parts_kept(script.parse(options), kept)


def test_the_readme_has_a_place_for_it(script: ModuleType) -> None:
    text = script.README.read_text()
    assert text.index(script.BEGIN) < text.index(script.END)


def test_the_plot(shown: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown.plot(results_of(busy=False)["rows"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_options(script: ModuleType) -> None:
    def parse(*given: str) -> argparse.Namespace:
        return script.parse([*given])

    whole = parse()
    assert (whole.pairs, whole.sizes, whole.learning) == (5, ["a", "b", "c"], ["a"])
    assert whole.sides == ["trl", "default", "exact", "sampled"]
    quick = parse("--quick")
    assert (quick.pairs, quick.sizes, quick.learning) == (1, ["a"], [])
    assert parse("--sizes", "b", "--learning").learning == []
    assert parse("--learning", "b", "c").learning == ["b", "c"]


@pytest.mark.whole
def test_the_command() -> None:
    """``exact`` is TRL's own objective: the loss of the first step and its gradient differ by the sampled answers alone."""
    pytest.importorskip("trl")
    command = [sys.executable, BENCHMARKS / "vs_trl.py", "--quick", "--busy"]
    command += ["--sides", "trl", "exact", "--trl-python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    heading, trl, exact = ([cell.strip("| ") for cell in row] for row in rows)
    for name, allowed in (("first KL", 0.05), ("its gradient", 0.15)):
        at = heading.index(name)
        assert abs(math.log(float(exact[at]) / float(trl[at]))) < allowed
