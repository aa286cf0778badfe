"""What is read from the docstring styles that people write."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.core.docstrings import read_docstring

GOOGLE = """Search the web.

    Pages come best first.

    Args:
        query: what to look for,
            in a few words
        limit (int, optional): how many: at most ten
        **rest: ignored

    Returns:
        The pages.

    Raises:
        ValueError: no query

    Note:
        Be patient.
    """
NUMPY = """Search the web.

    Pages come best first.

    Parameters
    ----------
    query : str
        what to look for,
        in a few words
    limit, rest : int, optional
        how many

    Returns
    -------
    list
        the pages

    Notes
    -----
    Be patient.
    """
REST = """Search the web.

    Pages come best first.

    :param query: what to look for,
        in a few words
    :param int limit: how many
    :type query: str
    :returns: the pages
    :rtype: list
    :raises ValueError: no query
    """


def read(text: str) -> tuple[str, dict[str, str]]:
    found = read_docstring(inspect.cleandoc(text))
    return found.description, found.parameters


def test_google() -> None:
    description, parameters = read(GOOGLE)
    assert description == "Search the web.\n\nPages come best first.\n\nNote:\n    Be patient."
    assert parameters == {
        "query": "what to look for, in a few words",
        "limit": "how many: at most ten",
        "rest": "ignored",
    }


def test_numpy() -> None:
    description, parameters = read(NUMPY)
    assert description == "Search the web.\n\nPages come best first.\n\nNotes\n-----\nBe patient."
    assert parameters == {
        "query": "what to look for, in a few words",
        "limit": "how many",
        "rest": "how many",
    }


def test_rest() -> None:
    description, parameters = read(REST)
    assert description == "Search the web.\n\nPages come best first."
    assert parameters == {"query": "what to look for, in a few words", "limit": "how many"}


@pytest.mark.parametrize(
    "text",
    [
        "Parameters of the model are listed.",
        "Args: the arguments of a command",
        "Returns the page",
        "See the table:\n    a: 1\n    b: 2",
        "Tell the time: now.",
    ],
)
def test_prose_is_no_section(text: str) -> None:
    assert read(text) == (inspect.cleandoc(text), {})


def test_a_section_may_be_empty_or_last() -> None:
    assert read("Do it.\n\nArgs:\n") == ("Do it.", {})
    assert read("Do it.\nArgs:\n\n    x: one\n\n      more\n") == ("Do it.", {"x": "one more"})


@given(st.text(alphabet=st.sampled_from("aA:-= \n\t(*)raisArgReturnsparm"), max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    found = read_docstring(inspect.cleandoc(text))
    assert set(found.description.split()) <= set(text.split())
