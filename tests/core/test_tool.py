"""The decorator, and every way of importing it."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest

from rnow.core import ToolArgs, tool
from rnow.core.tool import TOOLS

IMPORT_ORDERS = {
    "package first": "from rnow.core import tool\nfrom rnow.core.tool import tool as inner, ToolArgs",
    "submodule first": "from rnow.core.tool import tool as inner, ToolArgs\nfrom rnow.core import tool",
    "plain import first": "import rnow.core.tool\nfrom rnow.core import tool\nfrom rnow.core.tool import tool as inner",
    "importlib": "import importlib\ninner = importlib.import_module('rnow.core.tool').tool\nfrom rnow.core import tool",
    "through rnow": "from rnow import tool, ToolArgs, reward, RewardArgs, get_response, llm_judge\nfrom rnow.core.tool import tool as inner",
    "schema first": "import rnow.core.tool_schema\nfrom rnow import tool\nfrom rnow.core import tool as inner",
}


@pytest.mark.parametrize("lines", IMPORT_ORDERS.values(), ids=list(IMPORT_ORDERS))
def test_the_decorator_has_one_meaning_in_every_import_order(lines: str) -> None:
    check = (
        "import sys\n"
        "assert tool is inner, (tool, inner)\n"
        "@tool\ndef f(n: int) -> int:\n    'Double.'\n    return 2 * n\n"
        "assert f(2) == 4\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'asyncio', 'http.client'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{lines}\n{check}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_decorated_function_stays_itself() -> None:
    def f(query: str) -> str:
        return query

    assert tool(f) is f
    spec = TOOLS.spec_of(f)
    assert spec is not None
    assert (spec.name, spec.sandbox, spec.timeout, spec.is_async) == ("f", False, None, False)


def test_options() -> None:
    @tool(sandbox=True, timeout=5)
    async def g() -> str:
        return ""

    spec = TOOLS.spec_of(g)
    assert spec is not None
    assert (spec.sandbox, spec.timeout, spec.is_async) == (True, 5.0, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sandbox": 1}, "sandbox must be True or False"),
        ({"timeout": 0}, "positive number of seconds"),
        ({"timeout": float("nan")}, "positive number of seconds"),
        ({"timeout": True}, "positive number of seconds"),
        ({"timeout": "5"}, "positive number of seconds"),
        ({"timout": 5}, "unexpected keyword argument 'timout'"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        tool(**options)


@pytest.mark.parametrize("target", [int, 5, staticmethod(len), functools.partial(len)])
def test_only_functions_are_decorated(target: Any) -> None:
    with pytest.raises(TypeError, match="decorates a function, not"):
        tool(target)


def test_a_wrapper_of_a_tool_is_not_the_tool() -> None:
    @tool
    def f() -> str:
        return ""

    @functools.wraps(f)
    def wrapper() -> str:
        return f()

    assert TOOLS.spec_of(wrapper) is None
    assert TOOLS.spec_of(f) is not None
    assert TOOLS.spec_of("f") is None


def test_tools_are_collected_while_asked_for() -> None:
    with TOOLS.collect() as outer:

        @tool
        def one() -> str:
            return ""

        with TOOLS.collect() as inner:
            tool(timeout=1)(lambda: "")
    tool(one)
    assert [spec.name for spec in outer] == ["one"]
    assert [spec.name for spec in inner] == ["<lambda>"]


def test_tool_args() -> None:
    assert ToolArgs() == ToolArgs(metadata={}, variables={})
