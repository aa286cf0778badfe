import asyncio
import os
from typing import Literal

from rnow.core.tool import tool
from rnow.models import ToolArgs


@tool
def search(query: str, limit: int = 10) -> dict:
    """Search for information.

    Args:
        query: What to look for
        limit: How many results at most
    """
    return {"results": [f"{query} {number}" for number in range(1, 4)][:limit]}


@tool
def calculator(expression: str) -> float:
    """Evaluate a math expression."""
    return eval(expression)


@tool
def careful_calculator(expression: str) -> dict:
    """Evaluate a mathematical expression.

    Args:
        expression: For example "2 + 3 * 4"
    """
    try:
        if not all(letter in "0123456789+-*/.() " for letter in expression):
            return {"error": "Invalid characters"}
        return {"result": eval(expression)}
    except Exception as error:
        return {"error": str(error)}


@tool(timeout=30)
async def weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict:
    """The weather in a city.

    Args:
        city: Its name
        unit: Of the temperature
    """
    await asyncio.sleep(0)
    return {"city": city, "temperature": 20 if unit == "celsius" else 68}


@tool
def total(numbers: list, weights: dict | None = None, rounded: bool = False) -> float:
    """Add up numbers.

    Args:
        numbers: What to add
        weights: By position, as text; 1 where there is none
        rounded: To a whole number
    """
    found = sum(n * (weights or {}).get(str(place), 1) for place, n in enumerate(numbers))
    return round(found) if rounded else found


@tool
def sql(args: ToolArgs, query: str) -> str:
    """Run a query against the database of this entry.

    Args:
        query: The SQL
    """
    return f"{args.metadata['db_id']}: {query}"


@tool
def has_key() -> bool:
    """Whether the key of the service is there."""
    return os.environ["SEARCH_API_KEY"] == "search-key-1"
