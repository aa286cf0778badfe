"""The decorator, and both ways of importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rnow.core import RewardArgs, get_response, reward
from rnow.core.reward import REWARDS

IMPORT_ORDERS = {
    "package first": "from rnow.core import reward\nfrom rnow.core.reward import reward as inner, RewardArgs",
    "submodule first": "from rnow.core.reward import reward as inner, RewardArgs\nfrom rnow.core import reward",
    "plain import first": "import rnow.core.reward\nfrom rnow.core import reward\nfrom rnow.core.reward import reward as inner",
    "importlib": "import importlib\ninner = importlib.import_module('rnow.core.reward').reward\nfrom rnow.core import reward",
}


@pytest.mark.parametrize("lines", IMPORT_ORDERS.values(), ids=list(IMPORT_ORDERS))
def test_the_decorator_has_one_meaning_in_every_import_order(lines: str) -> None:
    check = (
        "import sys\n"
        "assert reward is inner, (reward, inner)\n"
        "@reward\ndef f(args, messages): return 1.0\n"
        "assert f(None, []) == 1.0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{lines}\n{check}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_decorated_function_stays_itself() -> None:
    def f(args: RewardArgs, messages: list) -> float:
        return 0.25

    assert reward(f) is f
    spec = REWARDS.spec_of(f)
    assert spec is not None
    assert (spec.name, spec.precondition, spec.sandbox, spec.timeout) == ("f", False, False, None)
    assert not spec.is_async


def test_options() -> None:
    @reward(precondition=True, sandbox=False, timeout=5)
    async def g(args: RewardArgs, messages: list) -> float:
        return 1.0

    spec = REWARDS.spec_of(g)
    assert spec is not None
    assert spec.precondition
    assert spec.is_async
    assert spec.timeout == 5.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"timeout": True}, "timeout must be a positive number"),
        ({"timeout": "5"}, "timeout must be a positive number"),
        ({"precondition": 1}, "precondition must be True or False"),
        ({"sandbox": "no"}, "sandbox must be True or False"),
        ({"precondtion": True}, "precondtion"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        reward(**options)


def test_only_functions_are_decorated() -> None:
    with pytest.raises(TypeError, match="decorates a function, not type"):
        reward(dict)


def test_a_wrapper_is_not_a_reward_by_itself() -> None:
    import functools

    @reward
    def f(args: RewardArgs, messages: list) -> float:
        return 1.0

    @functools.wraps(f)
    def wrapper(*args: object) -> float:
        return f(*args)

    assert REWARDS.spec_of(wrapper) is None


def test_collecting_ends_with_its_block() -> None:
    with REWARDS.collect() as outer:

        @reward
        def inside(args: RewardArgs, messages: list) -> float:
            return 1.0

    @reward
    def outside(args: RewardArgs, messages: list) -> float:
        return 1.0

    assert [spec.name for spec in outer] == ["inside"]


def test_secrets_are_not_in_the_repr() -> None:
    assert "hunter2" not in repr(RewardArgs(secrets={"KEY": "hunter2"}))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], ""),
        ([{"role": "user", "content": "hi"}], ""),
        ([{"role": "assistant", "content": " 42 \n"}], "42"),
        ([{"role": "assistant", "content": "<think>a\nb</think>\n\n42"}], "42"),
        ([{"role": "assistant", "content": "<think>a</think>4<think>b</think>2"}], "42"),
        ([{"role": "assistant", "content": "opened in the prompt</think>42"}], "42"),
        ([{"role": "assistant", "content": "<think>cut off"}], ""),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], ""),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "4"}, {"type": "image"}, {"text": "2"}],
                }
            ],
            "42",
        ),
        (
            [
                {"role": "assistant", "content": "old"},
                {"role": "assistant", "content": "new"},
                {"role": "tool", "content": "result"},
            ],
            "new",
        ),
    ],
)
def test_get_response(messages: list, expected: str) -> None:
    assert get_response(messages) == expected
