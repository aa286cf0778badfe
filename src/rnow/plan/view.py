"""The plan of a run on a terminal: two quiet tables and, where something does not fit, what to change."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rnow.display.tables import quiet_table
from rnow.display.terminal import bar, escape_control, format_bytes
from rnow.models.hub import MORE_ROOM
from rnow.plan.memory import Residence, Stage
from rnow.plan.plan import HOST_FIX, DevicePlan, DownloadPlan, ModelPlan, Plan, RowsPlan
from rnow.plan.roles import STUDENT

_STAGES: dict[Stage, str] = {
    "always": "always",
    "until the update": "outside the update",
    "sampling": "while sampling",
    "teacher": "while scoring",
    "update": "in the update",
}
_RESIDENCIES: dict[Residence, str] = {
    "resident": "all at once (residency: resident)",
    "time_shared": "in turns (residency: time_shared)",
}
_BAR_WIDTH, _LEAST_BAR = 18, 6
_GAP = 2
"""Columns between two cells of a table."""
OWN_BASE = "the student's own base with the adapter off; there is one copy of it"


def plan_view(plan: Plan, console: Console) -> RenderableType:
    """What ``rnow check`` shows: the run, the memory of each device, the disk, and warnings."""
    unicode = console.encoding.lower().startswith("utf")
    parts: list[RenderableType] = [_facts(plan)]
    for device in plan.devices:
        parts += [Text(), _memory_table(device, console.width, unicode), _verdict(device)]
        if device.peaks:
            parts.append(_residency(device))
    parts += [Text(), _disk(plan)]
    if plan.download is not None:
        parts.append(_download(plan.download))
    parts += [Text(escape_control(notice)) for notice in plan.notices]
    for warning in plan.warnings:
        line = Text("warning: ", style="yellow")
        parts.append(line.append(escape_control(warning), style="default"))
    return Group(*parts)


def _facts(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(escape_control(text)))

    for role, model in plan.models.items():
        judged = plan.judged.get(role) if len(plan.judged) > 1 else None
        what = OWN_BASE if model.own_base else _model(model)
        row(role, what + (f", judges {judged:,} prompts" if judged is not None else ""))
    share = plan.trainable_parameters / max(1, plan.models[STUDENT].parameters)
    row(
        "trainable",
        f"{_count(plan.trainable_parameters)} LoRA parameters ({share:.2%} of the student)",
    )
    if plan.starts_from:
        row("starts from", plan.starts_from)
    again = plan.recomputed_layers
    row(
        "recomputed",
        f"activations of {again:,} of {plan.layers:,} layers, in the backward pass"
        if again
        else "no activations",
    )
    if plan.rows is not None:
        for name, text in _rows(plan, plan.rows).items():
            row(name, text)
        return table
    row("shared prompts", _shared(plan))
    if plan.signal:
        row("signal", plan.signal)
    held = f", {plan.held_out:,} held out" if plan.held_out else ""
    row("prompts", f"{plan.prompts:,}{held}; the longest has {plan.longest_prompt:,} tokens")
    if plan.longest_told:
        row(
            "for teachers",
            f"prompts in other words than the student's; the longest has {plan.longest_told:,} tokens",
        )
    row(
        "steps",
        f"{plan.steps:,} of {plan.prompts_per_step} prompts x {plan.rollouts_per_prompt} rollouts, "
        f"{plan.epochs} epoch{'s' if plan.epochs > 1 else ''}",
    )
    if plan.tools:
        row("tools", f"{', '.join(plan.tools)}; at most {plan.max_turns} turns")
    row(
        "answers",
        f"{plan.rollouts:,} of at most {plan.completion_tokens:,} tokens "
        f"({_count(plan.max_total_tokens)} together); window {plan.window:,}",
    )
    stops = zip(plan.stop_ids, plan.stop_texts, strict=True)
    row(
        "stops at",
        ", ".join(f"{text} ({token})" for token, text in stops) or "the length limit only",
    )
    row("run folder", plan.run_dir)
    return table


def _rows(plan: Plan, rows: RowsPlan) -> dict[str, str]:
    """What is said of a run that learns from rows: no teacher judges, and nothing is sampled."""
    separate = plan.models[STUDENT].separate
    held = f", {plan.held_out:,} held out" if plan.held_out else ""
    documents = rows.end is not None
    noun = "windows" if documents else "rows"
    prompts = f"{plan.prompts:,}{held}; the longest has {rows.longest:,} tokens"
    if documents:
        prompts = f"{plan.prompts:,}{held}, each ended by {rows.end}, in {rows.sequences:,} windows"
    return {
        "packing": "several rows in one sequence, none of which sees another"
        if not separate
        else f"off, each row is a sequence of its own: {separate}",
        "signal": "the tokens of the texts"
        if documents
        else "the assistant's tokens, its end of turn included",
        "documents" if documents else "rows": prompts,
        "steps": f"{plan.steps:,} of {plan.prompts_per_step} {noun}, {plan.epochs} epoch{'s' if plan.epochs > 1 else ''}",
        "tokens": f"{_count(rows.tokens)} an epoch, {_count(rows.loss_tokens)} of them in the loss; window {plan.window:,}",
        **({"tools": f"{', '.join(plan.tools)}, shown to the student"} if plan.tools else {}),
        "run folder": plan.run_dir,
    }


def _shared(plan: Plan) -> str:
    """Of which models what several answers begin with is computed once, and why not of the others."""
    here = {
        role: model.separate
        for role, model in plan.models.items()
        if model.separate is not None and not model.own_base
    }
    once = [role for role, why in here.items() if not why]
    parts = [f"computed once ({', '.join(once)})"] if once else []
    return "; ".join(
        [*parts, *(f"once for each answer ({role}): {why}" for role, why in here.items() if why)]
    )


def _model(model: ModelPlan) -> str:
    stored = (
        model.dtype if model.quantization == "none" else f"{model.quantization} + {model.dtype}"
    )
    revision = f" @ {model.revision[:8]}" if model.revision else ""
    streamed = f", {model.streaming}" if model.streaming else ""
    return f"{model.path}{revision}  {_count(model.parameters)} parameters, {stored}, {model.device}{streamed}"


def _memory_table(device: DevicePlan, width: int, unicode: bool) -> Table:
    """The bars get what the words leave, or nothing: a size cut at its unit would mislead."""
    rows = [(f"memory on {device.info.device}", "size", "held")]
    rows += [
        (f"{part.model} {part.name}", format_bytes(part.bytes), _STAGES[part.stage])
        for part in device.parts
    ]
    lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    bar_width = min(_BAR_WIDTH, width - sum(length + _GAP for length in lengths))
    (name, size, held), *rows = rows
    table = quiet_table()
    table.add_column(Text(name), overflow="fold")
    table.add_column(size, justify="right", no_wrap=True, min_width=lengths[1])
    table.add_column(held, style="dim", overflow="fold")
    if bar_width >= _LEAST_BAR:
        table.add_column("", width=bar_width, no_wrap=True)
    largest = max((part.bytes for part in device.parts), default=0) or 1
    for part, row in zip(device.parts, rows, strict=True):
        share = bar(part.bytes / largest, bar_width, unicode=unicode)
        table.add_row(*row, *[Text(share, style="cyan")] * (bar_width >= _LEAST_BAR))
    return table


def _verdict(device: DevicePlan) -> RenderableType:
    info = device.info
    peak = f"at most about {format_bytes(device.peak_bytes)} at once ({_STAGES[device.peak_stage]})"
    room = f"{format_bytes(info.free_bytes)} free of {format_bytes(info.total_bytes)} ({escape_control(info.name)})"
    if info.margin:
        room += f", of which {format_bytes(info.margin)} stay free"
    if device.fits:
        return Text(f"fits: {peak}, {room}", style="green")
    if device.hopeless:
        text = Text(f"does not fit: {peak}, {room}", style="bold red")
    else:
        text = Text(f"may not fit with the longest answers: {peak}, {room}", style="bold yellow")
    if device.lacking:
        text.append("".join(f"\n{line}" for line in device.lacking), style="default not bold")
    if not device.host_suffices:
        line = f"main memory does not hold what sleeps: {HOST_FIX}"
        text.append(f"\n{line}", style="default not bold")
    if not device.advice:
        return text
    lines = "".join(f"\n  {line}" for line in device.advice)
    return text.append(f"\nany of these lowers it:{lines}", style="default not bold")


def _residency(device: DevicePlan) -> Text:
    """Both sums against the card."""

    def line(what: str, most: int) -> str:
        against = "fits" if most <= device.info.usable_bytes else "does not fit"
        return f"{what}: {format_bytes(most)}, {against}"

    lines = []
    for kind, most in device.peaks.items():
        chosen = "  <- chosen" if kind == device.residency else ""
        lines.append(line(_RESIDENCIES[kind], most) + chosen)
    if device.host_bytes:
        host = f"{format_bytes(device.host_bytes)} of {format_bytes(device.host_free_bytes)} free"
        what = "sleeps" if device.residency == "time_shared" else "waits there"
        lines.append(f"main memory for what {what}: {host}, pinned in blocks of powers of two")
    if device.with_nf4_teacher is not None:
        lines.append(line("all at once with teacher.quantization: nf4", device.with_nf4_teacher))
    return Text("\n".join(lines))


def _disk(plan: Plan) -> Text:
    text = (
        f"disk: {format_bytes(plan.checkpoint_bytes)} per checkpoint, {format_bytes(plan.checkpoints_bytes)} of them at most; "
        f"transcripts up to {format_bytes(plan.transcripts_bytes)}, journal {format_bytes(plan.journal_bytes)}; "
        f"{format_bytes(plan.disk_free_bytes)} free"
    )
    if plan.disk_suffices:
        return Text(text)
    advice = "free some space, or set output_dir to another disk"
    if plan.checkpoints_bytes > plan.disk_free_bytes:
        return Text(f"{text}: {advice}", style="bold red")
    return Text(f"{text}: may not suffice for the longest answers; {advice}", style="bold yellow")


def _download(download: DownloadPlan) -> Text:
    each = ", ".join(f"{role} {format_bytes(size)}" for role, size in download.models.items())
    text = (
        f"to download: {each}, from {download.source} into {download.folder}; "
        f"{format_bytes(download.free_bytes)} free"
    )
    if download.fits:
        return Text(escape_control(text))
    advice = MORE_ROOM.format(cache=download.folder)
    return Text(escape_control(f"{text}: does not fit; {advice}"), style="bold red")


def _count(number: int) -> str:
    """``4.02 B``, ``66.1 M``, ``812``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
