"""One answer and one gold answer in LaTeX or plain text: do they say the same? By math-verify, which only processes of the pool load.

math-verify by itself takes the last number of any text: "1 2 3 4 5 6 7" matches the gold answer 7. Here it never searches; it is given the
one expression that the answer singles out (`final`), and an answer that singles out none is wrong.
"""

import re
from functools import lru_cache
from itertools import pairwise
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

LONGEST = 4000  # characters of a text without box or mark in which an expression is looked for
LONGER = 1000  # characters that an expression may have more than the gold answer: beyond, it is no answer, but takes long to read

AROUND = " \t\r\n*_`:="
ANSWER = re.compile(r"(?i:\banswer(?:\s+is\b|\s*[*_]*[:=]))\s*")
SENTENCE = re.compile(r"(?<=[\w)}%$])[.!?](?=\s)")
SPAN = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
BETWEEN = re.compile(r"(?:\s|,|;|\band\b|\bor\b)*")
COMMAND = re.compile(r"\\(?:text|mathrm|operatorname|textbf|mathbf)\s*\{[^{}]*\}|\\[A-Za-z]+")
PROSE = re.compile(r"(?!(?:and|or)\b)\b(?:[^\W\d_]{3,}|is|it|so|we|to|of|be)\b", re.I)  # other short words may be variables and units
UNIT = re.compile(r"(?:\s+[^\W\d_]+)+$")
APART = re.compile(r"\d\s+\d")  # numbers side by side, which math-verify adds up
NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)%?(?!\w)")
BOX = re.compile(r"\\boxed\s*(\{|\w)")
BRACE = re.compile(r"\\.|[{}]", re.S)
FORMULA = re.compile(r"[\\^*+{}×÷]")
WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
CONFIG = (LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0),)


def same(gold: str, answer: str) -> bool | None:
    """Whether the answer is right; None if the gold answer cannot be read."""
    expected = read(gold)
    if expected is None:
        return None
    found = final(answer)
    if found is None or len(found) > len(gold) + LONGER:
        return False
    return bool(verify(expected, _parsed(found), timeout_seconds=None))


@lru_cache(maxsize=1024)
def read(gold: str) -> list[Any] | None:
    """A gold answer, parsed; None if it is not one expression, or none that can be read."""
    said = final(gold)
    found = None if said is None else _parsed(said)
    return found if found and any(not isinstance(one, str) for one in found) else None


def final(text: str) -> str | None:
    """The one expression that a text gives as its answer, in LaTeX; None if it gives none, or several and singles out none of them.

    That is what stands in \\boxed{}; else behind "####", if it is no heading; else after "answer is" or "answer:", up to the end of the
    sentence; else the whole text. Two that differ single out none. What is not boxed must be one expression: in $..$, \\(..\\) or
    \\[..\\] with no number outside (several, joined by nothing but commas, and, or, are a set); or without words; or words with one
    number among them; or nothing but words.
    """
    if "\\boxed" in text:
        return _boxed(text)
    marked = [line for part in text.split("####")[1:] if (line := part.partition("\n")[0].strip()) and not PROSE.search(UNIT.sub("", line))]
    if not marked:
        marked = [SENTENCE.split(part.lstrip(AROUND).partition("\n")[0], maxsplit=1)[0] for part in ANSWER.split(text)[1:]]
    found = {part.strip(AROUND) for part in marked}
    said = found.pop() if found else text
    if found or len(said) > LONGEST:
        return None
    said = said.strip(AROUND).rstrip(".!?")
    if spans := [*SPAN.finditer(said)]:
        return _spans(said, spans)
    if APART.search(said):
        return None
    if WORDS.fullmatch(said) and PROSE.search(said):
        return f"\\text{{{said}}}"
    bare = UNIT.sub("", said)
    if not PROSE.search(COMMAND.sub(" ", bare)):
        return bare or None
    numbers = NUMBER.findall(said)
    return numbers[0].rstrip(",") if len(numbers) == 1 and not FORMULA.search(said) else None


def _boxed(text: str) -> str | None:
    """What is in \\boxed{}; None if one is not closed, or two differ."""
    found: dict[str, str] = {}  # by their letters, without spaces
    place = text.find("\\boxed")
    while place >= 0:
        opened = BOX.match(text, place)
        if not opened:
            return None
        place, depth = opened.end(), int(opened[1] == "{")
        content = "" if depth else opened[1]
        while depth:
            brace = BRACE.search(text, place)
            if not brace:
                return None
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            place = brace.end()
            content = text[opened.end() : brace.start()]
        found["".join(content.split())] = content.strip()
        place = text.find("\\boxed", place)
    content = next(iter(found.values()))
    return content if content and len(found) == 1 and not APART.search(content) else None


def _spans(said: str, spans: list[re.Match[str]]) -> str | None:
    gaps = [said[one.end() : other.start()] for one, other in pairwise(spans)]
    around = said[: spans[0].start()] + said[spans[-1].end() :]
    if re.search(r"\d", around) or not all(BETWEEN.fullmatch(gap) for gap in gaps):
        return None
    return ", ".join(next(filter(None, span.groups())).strip() for span in spans)


def _parsed(expression: str) -> list[Any]:
    return parse(f"\\boxed{{{expression}}}", extraction_config=CONFIG, parsing_timeout=None)


# The grammar's tables fill at its first use, which takes half a second: before the first answer's time runs, not within it.
for _one in ("\\frac{1}{2}", "2\\sqrt{3} + \\pi", "x^{2} - 3x = 4", "\\{1, 2\\}", "(-1, 0.5]", "\\text{east}", "\\sin 30^\\circ", "5\\%"):
    same(_one, f"\\boxed{{{_one}}}")
    same(_one, "\\boxed{7}")
