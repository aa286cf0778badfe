"""The student that is to learn the rows, and reads along: what sft would refuse, and the whole file with it, becomes no row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rnow.errors import InputError
from rnow.generation.store import digest
from rnow.models.tokenizer import encode_texts
from rnow.plan.prepare import Prepared
from rnow.rollout.masks import MaskFault, mask_conversations
from rnow.rollout.template_process import TemplateFault
from rnow.types import Message

TEMPLATE_REFUSES = "the student's chat template refuses it"
NOT_TOLD = "the student's chat template does not tell its answers from the rest"
TOO_LONG = "longer than the student's window"
OF_THE_STUDENT = frozenset({TEMPLATE_REFUSES, NOT_TOLD, TOO_LONG})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A student, as far as it reads.

    Attributes:
        digest: of all that ``refuses`` depends on besides the row.
        refuses: (messages, names of the row's tools or None for all) -> one of ``OF_THE_STUDENT``; None for what it can learn.
    """

    digest: str
    refuses: Callable[[Sequence[Message], Sequence[str] | None], str | None]


def reader_of(prepared: Prepared) -> Reader:
    """The student that ``prepared`` is of."""
    rendered, mode = prepared.rendered, prepared.config.rollout.reasoning_mode
    tokenizer = rendered.tokenizer
    encode = partial(encode_texts, tokenizer)

    def refuses(messages: Sequence[Message], names: Sequence[str] | None) -> str | None:
        tools = [
            schema for name, schema in prepared.tools.items() if names is None or name in names
        ]
        try:
            (found,) = mask_conversations(
                tokenizer,
                [(messages, tools)],
                encode,
                stop_ids=rendered.stop_ids,
                reasoning_mode=mode,
            )
        except InputError:  # it takes too long over this one
            return TEMPLATE_REFUSES
        if isinstance(found, TemplateFault):
            return TEMPLATE_REFUSES
        if isinstance(found, MaskFault):
            return NOT_TOLD
        return TOO_LONG if len(found.token_ids) > rendered.window else None

    named = prepared.student.resolved.path, tokenizer.chat_template
    return Reader(
        digest=digest(*named, rendered.stop_ids, rendered.window, mode, prepared.tools),
        refuses=refuses,
    )
