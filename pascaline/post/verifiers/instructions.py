"""Verifier `instructions`: does an answer keep to instructions on length, format, words and language that can be checked by a program?

The instructions, their ids and arguments are IFEval's (arXiv 2311.07911, appendix A), so that rows of google/IFEval work as they are; what
each of them counts is what the public checker counts, and a test compares the two. Where it differs, on purpose:
- an argument that is missing is an error (there it is drawn at random), and `letter` may be any character (there only a to z, else random);
- keywords are plain text (there patterns), so that "c++" is found and no keyword can hang the check;
- languages are told by langid.py, and an undecided one leaves the answer unjudged (there it is a guess, or followed);
- sentences are split by rules (there by a trained model), and a contraction is one word in capital_word_frequency (there two);
- a lone "*" on its line is no bullet.
Instructions named `own:...` are not IFEval's. An answer is judged without the space around it, since templates put some after a thought.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from pascaline.errors import BadInput, nearest
from pascaline.post.verifiers import langid
from pascaline.post.verifiers.base import Scores, answers, column

Check = Callable[[str], bool | None]

LESS, LEAST = "less than", "at least"
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
RELATIONS = ("relation", "let_relation", "capital_relation")
LISTS = ("keywords", "forbidden_words")
NUMBERS = ("frequency", "let_frequency", "capital_frequency", "num_sentences", "num_paragraphs", "num_words", "nth_paragraph",
           "num_placeholders", "num_bullets", "num_highlights", "num_sections")  # fmt: skip

ENDS = ".!?…。！？।؟"
CLOSING = "\"'”’»)]*_"
TITLES = {
    "mr",
    "mrs",
    "ms",
    "dr",
    "prof",
    "st",
    "mt",
    "gen",
    "rev",
    "vs",
    "cf",
    "fig",
    "vol",
    "e.g",
    "i.e",
}  # a period after them ends nothing
SOFT = {"etc", "inc", "ltd", "co", "jr", "sr", "al"}  # these may end a sentence


def instructions(prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> Scores:
    """1.0 if all instructions are followed, 0.0 if one is not, None if none is broken but one could not be judged.

    Columns: instruction_id_list (list of ids) and kwargs (a table of arguments for each id; null is none). An empty answer, or one whose
    thought is not closed, follows nothing. BadInput for an unknown id, and for a missing or wrong argument.
    """
    ids, arguments = column(columns, "instructions", "instruction_id_list"), column(columns, "instructions", "kwargs")
    return [score(answer, i, a) for answer, i, a in zip(answers(completions), ids, arguments, strict=True)]


def score(answer: str | None, ids: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> float | None:
    """1.0, 0.0 or None, as above (IFEval's strict accuracy of a prompt)."""
    found = followed(answer, ids, arguments)
    return 0.0 if False in found else None if None in found else 1.0


def share_followed(answer: str | None, ids: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of the instructions that is followed, of those that could be judged; None if none could."""
    known = [value for value in followed(answer, ids, arguments) if value is not None]
    return fmean(known) if known else None


def followed(answer: str | None, ids: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """For each instruction whether the answer follows it; None where that cannot be told."""
    if not ids or len(ids) != len(arguments):
        raise BadInput(
            f"verifier 'instructions' needs one id or more, and a table of arguments for each; got {len(ids)} and {len(arguments)}."
        )
    checks = [check(name, given) for name, given in zip(ids, arguments, strict=True)]
    text = (answer or "").strip()
    return [bool(text) and check(text) for check in checks]


def check(name: str, arguments: Mapping[str, Any]) -> Check:
    """The check of one instruction: a function of an answer. BadInput for an unknown id and for wrong arguments."""
    if name not in CHECKS:
        raise BadInput(f"no instruction '{name}'{nearest(name, CHECKS)} (IFEval's ids are known, and own:...)")
    function, names = CHECKS[name]
    values = [_argument(name, key, (arguments or {}).get(key)) for key in names]
    if name == "length_constraints:nth_paragraph_first_word" and not 1 <= values[1] <= values[0]:
        raise BadInput(f"instruction '{name}': nth_paragraph = {values[1]} must be from 1 to num_paragraphs, which is {values[0]}.")
    return lambda text: function(text, *values)


def _argument(name: str, key: str, value: Any) -> Any:
    if key in NUMBERS:  # pandas and pyarrow may make 3.0 of 3
        good, wanted = (
            isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value),
            "a whole number",
        )
        value = int(value) if good else value
    elif key in RELATIONS:
        good, wanted = value in (LESS, LEAST), f"'{LESS}' or '{LEAST}'"
    elif key in LISTS:
        good, wanted = isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) and v for v in value), "a list of words"
    elif key == "letter":
        good, wanted = isinstance(value, str) and len(value) == 1, "one character"
    else:
        good, wanted = isinstance(value, str) and bool(value.strip()), "a text"
    if not good:
        raise BadInput(f"instruction '{name}' needs {key}, {wanted}; it is {'missing' if value is None else repr(value)}.")
    return value


def _holds(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == LESS else count >= bound


def _occurrences(text: str, word: str) -> int:
    """Inside other words too, whatever the case."""
    return len(re.findall(re.escape(word.strip()), text, re.IGNORECASE))


def _has_word(text: str, word: str) -> bool:
    """As a word of its own."""
    before, after = r"\b" * bool(re.match(r"\w", word)), r"\b" * bool(re.search(r"\w\Z", word))
    return re.search(before + re.escape(word) + after, text, re.IGNORECASE) is not None


def words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def sentences(text: str) -> int:
    """What ends in . ! ? or their like before a space, and what stands unended at the end. No period after a title, an initial or a
    list's number ends one; one after "etc", "p.m" or an ellipsis does unless the next word begins small."""
    parts = re.sub(r"([。！？।؟]+)", r"\1 ", text).split()
    count, begun = 0, False
    for word, following in zip(parts, [*parts[1:], ""], strict=False):
        bare = word.rstrip(CLOSING)
        if not begun and re.fullmatch(r"\(?\d+[.)]*", word) and following:
            continue
        begun = begun or any(c.isalnum() for c in word)
        if begun and bare and bare[-1] in ENDS and not _goes_on(bare, following):
            count, begun = count + 1, False
    return count + begun


def _goes_on(bare: str, following: str) -> bool:
    stem = bare.rstrip(".…").lstrip("\"'“‘«([").lower()
    if bare[-1] not in ".…":
        return False
    if stem in TITLES or (len(stem) == 1 and stem.isalpha() and stem != "i" and following != ""):
        return True
    return (stem in SOFT or "." in stem or bare.endswith(("..", "…"))) and following[:1].islower()


def _paragraphs(text: str, count: int) -> bool:
    """Divided by ***; an empty one may only stand at the ends, and does not count."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == count


def _first_word(text: str, count: int, which: int, first: str) -> bool:
    """Paragraphs are divided by an empty line; the word is compared up to its first punctuation."""
    parts = text.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != count or which > len(parts) or not parts[which - 1].strip():
        return False
    word = parts[which - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first.strip().lower()


def _placeholders(text: str) -> int:
    """[address]: brackets that are closed on their line."""
    count = 0
    for line in text.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start)) >= 0:
            count, start = count + 1, line.find("[", end)
    return count


def _postscript(text: str, marker: str) -> bool:
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(marker.strip(), re.escape(marker.strip().lower()))
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str) -> int:
    lines = [line.lstrip() for line in text.split("\n")]
    return sum(line.startswith("-") or (line.startswith("*") and line[1:2] not in ("", "*")) for line in lines)


def _highlights(text: str) -> int:
    """*so*, and **so**, with something in them."""
    return sum(len([h for h in re.findall(p, text) if h.strip("*").strip()]) for p in (r"\*[^\n*]*\*", r"\*\*[^\n*]*\*\*"))


def _sections(text: str, splitter: str, count: int) -> bool:
    return len(re.findall(re.escape(splitter.strip()) + r"\s?\d+", text)) >= count


def _json(text: str) -> bool:
    """JSON and nothing else, but for a fence around it."""
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip(), parse_int=str)  # Python refuses integers of over 4,300 digits, JSON does not
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    """<<so>>, on one line."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end > start + 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in re.findall(r"\w+(?:[-'’./&]\w+)*", text))


def _quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, tuple[Callable[..., bool | None], tuple[str, ...]]] = {
    "keywords:existence": (lambda t, words: all(_occurrences(t, w) for w in words), ("keywords",)),
    "keywords:frequency": (lambda t, w, r, n: _holds(_occurrences(t, w), r, n), ("keyword", "relation", "frequency")),
    "keywords:forbidden_words": (lambda t, words: not any(_has_word(t, w) for w in words), ("forbidden_words",)),
    "keywords:letter_frequency": (
        lambda t, c, r, n: _holds(t.lower().count(c.lower()), r, n), ("letter", "let_relation", "let_frequency")),
    "language:response_language": (langid.is_in, ("language",)),
    "length_constraints:number_sentences": (lambda t, r, n: _holds(sentences(t), r, n), ("relation", "num_sentences")),
    "length_constraints:number_paragraphs": (_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_words": (lambda t, r, n: _holds(words(t), r, n), ("relation", "num_words")),
    "length_constraints:nth_paragraph_first_word": (_first_word, ("num_paragraphs", "nth_paragraph", "first_word")),
    "detectable_content:number_placeholders": (lambda t, n: _placeholders(t) >= n, ("num_placeholders",)),
    "detectable_content:postscript": (_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (lambda t, n: _bullets(t) == n, ("num_bullets",)),
    "detectable_format:constrained_response": (lambda t: any(option in t for option in OPTIONS), ()),
    "detectable_format:number_highlighted_sections": (lambda t, n: _highlights(t) >= n, ("num_highlights",)),
    "detectable_format:multiple_sections": (_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (_json, ()),
    "detectable_format:title": (_title, ()),
    "combination:two_responses": (_two_responses, ()),
    "combination:repeat_prompt": (lambda t, p: t.lower().startswith(p.strip().lower()), ("prompt_to_repeat",)),
    "startend:end_checker": (lambda t, p: t.strip('"').lower().endswith(p.strip().lower()), ("end_phrase",)),
    "startend:quotation": (_quoted, ()),
    "change_case:capital_word_frequency": (
        lambda t, r, n: _holds(_capital_words(t), r, n), ("capital_relation", "capital_frequency")),
    "change_case:english_capital": (lambda t: t.isupper() and langid.is_in(t, "en"), ()),
    "change_case:english_lowercase": (lambda t: t.islower() and langid.is_in(t, "en"), ()),
    "punctuation:no_comma": (lambda t: "," not in t, ()),
    "own:all_capital": (lambda t: t.isupper(), ()),
    "own:all_lowercase": (lambda t: t.islower(), ()),
    "own:only_digits": (lambda t: re.fullmatch("[0-9]+", t) is not None, ()),
    "own:start": (lambda t, p: t.lower().startswith(p.strip().lower()), ("start_phrase",)),
}  # fmt: skip
