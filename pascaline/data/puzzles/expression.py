"""A strict reader of arithmetic: ASCII digits, + - * / and brackets, exact fractions, bounded time.

It never evaluates text as code. Two stacks (Dijkstra's shunting yard) instead of recursion, so deep nesting costs
nothing; the caps on length and on a run of digits bound every number that can arise.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 256  # characters; an honest answer with four numbers has under 30
MAX_DIGITS = 9

_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_TOKEN = re.compile(r"[0-9]+|[+\-*/()]")
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value and the numbers in reading order, or None if `text` is not such an expression.

    Not accepted: a sign before a number, powers, a number with a leading zero or more than MAX_DIGITS digits, a
    missing multiplication sign, division by zero, anything longer than MAX_LENGTH. Spaces may stand between tokens.
    Time is linear in min(len(text), MAX_LENGTH).
    """
    if len(text) > MAX_LENGTH or not _ALLOWED.fullmatch(text):
        return None
    values: list[Fraction] = []
    operators: list[str] = []
    numbers: list[int] = []
    want_number = True
    for token in _TOKEN.findall(text):
        if want_number:
            if token == "(":
                operators.append(token)
                continue
            if not _is_number(token):
                return None
            numbers.append(int(token))
            values.append(Fraction(numbers[-1]))
            want_number = False
        elif token in _RANK:
            if not _reduce(values, operators, _RANK[token]):
                return None
            operators.append(token)
            want_number = True
        elif token != ")" or not _reduce(values, operators, 1) or not operators:
            return None
        else:
            operators.pop()  # the "(" that _reduce stopped at
    if want_number or not _reduce(values, operators, 1) or operators:
        return None
    return values[0], numbers


def rewritten(text: str) -> list[str]:
    """An expression that `evaluate` accepts, without its spaces, and what is left of it after each operation: (13-1)*2, 12*02, 24.

    Innermost brackets come first, in them products before sums, and the left before the right. Results and what stands beside them have two
    digits; one that is negative or no whole number stands in brackets, but for the last.
    """
    tokens: list[Fraction | str] = [Fraction(token) if token.isdecimal() else token for token in _TOKEN.findall(text)]
    forms = ["".join(map(str, tokens))]
    while len(tokens) > 1:
        end = tokens.index(")") if ")" in tokens else len(tokens)
        begin = max((i for i in range(end) if tokens[i] == "("), default=-1) + 1
        if end - begin == 1:
            tokens[begin - 1 : end + 1] = [tokens[begin]]  # a number in brackets
            continue
        at = next((i for i in range(begin, end) if tokens[i] in ("*", "/")), begin + 1)
        left, operator, right = tokens[at - 1 : at + 2]
        tokens[at - 1 : at + 2] = [_operate(Fraction(left), str(operator), Fraction(right))]
        if end - begin == 3 and begin:
            tokens[begin - 1 : begin + 2] = [tokens[begin]]
        forms.append("".join(map(_two_digits, tokens)))
    forms[-1] = forms[-1].strip("()")
    return forms


def _two_digits(token: Fraction | str) -> str:
    if isinstance(token, str):
        return token
    return f"{token.numerator:02}" if token.denominator == 1 and token >= 0 else f"({token})"


def _is_number(token: str) -> bool:
    return token[0] in "0123456789" and len(token) <= MAX_DIGITS and (token[0] != "0" or token == "0")


def _reduce(values: list[Fraction], operators: list[str], rank: int) -> bool:
    """Apply the waiting operators of at least this rank, back to the last open bracket; False: division by zero."""
    while operators and operators[-1] != "(" and _RANK[operators[-1]] >= rank:
        operator, right, left = operators.pop(), values.pop(), values.pop()
        if operator == "/" and right == 0:
            return False
        values.append(_operate(left, operator, right))
    return True


def _operate(left: Fraction, operator: str, right: Fraction) -> Fraction:
    if operator in "+-":
        return left + right if operator == "+" else left - right
    return left * right if operator == "*" else left / right
