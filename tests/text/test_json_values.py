"""What tables hold, as JSON holds it."""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.text.json_values import NoJsonValue, read_arguments, to_json_value

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)  # fmt: skip


def without_nulls(value: object) -> object:
    """``value`` without the keys that hold null: an absent key and null are one. Nulls in lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


@given(values)
def test_json_stays_but_for_keys_with_null(value: Any) -> None:
    assert to_json_value(value) == without_nulls(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (datetime(2024, 5, 1, 3, tzinfo=UTC), "2024-05-01T03:00:00+00:00"),
        (date(2024, 5, 1), "2024-05-01"),
        (time(3, 4), "03:04:00"),
        (timedelta(minutes=1), 60.0),
        (Decimal("1.50"), 1.5),
        (Decimal(10) ** 20, 10**20),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        ((1, 2), [1, 2]),
        ({"a": None, "b": [None, {"c": None}]}, {"b": [None, {}]}),
        (None, None),
    ],
)
def test_what_json_has_no_type_for(value: object, expected: object) -> None:
    found = to_json_value(value)
    assert found == expected
    assert json.loads(json.dumps(found)) == expected


@pytest.mark.parametrize("value", [b"\x00\xff", math.nan, math.inf, Decimal("NaN"), {1, 2}])
def test_what_json_cannot_hold(value: object) -> None:
    with pytest.raises(NoJsonValue) as caught:
        to_json_value({"a": [1, value]})
    assert caught.value.path == ("a", 1)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"a": 1}, {"a": 1}),
        ('{"a": 1, "b": null}', {"a": 1}),
        ("", {}),
        ("Paris", None),
        ("[1]", None),
        (None, None),
        (3, None),
    ],
)
def test_arguments(given: object, expected: object) -> None:
    assert read_arguments(given) == expected
