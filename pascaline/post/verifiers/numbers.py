"""Numbers, read strictly and compared exactly: the verifiers `integer` and `expression`, and `reading` for majority votes.

Where the final answer stands, the first that there is: after `####`, as GSM8K writes it; in LaTeX's \\boxed{}; after "answer is",
"answer:" or <answer>, up to the end of the sentence; else it is the whole text. Marks of one kind must agree. What stands there must be
one number: the same may come again with words between, but a list ("1 2 3 .. 7"), a range ("3-5"), a time or a sum is none, so that no
answer is right for its last number.

A number: ASCII digits, a sign that touches it (- or U+2212), thousands separated by commas in threes, a decimal point. Currency and
units around it are passed over, and so is a per cent sign: 15% is 15, and 0.15 is not. What makes it another number (5 million, 1e5,
2^3, > 5, √4) or may do so (a dash with a space behind it, digits of other scripts) makes the text unreadable, which is wrong.
The words around a number are not understood: "not 42" is read as 42; nor is algebra: "5y" is 5 of a unit. All takes linear time.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from pascaline.data.puzzles.expression import MAX_LENGTH, evaluate
from pascaline.errors import BadInput
from pascaline.post.verifiers.base import Scores, answers, column

GOLD = ("answer", "solution", "ground_truth", "label")
MAX_DIGITS = 1000  # of one number, so that arithmetic on it costs little

Value = str | None  # "42" or, in lowest terms, "3/4"; "" where there is no number, None for what cannot be read


# ---- the verifiers -----------------------------------------------------------------------------------------------------


def integer(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> Scores:
    """1.0 for the whole number of the column `answer` (or solution, ground_truth, label), else 0.0.

    The column holds ints or texts as GSM8K's; BadInput for one that is no whole number. Sums are not worked out: 40+2 is not 42.
    """
    return _compared("integer", integer_reading, completions, columns)


def expression(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> Scores:
    """1.0 for the exact value of the column `answer` (or solution, ground_truth, label), else 0.0: 3/4 is 0.75, 6/8 and 1/2+1/4.

    The gold and the answer are numbers, fractions or arithmetic (see `reading`); a JSON number means the decimal as written. BadInput for
    a gold that is none of them. Not for questions that are sums themselves: who repeats the question is right.
    """
    return _compared("expression", reading, completions, columns)


def _compared(verifier: str, read: Callable[[str], Value], completions: Sequence[str], columns: dict[str, Any]) -> Scores:
    golds = [_gold(verifier, read, g if isinstance(g, str) else repr(g)) for g in column(columns, verifier, *GOLD)]
    given = answers(completions)
    return [float(answer is not None and read(answer) == gold) for answer, gold in zip(given, golds, strict=True)]


@lru_cache(maxsize=4096)  # a group of samples has one gold
def _gold(verifier: str, read: Callable[[str], Value], text: str) -> str:
    """The gold's value. It is read as an answer is, so that a whole rationale with `#### 42` serves too."""
    value = None if text.startswith(("[", "{")) else read(text)
    if value is None or (verifier == "integer" and "/" in value):
        need = "whole number, as 42 or '#### 1,200'" if verifier == "integer" else "number, fraction or sum, as '3/4'"
        raise BadInput(f"verifier '{verifier}': the gold answer {text[-60:]!r} must be one {need}.")
    return value


# ---- where the answer stands -------------------------------------------------------------------------------------------

_USUAL = re.compile(r"\s*(-?)\$?([1-9][0-9]{0,2}(?:,[0-9]{3}){1,5}|[1-9][0-9]{0,17})(?:\.0{1,2})?\.?\s*")  # 42, $1,200.00
_HASHED = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_QUANTITY = re.compile(  # what stands behind #### if that is no heading: "#### Step 1", "#### 1. Add"
    r"(?![0-9]+[.)]\s+\S)(?:[-\u2212+*$€£¥₹(.\s]|\\[$(])*(?:[0-9]|\\[dtc]?frac)"
)
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"[{}]")
_SAID = re.compile(r"""(?i:\banswers?\b["'*_\s]*(?:is\b|:|=|>))["'*_:\s]*([^\n]*?)(?=[.!?](?:\s|\Z)|\n|\Z)""")


def reading(text: str) -> str | None:
    """The exact value of an answer (without its thought) in its one form: "42", or "3/4" in lowest terms; None if it has none.

    Reads numbers, fractions, and arithmetic with + - * / and brackets if nothing else stands beside it (so that here "3-5" is -2).
    Arithmetic has the limits of pascaline.data.puzzles.expression: numbers of 9 digits, 256 characters.
    """
    return _found(text, _value)


def integer_reading(text: str) -> str | None:
    """As `reading`, but of single numbers only: arithmetic, a range or a fraction ("84/2") has no value."""
    return _found(text, _single)


def _found(text: str, read: Callable[[str], Value]) -> str | None:
    if usual := _usual(text):
        return usual
    for places in (_hashed, _boxed, _said):
        values = {_usual(place) or read(_plain(place)) for place in places(text)}
        if places is not _boxed:  # what is boxed is the answer, be it a number or not
            values.discard("")
        if values:
            return (values.pop() or None) if len(values) == 1 else None
    return read(_plain(text)) or None


def _usual(text: str) -> str | None:
    """What `read` gives for most answers of a trained model, at twenty times the speed; None for all else."""
    usual = _USUAL.fullmatch(text)
    return usual[1] + usual[2].replace(",", "") if usual else None


def _hashed(text: str) -> list[str]:
    return [place for place in _HASHED.findall(text) if _QUANTITY.match(place.lstrip())] if "####" in text else []


def _boxed(text: str) -> list[str]:
    """What stands in each \\boxed{}; "" for one that is not closed."""
    found: list[str] = []
    at = 0
    while box := _BOX.search(text, at):
        depth, begin, at = 1, box.end(), len(text)
        for brace in _BRACE.finditer(text, begin):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                at = brace.end()
                break
        found.append(text[begin : at - 1] if depth == 0 else "")
    return found


def _said(text: str) -> list[str]:
    return _SAID.findall(text)


# ---- LaTeX and spaces --------------------------------------------------------------------------------------------------

_SPACES = re.compile(r"[^\S\n]+")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|([0-9])\s*([0-9]))")
_LATEX = [
    (re.compile(pattern), by)
    for pattern, by in [
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}(\^?)", r" \1\2"),
        (r"\{,\}|(?<=[0-9])\\,(?=[0-9]{3})", ","),
        (r"\\!|\\(?:left|right)(?![A-Za-z])", ""),
        (r"\\[,;: ()\[\]]|\\q?quad(?![A-Za-z])", " "),
        (r"\^?\{?\\(?:circ|degree)(?![A-Za-z])\}?", "°"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "×"),
        (r"\\div(?![A-Za-z])", "÷"),
        (r"\\([$%#&])", r"\1"),
    ]
]


def _plain(text: str) -> str:
    """The text with one kind of minus and single spaces, and with the LaTeX that stands around numbers written out."""
    if "\\" in text or "{" in text:
        text = _FRACTION.sub(_fraction, text)
        for pattern, by in _LATEX:
            text = pattern.sub(by, text)
        text = text.replace("{", "(").replace("}", ")")
    return _SPACES.sub(" ", text.replace("\u2212", "-"))


def _fraction(match: re.Match[str]) -> str:
    over, under = match.group(1, 2) if match[3] is None else match.group(3, 4)
    return f"({over}/{under})" if over.removeprefix("-").isdigit() and under.isdigit() else f"(({over})/({under}))"


# ---- one number in a text ----------------------------------------------------------------------------------------------

REACH = 16  # characters before a number that are looked at
_RUN = re.compile(r"\.?[0-9][0-9.,]*(?:/[0-9][0-9,]*)?")
_DECIMAL = re.compile(r"([1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?")
_WORD = re.compile(r"[^\W\d_]{2}|\n")
_IN_A_NAME = re.compile(r"[A-Za-z\u00c0-\u024f\u0370-\u052f](?:\^\(?|[-_])?\Z")  # m2, cm^2, x_1, GPT-4
_CURRENCY = "$€£¥₹₩₽¢"
_MARK = re.compile(rf"(?:[{_CURRENCY}]?([-+])[{_CURRENCY}]?|[{_CURRENCY}])\Z")
_DASHES = frozenset("‐‑‒–—―")
_OPERATORS = frozenset("+-/^<>≤≥≈~√±×÷·")
_ALTERED = re.compile(
    r"[\^+]|[eE][-+]?[0-9]|(?:[kKMBx]|[bm]n)(?![^\W\d_])"
    r"|[- ]?(?i:hundred|thousand|million|billion|trillion|dozen|lakh|crore|[百千万萬亿億])"
)


def _single(text: str, fractions: bool = False) -> Value:
    """The one number of a text; "" if it has none, None if it has several or one that cannot be read."""
    if "\\" in text or not (text.isascii() or _only_ascii_digits(text)):
        return None
    found, end = "", 0
    for run in _RUN.finditer(text):
        written = run[0].rstrip(".,")
        sign = _sign(text, run.start())
        if sign == "name":
            continue
        if sign is None or _ALTERED.match(text, run.start() + len(written)):
            return None
        value = _canonical(sign, written, fractions)
        if value is None or (found and (value != found or not _WORD.search(text, end, run.start()))):
            return None
        found, end = value, run.end()
    return found


def _only_ascii_digits(text: str) -> bool:
    """Whether there are no digits beyond 0 to 9; a raised one behind a letter, as in m², is none."""
    before = ""
    for character in text:
        if character > "\x7f" and unicodedata.category(character)[0] == "N" and not (character in "²³" and before.isalpha()):
            return False
        before = character
    return True


def _sign(text: str, start: int) -> str | None:
    """The sign of the number whose digits start here, "" or "-"; "name" if they belong to a word, None if they may mean something else."""
    left = text[max(0, start - REACH) : start]
    if _IN_A_NAME.search(left):
        return "name"
    mark = _MARK.search(left)
    end, minus = (mark.start(), mark[1]) if mark else (len(left), None)
    before = left[:end].rstrip("([ " + _CURRENCY)
    last, gap = before[-1:], left[len(before) : end]
    if not last:
        clear = start <= REACH  # or there are nothing but brackets, as far as one can see
    elif before.endswith(("->", "=>")):
        clear = True
    elif last in _OPERATORS or (not gap and (last == "." or (minus and (last.isdigit() or last in ")]")))):
        clear = False
    else:
        clear = last not in _DASHES or " " in gap
    return ("-" if minus == "-" else "") if clear else None


def _canonical(sign: str, written: str, fractions: bool = True) -> Value:
    """The value of digits with commas, a point, or a stroke; None if they are not written as a number is."""
    over, stroke, under = written.partition("/")
    number = _DECIMAL.fullmatch(over) if len(written) <= MAX_DIGITS else None
    if number is None or (stroke and not fractions):
        return None
    whole, decimals = number[1].replace(",", "").lstrip("0") or "0", (number[2] or "").rstrip("0")
    if not stroke and not decimals:
        return whole if whole == "0" else sign + whole
    divisor = int(_canonical("", under) or 0) if stroke else 1
    return str(Fraction(int(sign + whole + decimals), 10 ** len(decimals) * divisor)) if divisor else None


# ---- arithmetic --------------------------------------------------------------------------------------------------------

_ARITHMETIC = re.compile(r"[-0-9+*/().,×÷· ]+")
_TOKEN = re.compile(r"\.?[0-9][0-9.,]*|[-+*/()]")
_NAMED = re.compile(r" ?\$?[A-Za-z] ?=")  # x = 3/4


def _value(text: str) -> Value:
    """The value of arithmetic, or of the one number of a text."""
    bare = text[named.end() :] if (named := _NAMED.match(text)) else text
    bare = bare.strip(" \n*$").rstrip(".").rstrip(" \n*$")
    if len(bare) <= MAX_LENGTH and _ARITHMETIC.fullmatch(bare):
        written = _unsigned(bare.translate({0xD7: "*", 0xB7: "*", 0xF7: "/"}))
        if written is not None and (found := evaluate(written)):
            return str(found[0])
    return _single(text, fractions=True)


def _unsigned(text: str) -> str | None:
    """Arithmetic as `evaluate` takes it: a sign is a subtraction from 0, a decimal a fraction in brackets; None for what is neither."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text.replace(" ", ""):
        return None
    written: list[str] = []
    signed = False
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        if token in "+-" and (before == "" or before in "(+-*/"):
            if after[:1] in ".0123456789" and after:
                signed = token == "-"
            elif after == "(" and before in ("", "("):
                written.append(f"0{token}")
            else:
                return None
        elif token in "+-*/()":
            written.append(token)
        else:
            number = _canonical("", token)
            if number is None or (token[0] == "0" and len(token) > 1 and token[1] != "."):
                return None
            number = f"({number})" if "/" in number else number
            written.append(f"(0-{number})" if signed else number)
            signed = False
    return " ".join(written)
