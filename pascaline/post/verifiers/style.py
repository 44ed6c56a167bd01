"""How an answer is given, whatever it says: the verifiers `format` and `language`. Both are rewards of DeepSeek-R1 (arXiv 2501.12948v1)."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from pascaline.data.quality import script_of
from pascaline.errors import BadInput, nearest
from pascaline.post.verifiers.base import Scores, split
from pascaline.tokenizer import THINK, UNTHINK

_SCRIPTS = {
    "latin": "af az ca cs cy da de en es et eu fi fr ga gl hr hu id is it lt lv ms mt nl no pl pt ro sk sl sq sv sw tl tr uz vi",
    "cyrillic": "be bg kk ky mk mn ru sr tg uk",
    "arabic": "ar fa ps ur",
    "devanagari": "hi mr ne",
    "cjk": "zh",
    "hiragana katakana cjk": "ja",
    **{"hangul": "ko", "greek": "el", "hebrew": "he", "armenian": "hy", "georgian": "ka", "thai": "th", "lao": "lo", "khmer": "km"},
    **{"myanmar": "my", "bengali": "bn", "gujarati": "gu", "gurmukhi": "pa", "tamil": "ta", "telugu": "te", "kannada": "kn"},
    **{"malayalam": "ml", "sinhala": "si", "ethiopic": "am"},
}
LANGUAGES = {language: frozenset(scripts.split()) for scripts, languages in _SCRIPTS.items() for language in languages.split()}

_LETTER = r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]"
_LATIN_WORD = re.compile(rf"{_LETTER}+(?:['’-]{_LETTER}+)*")
_AROUND_WORDS = ".,;:!?\"'()[]*-«»„“”‘’¡¿"
_BREAK = re.compile(r"[—–…、。「」『』《》・]")
_IDEOGRAPH = re.compile(r"[\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def one_thought(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> Scores:
    """The verifier `format`: 1.0 for one closed thought with something in it and something behind it, and no other think tag, else 0.0.

    R1's format reward (section 2.2.2) asks for thinking between the tags. TRL's think_format_reward matches a thought at the start, and so
    also pays for an empty thought, for no answer, and for a second </think>.
    """
    return [float(_is_one_thought(completion)) for completion in completions]


def _is_one_thought(completion: str) -> bool:
    thought, answer = split(completion)
    if thought is None or answer is None or completion.count(THINK) + completion.count(UNTHINK) != 2:
        return False
    return bool(thought.strip() and answer.strip())


def language(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> Scores:
    """The verifier `language`: the share of the words of the thought that are in the language of the column `language` (en without one).

    R1's language consistency reward (section 2.3.2). A language is known by its script alone: English, French and Vietnamese are all
    Latin, and Russian is Ukrainian; what is seen is mixing of scripts, as R1-Zero's of Chinese and English. Numbers, formulas and code are
    of no language. A thought without words is 1.0, and so is none at all: nothing in it is in another language, and a model that thinks
    in numbers must not be paid for chatting (that there be a thought is `format`'s business). BadInput for a language not in LANGUAGES.
    """
    wanted = columns.get("language", ["en"] * len(completions))
    return [share(split(completion)[0] or "", tag) for completion, tag in zip(completions, wanted, strict=True)]


def share(text: str, language: str) -> float:
    """The share of the words of a text whose script is the language's; 1.0 if it has no words.

    A word stands between spaces; of Chinese and Japanese, which have none, each character counts. A Latin word counts if it is nothing but
    letters, so that x=5, f(x) and \\frac are none, and outside of code; for other languages also a single letter, like a Greek one, is a
    symbol. Letters of other scripts count wherever they stand. Time is linear.
    """
    scripts = _scripts(language)
    words = Counter(_words(unicodedata.normalize("NFKC", text), singles="latin" in scripts))  # 𝐱 is x
    return sum(words[script] for script in scripts) / words.total() if words else 1.0


@lru_cache(maxsize=256)
def _scripts(language: str) -> frozenset[str]:
    name = re.split("[-_]", language, maxsplit=1)[0].lower() if isinstance(language, str) else ""  # zh of zh-CN
    if name not in LANGUAGES:
        raise BadInput(
            f"verifier 'language': no language {language!r}{nearest(name, LANGUAGES)} (there are {', '.join(sorted(LANGUAGES))})."
        )
    return LANGUAGES[name]


def _words(text: str, singles: bool) -> Iterator[str]:
    """The script of each word. singles: whether a Latin letter alone is a word."""
    if not text.isascii():
        yield from map(script_of, _IDEOGRAPH.findall(text))
        text = _BREAK.sub(" ", _IDEOGRAPH.sub(" ", text))
        for piece in text.split():
            if not piece.isascii():
                letters = Counter(script_of(character) for character in piece if character > "\x7f")
                yield from (s for s, times in letters.items() if s not in ("", "latin") and (s != "greek" or times > 1))
    for piece in _CODE.sub(" ", text).split():
        word = piece.strip(_AROUND_WORDS)
        if (len(word) > 1 or singles) and _LATIN_WORD.fullmatch(word):
            yield "latin"
