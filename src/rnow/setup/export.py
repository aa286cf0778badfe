"""``rnow export``: what a run trained, in the forms that others load, each held against the trainer's own numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rnow.config import Config, config_for
from rnow.disk.checkpoints import export_adapter
from rnow.disk.files import read_json_object, replace_file
from rnow.display.downloads import DownloadLines
from rnow.errors import InputError, ModelError, RnowError
from rnow.export import gguf, hub, llama
from rnow.export.card import CARD, CURVE, RunRecord, read_record, write_card
from rnow.export.files import copy_tokenizer
from rnow.export.gguf_header import read_header
from rnow.export.merge import Merge, plan_merge, write_merged
from rnow.export.ollama import Modelfile, build_modelfile
from rnow.export.place import check_room, refuse_existing, scratch, size_of, written_aside
from rnow.export.probe import Difference, compare, probe_ids, probe_logprobs
from rnow.models.adapter import check_base
from rnow.models.loading import CausalLM, load_causal_lm, quiet_libraries
from rnow.models.resolve import resolve_model
from rnow.models.resolved import ResolvedModel
from rnow.models.tokenizer import load_tokenizer, stop_token_ids, vocabulary_size
from rnow.plan.rendered import choose_window
from rnow.plan.roles import STUDENT, RunModel, dtype_name, roles_of
from rnow.policy.lora import attach_trained
from rnow.protocols import Tokenizer
from rnow.rollout.rendering import set_template_date
from rnow.setup.answering import free_memory
from rnow.setup.subjects import Trained

if TYPE_CHECKING:
    import torch

ADAPTER, MERGED, MODELFILE = "adapter", "merged", "Modelfile"
CONVERTED = "converted"
"""A merged model that is only there to be converted."""
DType = Literal["auto", "float32", "bfloat16", "float16"]

EXACT = 1e-3
"""Nats by which what was merged in float32 may differ from a trainer in float32: more is a fault."""

_MODEL_KEYS = ("quantization", "dtype", "device", "attn_implementation", "trust_remote_code")
_GPU = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be made.

    Attributes:
        merge: a whole model; otherwise, and where no other form is wanted, the adapter.
        dtype: of a whole model; ``auto`` is the base's own.
        gguf: the type of a GGUF file's weights.
        ollama: a Modelfile for it.
        push: the repository that all of it goes to; ``private``: where that is made.
        output: the folder; below the run's own by default.
        base: where the base is, if not where the run had it.
        force: replace what is there.
    """

    merge: bool = False
    dtype: DType = "auto"
    gguf: str | None = None
    ollama: bool = False
    push: str | None = None
    private: bool = False
    output: Path | None = None
    base: str | None = None
    force: bool = False

    @property
    def adapter(self) -> bool:
        """Whether the adapter itself is wanted."""
        return not (self.merge or self.gguf or self.ollama)

    @property
    def gguf_type(self) -> str | None:
        """Of the weights of the GGUF file; Ollama needs one."""
        return self.gguf or (gguf.DEFAULT_TYPE if self.ollama else None)


def export(
    trained: Trained,
    wanted: Wanted,
    *,
    folder: Path,
    tell: Callable[[str], None],
    stage: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Make what is wanted, compare it with the trainer's model, and say how far apart they are. The files and folders made.

    Args:
        folder: where relative paths start.
        tell: given what was made, one line each.
        stage: told what is being done.
        warn: told what others would do otherwise.

    Raises:
        InputError: (ModelError) something is there already, does not fit, or cannot be expressed; nothing was left behind.
        RnowError: what was made is not what was trained.
        TemporaryError: the disk is full, or the network is gone.
    """
    quiet_libraries()
    return _Export(trained, wanted, folder, tell, stage, warn).run()


class _Export:
    """One export, in the order in which a fault costs least."""

    def __init__(
        self,
        trained: Trained,
        wanted: Wanted,
        folder: Path,
        tell: Callable[[str], None],
        stage: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._trained, self._wanted, self._folder = trained, wanted, folder
        self._tell, self._stage, self._warn = tell, stage, warn
        self._name = _name_of(trained)
        self._output = wanted.output or _default_output(trained, self._name)
        self._facts = _facts_of(trained)
        self._config = _config_of(trained, self._facts, wanted.base)

    def run(self) -> list[Path]:
        wanted = self._wanted
        _refuse_idle(wanted)
        if wanted.gguf_type is not None:
            gguf.check_type(wanted.gguf_type)
        refuse_existing(self._targets(), force=wanted.force)
        if wanted.push is not None:
            self._stage("asking the hub")
            hub.check_repository(wanted.push, force=wanted.force)
        self._stage("looking for the base model")
        for warning in check_base(self._trained.adapter, self._base):
            self._warn(warning)
        merges = self._plan()
        self._try_modelfile()
        made: list[Path] = []
        if wanted.adapter:
            made.append(self._export_adapter())
        if merged := merges.get(MERGED):
            made.append(self._export_merged(merged))
        if (kind := wanted.gguf_type) is not None:
            made += self._export_gguf(kind, merges.get(CONVERTED))
        if wanted.push is not None:
            self._push(wanted.push, made)
        return made

    # ---- what there is, and what is to be ----------------------------------------------------------------------

    def _targets(self) -> list[Path]:
        wanted, names = self._wanted, []
        names += [ADAPTER] if wanted.adapter else []
        names += [MERGED] if wanted.merge else []
        names += [self._gguf_name] if wanted.gguf_type else []
        names += [MODELFILE] if wanted.ollama else []
        return [self._output / name for name in names]

    def _plan(self) -> dict[str, Merge]:
        """What is merged, by what for: the whole model, and the one that is converted, which is in float32 and gone afterwards."""
        import torch

        wanted, dtypes = self._wanted, {}
        if wanted.merge:
            dtypes[MERGED] = None if wanted.dtype == "auto" else getattr(torch, wanted.dtype)
        if wanted.gguf_type and dtypes.get(MERGED) != torch.float32:
            dtypes[CONVERTED] = torch.float32
        merges = {
            name: plan_merge(
                self._base,
                self._trained.adapter,
                dtype=dtype,
                trust_remote_code=self._config.model.trust_remote_code,
            )
            for name, dtype in dtypes.items()
        }
        needed = sum(merge.bytes for merge in merges.values())
        if wanted.gguf_type:
            weights = next(iter(merges.values())).parameters
            needed += int(weights * gguf.BYTES_PER_WEIGHT[wanted.gguf_type])
        check_room(self._output, needed or size_of(self._trained.adapter.folder))
        return merges

    def _try_modelfile(self) -> None:
        """What Ollama cannot do is known before anything is computed."""
        if self._wanted.ollama:
            tokenizer = self._tokenizer
            bos = getattr(tokenizer, "bos_token_id", None)
            adds = bos is not None and tokenizer.encode("a")[:1] == [bos]
            for note in self._modelfile(adds_bos=adds).notes:
                self._warn(note)

    @cached_property
    def _base(self) -> ResolvedModel:
        section, moved = self._config.model, self._wanted.base is not None
        known, lines = self._facts.get("student_revision"), DownloadLines()
        try:
            return resolve_model(
                section.path,
                key="model.path",
                base_dir=self._folder,
                revision=None if moved or not isinstance(known, str) else known,
                trust_remote_code=section.trust_remote_code,
                watch=lambda coming: self._stage(coming.line()) if lines.due(coming) else None,
            )
        except ModelError as error:
            error.where = "--base" if moved else error.where
            if not moved and Path(section.path).is_absolute():
                error.fix = "say where the base model is now: --base PATH"
            raise

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        found = load_tokenizer(self._base, trust_remote_code=self._config.model.trust_remote_code)
        date = self._facts.get("template_date")
        if isinstance(date, str):
            set_template_date(found, datetime.fromisoformat(date))
        return found

    @cached_property
    def _student(self) -> RunModel:
        return RunModel(role=roles_of(self._config)[STUDENT], resolved=self._base)

    @cached_property
    def _window(self) -> int:
        return choose_window(None, {STUDENT: self._student})

    @cached_property
    def _ids(self) -> list[int]:
        return probe_ids(
            self._tokenizer,
            reasoning_mode=self._config.rollout.reasoning_mode,
            limit=self._window,
        )

    @property
    def _record(self) -> RunRecord:
        run = self._trained.run
        if run is None:
            return RunRecord(name=self._name, facts={}, summary={}, rows=[], step=None, final=True)
        return read_record(run, step=self._trained.step)

    @property
    def _gguf_name(self) -> str:
        return f"{self._name}-{self._wanted.gguf_type}.gguf"

    # ---- the forms ---------------------------------------------------------------------------------------------

    def _export_adapter(self) -> Path:
        target = self._output / ADAPTER
        self._stage("writing the adapter")
        found = self._trained.adapter.adapter()
        if self._base.revision is not None:
            found = replace(found, config={**found.config, "revision": self._base.revision})
        with written_aside(target, force=self._wanted.force) as aside:
            aside.mkdir()
            export_adapter(found, aside)
            copy_tokenizer(self._base.local_dir, self._tokenizer, aside)
            write_card(aside, self._record, form="adapter")
            difference = self._compare(self._as_peft(aside), exact=self._exact)
        self._told(target, "adapter", difference)
        return target

    def _export_merged(self, merge: Merge) -> Path:
        import torch

        target = self._output / MERGED
        self._stage("merging")
        with written_aside(target, force=self._wanted.force) as aside:
            aside.mkdir()
            write_merged(merge, aside)
            write_card(aside, self._record, form="merged")
            exact = self._exact and merge.widest == torch.float32
            difference = self._compare(self._as_merged(aside, merge), exact=exact)
        name = dtype_name(merge.widest)
        rounded = (
            None if name == "float32" else f"rounded to {name}; --dtype float32 rounds nothing"
        )
        self._told(target, name, difference, rounded)
        return target

    def _export_gguf(self, kind: str, merge: Merge | None) -> list[Path]:
        """``merge``: what is to be converted; None where the merged model is in float32 already."""
        target = self._output / self._gguf_name
        force = self._wanted.force
        with ExitStack() as stack:
            model = self._output / MERGED
            if merge is not None:
                model = stack.enter_context(scratch(self._output / f"{self._name}-float32"))
                self._stage("merging")
                model.mkdir()
                write_merged(merge, model)
            with written_aside(target, force=force) as aside:
                gguf.convert(model, aside, kind=kind, name=self._name, stage=self._stage)
                difference = self._compare_gguf(aside)
        self._told(target, kind, difference, None if kind == "f32" else f"rounded to {kind}")
        if difference is None:
            self._tell(
                f"  not compared with the trainer: {llama.PACKAGE} is not installed (pip install {llama.PACKAGE})"
            )
        return [target, *([self._export_modelfile(target)] if self._wanted.ollama else [])]

    def _export_modelfile(self, model: Path) -> Path:
        target = self._output / MODELFILE
        found = self._modelfile(adds_bos=_adds_bos(model))
        with written_aside(target, force=self._wanted.force) as aside:
            replace_file(aside, found.text(model.name).encode())
        self._tell(f"Modelfile: {target}")
        self._tell(
            f"  its prompts are the tokenizer's, letter by letter, in {found.conversations} conversations; it stops at "
            f"{', '.join(found.stops) or 'what the file says'}"
        )
        self._tell(
            f"  load it with: cd {self._output} && ollama create {self._name} -f {MODELFILE}"
        )
        return target

    def _modelfile(self, *, adds_bos: bool) -> Modelfile:
        local = self._base.local_dir
        return build_modelfile(
            self._tokenizer,
            stop_ids=stop_token_ids(self._tokenizer, local),
            adds_bos=adds_bos,
            reasoning_mode=self._config.rollout.reasoning_mode,
            generation=read_json_object(local / "generation_config.json"),
            context=self._config.rollout.max_context_window,
        )

    def _push(self, repository: str, made: list[Path]) -> None:
        self._stage(f"uploading to {repository}")
        files: dict[str, Path | bytes] = {}
        for path in made:
            if path.is_dir():
                files |= {f.relative_to(path).as_posix(): f for f in path.rglob("*") if f.is_file()}
            else:
                files[path.name] = path
        with ExitStack() as stack:
            if CARD not in files:
                beside = stack.enter_context(scratch(self._output / "card"))
                beside.mkdir()
                write_card(beside, self._record, form="gguf")
                files |= {name: path for name in (CARD, CURVE) if (path := beside / name).is_file()}
            address = hub.push(
                repository,
                files,
                private=self._wanted.private,
                message=f"{self._name}, after step {self._trained.step}"
                if self._trained.step
                else self._name,
            )
        if self._wanted.adapter and self._base.revision is None:
            self._warn(
                f"adapter_config.json names the base by its folder here, {self._base.local_dir}: others have to give theirs"
            )
        self._tell(f"pushed: {address}")

    # ---- what was trained, and what was made -------------------------------------------------------------------

    @cached_property
    def _trainer(self) -> list[float]:
        """The trainer's log-probabilities of the probe."""
        self._stage("scoring with the trainer's model")
        lm = self._load(self._base.local_dir, self._student.quantization, self._student.role.dtype)
        attach_trained(lm, self._trained.adapter)
        return probe_logprobs(lm, self._ids)

    @property
    def _exact(self) -> bool:
        """Whether the trainer's numbers are those of the weights, rounded nowhere."""
        import torch

        role = self._student.role
        return self._student.quantization == "none" and role.dtype == torch.float32

    def _as_peft(self, folder: Path) -> Callable[[], list[float]]:
        def score() -> list[float]:
            from peft import PeftModel

            role = self._student.role
            lm = self._load(self._base.local_dir, self._student.quantization, role.dtype)
            PeftModel.from_pretrained(lm.model, str(folder)).eval()
            return probe_logprobs(lm, self._ids)

        return score

    def _as_merged(self, folder: Path, merge: Merge) -> Callable[[], list[float]]:
        import torch

        # On a CPU bfloat16 is slow, and its weights are the same in float32.
        on_card = self._student.role.on_gpu
        return lambda: probe_logprobs(
            self._load(folder, "none", merge.widest if on_card else torch.float32), self._ids
        )

    def _compare(self, score: Callable[[], list[float]], *, exact: bool) -> Difference:
        ours = self._trainer
        free_memory()
        self._stage("comparing with the trainer's model")
        difference = compare(ours, score())
        free_memory()
        if not difference.largest <= (EXACT if exact else float("inf")):
            raise RnowError(
                f"what was written is not what was trained: {difference}",
                title="Not exported",
                why="both are in float32, and should be equal",
                fix="serve the adapter beside its base instead: rnow serve; and report this",
            )
        return difference

    def _compare_gguf(self, file: Path) -> Difference | None:
        """None where nothing is there that runs it."""
        if not llama.has_llama():
            return None
        ours = self._trainer
        free_memory()
        self._stage("comparing with the trainer's model")
        tokenizer = self._tokenizer
        text = tokenizer.decode(self._ids, skip_special_tokens=False)
        answer = llama.ask_llama(file, self._ids, vocabulary=vocabulary_size(tokenizer), text=text)
        if list(answer.ids) != self._ids:
            self._warn(
                "llama.cpp reads the probe as other tokens than the tokenizer: its answers may differ from those that were trained"
            )
        return compare(ours, answer.logprobs)

    def _load(self, folder: Path, quantization: Any, dtype: torch.dtype) -> CausalLM:
        section = self._config.model
        return load_causal_lm(
            folder,
            vocabulary=vocabulary_size(self._tokenizer),
            dtype=dtype,
            device=self._student.role.device,
            quantization=quantization,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
            window=self._window,
        )

    def _why(self, rounded: str | None) -> str:
        """Why the two may differ: how the trainer held its numbers, and what was done to them here."""
        role, reasons = self._student.role, []
        if self._student.quantization != "none":
            reasons.append(f"the trainer held the base in {self._student.quantization}")
        elif not self._exact:
            reasons.append(f"the trainer computed in {dtype_name(role.dtype)}")
        return "; ".join([*reasons, *([rounded] if rounded else [])])

    def _told(
        self, target: Path, what: str, difference: Difference | None, rounded: str | None = None
    ) -> None:
        self._tell(f"{target.name}: {target} ({what}, {size_of(target) / 1e6:,.1f} MB)")
        if difference is not None:
            why = self._why(rounded)
            self._tell(f"  against the trainer: {difference}{f' ({why})' if why else ''}")


def _refuse_idle(wanted: Wanted) -> None:
    """Options that nothing would read."""
    idle = ("--dtype", "--merge") if wanted.dtype != "auto" and not wanted.merge else None
    if idle is None and wanted.private and wanted.push is None:
        idle = ("--private", "--push OWNER/NAME")
    if idle is not None:
        option, other = idle
        raise InputError(
            f"{option} goes with {other}", where=option, fix=f"add {other}, or leave {option} out"
        )


def _name_of(trained: Trained) -> str:
    if trained.run is not None:
        return trained.run.path.resolve().name
    folder = trained.adapter.folder.resolve()
    return folder.parent.name if folder.name == ADAPTER else folder.name


def _default_output(trained: Trained, name: str) -> Path:
    """Below the run; of a checkpoint in a folder of its own."""
    if trained.run is None:
        return Path(f"{name}-export")
    folder = trained.adapter.folder
    inside = folder.parent.name == "checkpoints"
    return trained.run.exports / folder.name if inside else trained.run.exports


def _facts_of(trained: Trained) -> dict[str, Any]:
    return {} if trained.run is None else read_json_object(trained.run.facts)


def _config_of(trained: Trained, facts: Mapping[str, Any], base: str | None) -> Config:
    """The base held as the run held it: outside of its project, by what it keeps of itself."""
    config = config_for(base or trained.adapter.base)
    known = facts.get("config")
    known = known if isinstance(known, Mapping) else {}
    model = {key: known.get("model", {}).get(key) for key in _MODEL_KEYS}
    changes = {key: value for key, value in model.items() if value is not None}
    if changes.get("quantization", "auto") == "auto" and trained.run is not None:
        trained_on = str(read_json_object(trained.run.summary).get("device", ""))
        if trained_on:
            changes["quantization"] = "none" if trained_on.startswith("cpu") else "nf4"
    if not _is_here(str(changes.get("device", "auto"))):
        changes["device"] = "auto"
    rollout = known.get("rollout", {})
    spoken = {key: rollout.get(key) for key in ("reasoning_mode", "max_context_window")}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=changes),
            "rollout": config.rollout.model_copy(update=spoken),
        }
    )


def _is_here(device: str) -> bool:
    import torch

    if not device.startswith(_GPU):
        return device in ("auto", "cpu")
    number = device.removeprefix(_GPU).removeprefix(":")
    return torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()


def _adds_bos(file: Path) -> bool:
    """Whether llama.cpp puts a first token before a prompt: as the file says or, where it does not, as its kind of tokenizer is used."""
    header = read_header(file)
    known = header.get("tokenizer.ggml.add_bos_token")
    if isinstance(known, bool):
        return known
    return header.get("tokenizer.ggml.model") == "llama"
