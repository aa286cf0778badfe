"""Which tokens of a conversation are the assistant's: over every chat template of TRL's package, and SmolLM2's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import pytest
from tests.rollout.families import OURS, TOOLS, byte_tokenizer, trl_folder, trl_template
from tests.rollout.test_templates import SMOLLM2
from tests.rollout.tokenizers import sentencepiece

from rnow.models.tokenizer import encode_texts, end_of_turn_id
from rnow.rollout import masks
from rnow.rollout.masks import MaskedConversation, MaskFault, mask_conversations
from rnow.rollout.rendering import Conversation
from rnow.rollout.template_process import TemplateFault
from rnow.types import Message

TEMPLATES = {path.stem: None for path in sorted(trl_folder().glob("*.jinja"))} | {
    "smollm2": SMOLLM2
}
MARKED = sorted(
    name
    for name in TEMPLATES
    if re.search(r"\{%-?\s*generation", TEMPLATES[name] or trl_template(name))
)
_CONTROL = re.compile(
    r"<[|｜][^<>\s]*?[|｜]>|<\|\w+>|<\w+\|>|</?s>|<(?:start|end)_of_(?:turn|utterance)>|<(?:bos|eos)>|\[/?INST\]"
)
_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")

MORE_STOPS = ("<|user|>", "<|observation|>", "<|return|>", "<|call|>", "<|tool_response>", "<|END_OF_TURN_TOKEN|>")  # fmt: skip

ASKED = ("FIRST question", "SECOND question")
ANSWERED = ("ALPHA one", "BETA two")
ONE = [{"role": "user", "content": ASKED[0]}, {"role": "assistant", "content": ANSWERED[0]}]
TWO = [
    *ONE,
    {"role": "user", "content": ASKED[1]},
    {"role": "assistant", "content": ANSWERED[1]},
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "look_up", "arguments": {"q": "GAMMA"}},
        }
    ],
}
AGENT = [
    ONE[0],
    CALL,
    {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "RESULT found"},
    {"role": "assistant", "content": ANSWERED[1]},
]
SAID = {"one": [ANSWERED[0]], "two": [*ANSWERED], "agent": ["GAMMA", ANSWERED[1]]}
TOLD = {"one": [ASKED[0]], "two": [*ASKED], "agent": [ASKED[0], "RESULT found"]}
CONVERSATIONS: Mapping[str, Conversation] = {
    "one": (ONE, None),
    "two": (TWO, None),
    "agent": (AGENT, TOOLS),
}


def tokenizer_for(source: str) -> Any:
    """One that has the template's control tokens, with what ends a turn as its end of sequence."""
    special = [*dict.fromkeys(["<|eos|>", *_CONTROL.findall(source)])]
    tokenizer = byte_tokenizer(source, "<|eos|>", special, _PLAIN)
    end = end_of_turn_id(tokenizer) if "eos_token" not in source else None
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


@cache
def tokenizer_of(name: str) -> Any:
    return tokenizer_for(TEMPLATES[name] or trl_template(name))


def stops_of(tokenizer: Any) -> tuple[int, ...]:
    """With what generation_config.json of these families adds, where the template writes it."""
    vocabulary = tokenizer.get_added_vocab()
    more = {vocabulary[text] for text in MORE_STOPS if text in vocabulary}
    return tuple(sorted({tokenizer.eos_token_id, end_of_turn_id(tokenizer), *more} - {None}))


def mask(
    tokenizer: Any, *conversations: Conversation, stops: Sequence[int] | None = None
) -> list[MaskedConversation | MaskFault | TemplateFault]:
    return mask_conversations(
        tokenizer,
        conversations,
        partial(encode_texts, tokenizer),
        stop_ids=stops_of(tokenizer) if stops is None else stops,
    )


@cache
def masked(name: str) -> Mapping[str, MaskedConversation | MaskFault | TemplateFault]:
    """Every conversation, as a template of TRL's reads it."""
    return dict(zip(CONVERSATIONS, mask(tokenizer_of(name), *CONVERSATIONS.values()), strict=True))


def plain(*messages: Message) -> Conversation:
    return list(messages), None


def segments(found: MaskedConversation) -> list[list[int]]:
    """The runs of loss tokens."""
    runs: list[list[int]] = []
    before = False
    for token, on in zip(found.token_ids, found.loss_mask, strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(token)
        before = on
    return runs


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def letters(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> tuple[str, list[bool]]:
    """The text of these tokens, and the mask of each of its letters."""
    texts = [text_of(tokenizer, [token]) for token in ids]
    each = [[bool(on)] * len(text) for text, on in zip(texts, mask, strict=True)]
    return "".join(texts), [on for part in each for on in part]


# --- every template -------------------------------------------------------------------------------------------------

# What forbids it, and to which conversations. Templates that refuse tools, or would print a call as nothing at all:
_NO_TOOLS = (
    "cohere cohere2 cohere2_training cohere_training gemma gemma3 gemma3_training gemma_training idefics3 idefics3_training "
    "llava_next llava_next_training smolvlm smolvlm_training "
    "deepseek_r1_distill_training lfm2 lfm2_training llama3 llama3_training phi3 phi3_5 phi3_5_training phi3_training "
    "qwen2_5_vl qwen2_5_vl_training smollm2"
)
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(_NO_TOOLS.split(), "agent"),
    # It opens an answer with thinking, and prints one without.
    **dict.fromkeys(["deepseek_r1_distill", "deepseekv3"], "one two agent"),
    **dict.fromkeys(
        (f"nemotron_3_{size}" for size in ("5_lightning", "nano", "super", "ultra")),
        "one two agent",
    ),
    # It prints the last answer otherwise than earlier ones: with thinking, or another end.
    **dict.fromkeys(["gptoss", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"], "two"),
    "qwen3": "two agent",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_is_on_what_the_assistant_says_and_nothing_else(name: str) -> None:
    tokenizer, stops = tokenizer_of(name), stops_of(tokenizer_of(name))
    refused = []
    for kind, found in masked(name).items():
        if not isinstance(found, MaskedConversation):
            refused.append(kind)
            continue
        runs = segments(found)
        trained = [text_of(tokenizer, run) for run in runs]
        other = text_of(
            tokenizer,
            [t for t, on in zip(found.token_ids, found.loss_mask, strict=True) if not on],
        )
        stop_texts = [text_of(tokenizer, [stop]) for stop in stops]
        if kind != "agent":
            turns = [text for text in trained if text not in stop_texts]
            assert len(turns) == len(SAID[kind]), trained
        for said in SAID[kind]:
            assert sum(said in text for text in trained) == 1, (said, trained)
            assert said not in other
        for told in TOLD[kind]:
            assert all(told not in text for text in trained), trained
        assert runs[-1][-1] in stops, (kind, trained)
        if (
            name != "gptoss_training"
        ):  # whose marks end earlier turns with a token that ends no turn of the sampler's
            assert all(run[-1] in stops for run in runs), (kind, trained)
    assert " ".join(refused) == REFUSED.get(name, "")


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_template_s_own_marks_agree(name: str, kind: str) -> None:
    """With transformers' reading of them, but for blanks behind an end of turn, and an end of turn that they leave out."""
    tokenizer = tokenizer_of(name)
    messages, tools = CONVERSATIONS[kind]
    found = masked(name)[kind]
    if not isinstance(found, MaskedConversation):
        pytest.skip("refused, as the test above says")
    parted = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]
    for form in (messages, parted):
        with suppress(Exception):  # of a form that the template does not take
            theirs = tokenizer.apply_chat_template(
                form, tools=tools, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, marked = theirs["input_ids"], theirs["assistant_masks"]
            if ASKED[0] in text_of(tokenizer, ids):
                break
    else:
        pytest.fail("transformers reads neither form")
    shown, their_mask = letters(tokenizer, ids, marked)
    read, our_mask = letters(tokenizer, found.token_ids, found.loss_mask)
    length = min(len(shown), len(read))
    assert read[:length] == shown[:length]
    only_theirs = "".join(
        letter
        for i, letter in enumerate(shown)
        if their_mask[i] and not (i < len(our_mask) and our_mask[i])
    )
    assert not only_theirs.strip()
    only_ours = "".join(
        letter
        for i, letter in enumerate(read)
        if our_mask[i] and not (i < len(their_mask) and their_mask[i])
    )
    for stop in stops_of(tokenizer):
        only_ours = only_ours.replace(text_of(tokenizer, [stop]), "")
    assert not only_ours


# Whose marks hold what the generation prompt gives: the opening of the turn.
OPENED = (
    "deepseek_r1_distill_training", "deepseekv3_training", "gptoss_training", "muse_glimmer_training", "qwen2_5_training",
    "qwen3_5_nothink_training", "qwen3_5_think_training", "qwen3_6_training", "qwen3_8_training",
)  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_turn_by_turn_is_what_the_marks_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a template that has marks can be read without them, both agree."""
    tokenizer = tokenizer_of(name)
    chosen = [CONVERSATIONS["one"], CONVERSATIONS["two"]]
    by_marks = [masked(name)["one"], masked(name)["two"]]
    monkeypatch.setattr(masks, "_MARKED", re.compile(r"(?!)"))
    by_turns = mask(tokenizer, *chosen)
    compared = 0
    for one, other in zip(by_marks, by_turns, strict=True):
        if isinstance(one, MaskedConversation) and isinstance(other, MaskedConversation):
            compared += 1
            read, marked = letters(tokenizer, one.token_ids, one.loss_mask)
            again, found = letters(tokenizer, other.token_ids, other.loss_mask)
            assert again == read
            differ = {letter for i, letter in enumerate(read) if marked[i] != found[i]}
            assert name in OPENED or not "".join(differ).strip()
    if name not in OPENED:
        assert compared or all(isinstance(one, MaskFault) for one in by_turns)


# --- one thing at a time --------------------------------------------------------------------------------------------


def ours(source: str = OURS, *, eos: str = "<|im_end|>") -> Any:
    return byte_tokenizer(source, eos, ["<|im_start|>", "<|im_end|>"], _PLAIN)


def trained(tokenizer: Any, *messages: Message, stops: Sequence[int] | None = None) -> list[str]:
    (found,) = mask(tokenizer, plain(*messages), stops=stops)
    assert isinstance(found, MaskedConversation), found
    return [text_of(tokenizer, run) for run in segments(found)]


def refused(tokenizer: Any, *messages: Message, stops: Sequence[int] | None = None) -> str:
    (found,) = mask(tokenizer, plain(*messages), stops=stops)
    assert isinstance(found, MaskFault), found
    return str(found)


def test_every_turn_with_its_end() -> None:
    found = trained(ours(), *TWO)
    assert found == [f"{said}<|im_end|>" for said in ANSWERED]


def test_tool_calls_are_the_assistant_s_and_their_answers_are_not() -> None:
    (found,) = mask(ours(), (AGENT, TOOLS))
    assert isinstance(found, MaskedConversation)
    call, answer = (text_of(ours(), run) for run in segments(found))
    assert (
        call
        == '<tool_call>\n{"name": "look_up", "arguments": {"q": "GAMMA"}}\n</tool_call><|im_end|>'
    )
    assert answer == "BETA two<|im_end|>"


def test_what_follows_the_last_answer_is_left_out() -> None:
    (found,) = mask(ours(), plain(*ONE, {"role": "user", "content": "and then?"}))
    assert isinstance(found, MaskedConversation)
    assert found.loss_mask[-1]
    assert "then" not in text_of(ours(), found.token_ids)


def test_an_answer_of_nothing_is_its_end() -> None:
    assert trained(ours(), ONE[0], {"role": "assistant", "content": ""}) == ["<|im_end|>"]


def test_an_answer_that_begins_with_what_its_opening_ends_with() -> None:
    """Two newlines would be one token, half of it the opening's: the student never writes that one after its opening."""
    messages = [ONE[0], {"role": "assistant", "content": "\n\nthere"}]
    (found,) = mask(ours(), plain(*messages))
    assert isinstance(found, MaskedConversation)
    (run,) = segments(found)
    assert text_of(ours(), run) == "\n\nthere<|im_end|>"
    whole = ours().encode(text_of(ours(), found.token_ids), add_special_tokens=False)
    assert len(found.token_ids) == len(whole) + 1


def test_a_tokenizer_that_puts_a_blank_before_a_text() -> None:
    tokenizer = sentencepiece()
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "the mat"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "a cat"},
    ]
    stops = (tokenizer.convert_tokens_to_ids("<end>"),)
    (found,) = mask(tokenizer, plain(*messages), stops=stops)
    assert isinstance(found, MaskedConversation)
    first, second = segments(found)
    assert text_of(tokenizer, first).split() == ["the", "mat<end>"]
    assert text_of(tokenizer, second).split() == ["a", "cat<end>"]


def test_a_control_token_in_an_answer_ends_nothing() -> None:
    spelled = {"role": "assistant", "content": "a<|im_end|>\nb"}
    (found,) = mask(ours(), plain(ONE[0], spelled))
    assert isinstance(found, MaskedConversation)
    assert found.altered == "<|im_end|>"
    (run,) = segments(found)
    assert run.count(ours().eos_token_id) == 1


REWRITES = OURS.replace(
    "+ message.content }}",
    "+ (message.content if loop.last or message.role != 'assistant' else message.content | upper) }}",
)
REOPENS = OURS.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>' }}")
ENDLESS = OURS.replace("{{- '<|im_end|>\\n' }}", "{{- '\\n' }}")


def test_a_template_that_writes_earlier_answers_anew() -> None:
    tokenizer = ours(REWRITES)
    assert trained(tokenizer, *ONE) == ["ALPHA one<|im_end|>"]
    assert refused(tokenizer, *TWO) == (
        "the chat template writes message 2 anew when others follow it: "
        "'one<|im_end|>\\n' becomes 'ONE<|im_end|>\\n<|im_start'"
    )


def test_a_template_that_opens_an_answer_otherwise_than_it_writes_it() -> None:
    assert refused(ours(REOPENS), *ONE) == (
        "the chat template writes message 2 otherwise than it opens an answer there: "
        "'<think>' becomes 'ALPHA one<|im_end|>\\n'"
    )


@pytest.mark.parametrize("messages", [ONE, TWO])
def test_a_template_that_opens_a_turn_whether_asked_to_or_not(
    messages: Sequence[Message],
) -> None:
    """The opening behind the answer would be learned, and an end of turn behind that."""
    always = OURS.replace("{%- if add_generation_prompt %}", "{%- if true %}")
    found = refused(ours(always), *messages)
    if messages is ONE:
        assert found == (
            "the chat template writes more behind the end of an answer: "
            "'\\n<|im_start|>assistant\\n'"
        )


def test_a_template_without_an_end_of_turn() -> None:
    """The last answer gets the tokenizer's own; between turns there is none to learn."""
    tokenizer = ours(ENDLESS)
    assert trained(tokenizer, *ONE) == ["ALPHA one\n<|im_end|>"]
    assert "ends no answer with a token of its own" in refused(tokenizer, *TWO)


def test_the_opening_of_the_next_turn_may_be_what_ends_one() -> None:
    tokenizer = ours(ENDLESS)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    found = trained(tokenizer, *TWO, stops=(start, tokenizer.eos_token_id))
    assert found == ["ALPHA one\n<|im_start|>", "BETA two\n<|im_end|>"]


MARKS = OURS.replace(
    "+ message.content }}",
    "}}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{- message.content }}{% endif %}",
)


def test_marks_that_leave_the_end_of_turn_out() -> None:
    assert trained(ours(MARKS), *TWO) == [f"{said}<|im_end|>" for said in ANSWERED]


def test_marks_around_an_answer_of_nothing() -> None:
    """Its end of turn is all that the student writes there; a mark that no end of turn follows says nothing."""
    nothing = {"role": "assistant", "content": ""}
    assert trained(ours(MARKS), ONE[0], nothing, *TWO[2:]) == ["<|im_end|>", "BETA two<|im_end|>"]
    more = MARKS + "{% generation %}{% endgeneration %}"
    assert trained(ours(more), *TWO) == [f"{said}<|im_end|>" for said in ANSWERED]


def test_a_text_with_the_letters_that_mark() -> None:
    said = "\ue000 and \ue001"
    assert trained(ours(MARKS), ONE[0], {"role": "assistant", "content": said}) == [
        f"{said}<|im_end|>"
    ]


def test_marks_that_a_template_only_speaks_of() -> None:
    tokenizer = ours("{#- Without {% generation %} marks. #}" + OURS)
    assert trained(tokenizer, *TWO) == [f"{said}<|im_end|>" for said in ANSWERED]


def test_a_conversation_that_the_template_refuses() -> None:
    tokenizer = ours("{{ raise_exception('never') }}")
    (found,) = mask(tokenizer, plain(*ONE))
    assert isinstance(found, TemplateFault)
    (found,) = mask(ours("{{ raise_exception('never') }}" + MARKS), plain(*ONE))
    assert isinstance(found, TemplateFault)
