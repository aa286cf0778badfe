import re

from rnow.core import tool

OPERATION = re.compile(r"\s*(-?[0-9]{1,9})\s*([-+*/])\s*(-?[0-9]{1,9})\s*")


@tool
def calc(expression: str) -> str:
    """Work out one operation on two whole numbers, such as 12+34."""
    operation = OPERATION.fullmatch(expression)
    if operation is None:
        raise ValueError("write one operation on two whole numbers, such as 12+34")
    left, sign, right = int(operation[1]), operation[2], int(operation[3])
    if sign == "+":
        return str(left + right)
    if sign == "-":
        return str(left - right)
    if sign == "*":
        return str(left * right)
    if right == 0:
        raise ValueError("division by zero")
    return f"{left / right:.10g}"
