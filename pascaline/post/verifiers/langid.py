"""Which language a text is written in, told by its script and its small words; None where that does not tell.

No trained model: letters name the script, and where languages share one, the commonest words of each (langid.toml) do. A few words are
too few, and a language without a list is not known; then nothing is said, except that a near relative without a list may be taken for
one that has it (Malay for Indonesian). It tells the language of most of the text, as IFEval's langdetect does: a foreign sentence in
between passes.
"""

import re
import tomllib
import unicodedata
from collections import Counter
from functools import lru_cache
from importlib import resources

# Scripts that one of the known languages has for itself. Others write in some of them too (Assamese in Bengali letters, Yiddish in Hebrew).
OWN = {"BENGALI": "bn", "THAI": "th", "TAMIL": "ta", "TELUGU": "te", "HANGUL": "ko", "HEBREW": "he", "KANNADA": "kn", "GUJARATI": "gu",
       "GURMUKHI": "pa", "MALAYALAM": "ml", "GREEK": "el", "ARMENIAN": "hy", "GEORGIAN": "ka"}  # fmt: skip
EAST = ("CJK", "HIRAGANA", "KATAKANA")  # Japanese and Chinese

LEAST_HITS = 3  # small words
LEAST_SHARE = 0.12  # of all words; in a language that glues its endings on (Finnish, Turkish) about 0.2 of a usual text, in English 0.4
LEAST_EAST = 10  # characters: a Japanese title may have no kana
KANA = 0.05  # of the characters of a Japanese text, at the least


def is_in(text: str, language: str) -> bool | None:
    """Whether the text is in the language of this ISO 639-1 code; None if that cannot be told. A text without a letter is in none."""
    script = _script(text)
    if script is None:
        return False
    if language not in _scripts():
        return None
    if script != _scripts()[language]:
        return False
    told = identify(text)
    return None if told is None else told == language


def identify(text: str) -> str | None:
    """ISO 639-1 code of the language of most of the text, None if it cannot be told."""
    script = _script(text)
    if script is None:
        return None
    if script == "CJK":
        return _east(text)
    return OWN.get(script) or _by_words(text, script)


@lru_cache(maxsize=1)
def _lists() -> dict[str, dict[str, frozenset[str]]]:
    """script -> language -> its small words"""
    read = tomllib.loads(resources.files(__package__).joinpath("langid.toml").read_text("utf-8"))
    return {script: {language: frozenset(words.split()) for language, words in lists.items()} for script, lists in read.items()}


@lru_cache(maxsize=1)
def _scripts() -> dict[str, str]:
    """language -> its script"""
    shared = {language: script for script, lists in _lists().items() for language in lists}
    return {**shared, **{language: script for script, language in OWN.items()}, "ja": "CJK", "zh": "CJK"}


@lru_cache(maxsize=1 << 14)
def _of(letter: str) -> str:
    """A letter's script: the first word of its Unicode name."""
    name = unicodedata.name(letter, "").split(" ")[0]
    return "CJK" if name in EAST else name


def _script(text: str) -> str | None:
    """The script of most letters, None without letters."""
    found = Counter(_of(c) for c in text if c.isalpha()).most_common(1)
    return found[0][0] if found else None


def _east(text: str) -> str | None:
    letters = [c for c in text if c.isalpha() and _of(c) == "CJK"]
    kana = sum(unicodedata.name(c, "").startswith(("HIRAGANA", "KATAKANA")) for c in letters)
    if kana >= KANA * len(letters) and kana:
        return "ja"
    return "zh" if not kana and len(letters) >= LEAST_EAST else None


def _by_words(text: str, script: str) -> str | None:
    """The language with the most small words, if they are enough, and if of those that only one of the two has the runner-up has at most
    half as many."""
    lists = _lists().get(script, {})
    words = [word.strip('.,;:!?()[]{}"«»„“”‘…*_#।،؟؛') for word in re.split(r"[\s'’]+", text.lower())]
    said = Counter(word for word in words if word)
    hits = {language: sum(said[word] for word in known if word in said) for language, known in lists.items()}
    ranked = sorted(hits, key=lambda language: -hits[language])
    if not ranked or hits[ranked[0]] < max(LEAST_HITS, LEAST_SHARE * said.total()):
        return None
    best = ranked[0]
    for other in ranked[1:]:
        ours, theirs = (sum(said[w] for w in lists[a] - lists[b] if w in said) for a, b in ((best, other), (other, best)))
        if ours < 2 or ours < 2 * theirs:
            return None
    return best
