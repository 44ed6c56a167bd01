"""Quality filters of our own, to stand beside the published ones of filters.py, and a quality score that is learned.

runs, identity and script are filters: a text in, the same text or a Reason out. Their thresholds are ours.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Self
from zlib import crc32

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pascaline.data.filters import Reason, views
from pascaline.errors import BadInput, nearest
from pascaline.runs import atomic_path

MIN_WINDOW = 4  # characters; repetitions are not looked for in a text of a few words
COMMON_SCRIPTS = {"latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai", "hangul", "hiragana", "katakana", "cjk"}
FEATURES = "crc32 of lower-case words, 1- and 2-grams, version 1"  # stands in every saved score

_NOT_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalpha())
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


# ---- one thing over and over -------------------------------------------------------------------------------------------


def runs(text: str, *, max_run: int = 200, max_repetition: float = 0.2) -> str | Reason:
    """Pages of one character, or of a few over and over ("mmmmm", "ha ha ha"); white space counts as one space.

    max_run: characters; max_repetition: the share of the text in the longest stretch that repeats a unit of at most
    max_repetition / 4 of the text, and so says it four times in a row.
    """
    squeezed = views(text).squeezed
    codes = np.frombuffer(squeezed.encode("utf-32-le", "surrogatepass"), np.uint32)
    if len(codes) > max_run:
        ends = np.flatnonzero(np.concatenate((codes[1:] != codes[:-1], [True])))
        if (longest := int(np.diff(ends, prepend=-1).max())) > max_run:
            return Reason("max_run", longest)
    if (share := _repetition(squeezed, codes, max_repetition)) > max_repetition:
        return Reason("max_repetition", share)
    return text


def _repetition(text: str, codes: NDArray[np.uint32], least: float) -> float:
    """Share of the longest stretch that repeats itself: right if it is over `least`, otherwise not above the truth.

    The text is cut into windows of least / 2. A stretch of `least` holds all of one of them, and the first half of that
    window comes again inside it, one period on; from there the stretch is followed both ways. So a page costs a few
    searches of a window each, and a comparison of the whole only where something repeats.
    """
    window = int(len(text) * least / 2)
    if window < MIN_WINDOW:
        return 0.0
    longest, done = 0, 0
    for start in range(0, len(text) - window + 1, window):
        if start + window <= done:
            continue
        period = text.find(text[start : start + window // 2], start + 1, start + window) - start
        if period < 0:  # not found
            continue
        breaks = np.flatnonzero(codes[period:] != codes[:-period])
        after = int(np.searchsorted(breaks, start))
        first = int(breaks[after - 1]) + 1 if after else 0
        done = (int(breaks[after]) if after < len(breaks) else len(text) - period) + period
        longest = max(longest, done - first)
    return longest / len(text)


# ---- other models' words -----------------------------------------------------------------------------------------------

_AN_AI = (  # but not an AI researcher
    r"(?:(?:an ai|an artificial intelligence)"
    r"(?= (?:assistant|model|chatbot|system|program|and|so|without|created|trained|designed|developed)\b|[.,;!]|$)"
    r"|an? (?:ai |large )?language model)"
)
_ONLY = r"(?:just |only |merely |simply )?"
_MODELS = r"(?:chat ?gpt|gpt-?[345]\w*|deepseek|qwen)"
_NAMESAKES = r"(?:claude|gemini|llama|mistral)"  # others are called that too
_MAKERS = r"(?:openai|anthropic|google|deepseek|alibaba|meta ai|mistral)"
_IDENTITY = re.compile(
    r"\bas (?:an ai|an artificial intelligence|an? (?:ai |large )?language model)(?: assistant| chatbot)?,? (?:i|my)\b"
    r"|\bas an ai (?:language model|assistant|chatbot)\b"
    rf"|\b(?:i am|i'm) {_ONLY}{_AN_AI}"
    rf"|\b(?:i am|i'm|my name is) {_ONLY}{_MODELS}\b"
    rf"|\b(?:i am|i'm|my name is) {_NAMESAKES}, (?:an ai|an? (?:large )?language model|an assistant|a helpful assistant)\b"
    rf"|\bi (?:was|am|have been) (?:trained|created|developed|made|built) by {_MAKERS}\b"
    r"|\bmy (?:last |latest )?(?:knowledge|training)(?: data)? cut-?off\b"
    r"|\bas of my (?:last|latest)(?: knowledge)? update\b"
    r"|\bsorry, but i (?:can't|cannot) (?:assist with|help with|comply with|fulfill) (?:that|this|your)\b"
)
# All that the patterns find holds one of these, and plain strings are looked for faster.
_HINTS = (
    *("an ai", "artificial intell", "language model", "gpt", "deepseek", "qwen", "claude, a", "gemini, a", "llama, a", "mistral, a"),
    *("by openai", "by anthropic", "by google", "by alibaba", "by meta", "by mistral", "cutoff", "cut-off", "as of my", "sorry, but"),
)


def identity(text: str, *, max_mentions: int = 0) -> str | Reason:
    """An assistant speaks of itself ("As an AI language model", "I am ChatGPT"): another model wrote this text.

    The value is the first passage that gave it away.
    """
    lower = views(text).lower
    if "’" in lower:
        lower = lower.replace("’", "'")
    if any(map(lower.__contains__, _HINTS)):
        mentions = [match[0] for match in _IDENTITY.finditer(lower)]
        if len(mentions) > max_mentions:
            return Reason("max_mentions", mentions[0])
    return text


# ---- scripts -----------------------------------------------------------------------------------------------------------


def script(text: str, *, scripts: tuple[str, ...] = ("latin",), min_share: float = 0.8) -> str | Reason:
    """Share of the letters that belong to one of the scripts: language, coarsely. A text without letters passes.

    A script is what the Unicode names of its letters begin with: latin, cyrillic, greek, arabic, devanagari, hangul,
    hiragana, katakana, cjk, ... Raises BadInput for a name that none begins with.
    """
    wanted = _wanted(tuple(scripts))
    letters = len(text.encode("ascii", "ignore").translate(None, _NOT_LETTERS))
    ours = letters if "latin" in wanted else 0
    if not text.isascii():
        for character, times in Counter("".join(_BEYOND_ASCII.findall(text))).items():
            if name := script_of(character):
                letters += times
                ours += times if name in wanted else 0
    share = ours / letters if letters else 1.0
    return text if share >= min_share else Reason("min_share", share)


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str:
    """latin, cjk, ...; "" for what is no letter."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "unnamed").lower().removeprefix("fullwidth ").removeprefix("halfwidth ")
    first = re.split("[ -]", name, maxsplit=1)[0]
    return "cjk" if first == "ideographic" else first


@lru_cache
def _wanted(scripts: tuple[str, ...]) -> frozenset[str]:
    names = frozenset(map(str.lower, scripts))
    if not names <= COMMON_SCRIPTS:  # looking through all of Unicode takes a moment
        known = {script_of.__wrapped__(chr(code)) for code in range(sys.maxunicode + 1)} - {""}
        for name in sorted(names - known):
            raise BadInput(f"script '{name}': no letter's Unicode name begins like this{nearest(name, known)}")
    return names


# ---- a learned score ---------------------------------------------------------------------------------------------------


class QualityScore:
    """How much a text resembles good examples rather than bad ones: logistic regression on hashed words and word pairs.

    weights: float32 [2^bits], one for each bucket that words and pairs are hashed into; bucket 0 is in every text and
    so serves as the bias. A text is the unit vector of its distinct buckets: length and repetition do not count.
    """

    def __init__(self, weights: NDArray[np.float32]) -> None:
        self.weights = weights
        self.bits = len(weights).bit_length() - 1

    @classmethod
    def fit(
        cls,
        good: Iterable[str],
        bad: Iterable[str],
        *,
        bits: int = 18,
        epochs: int = 5,
        rate: float = 0.1,
        batch: int = 16,
        seed: int = 0,
    ) -> Self:
        """Learns by AdaGrad (Duchi et al. 2011) on shuffled batches, both kinds weighing the same however many there are.

        Holds about 4 bytes for each distinct word and pair of each text. The same texts and seed give the same weights.
        Raises BadInput if there are no texts of one kind.
        """
        kinds = [[_buckets(text, bits).astype(np.int32) for text in texts] for texts in (bad, good)]
        if not all(kinds):
            raise BadInput(f"a quality score needs good and bad texts; there are {len(kinds[1])} good and {len(kinds[0])} bad ones")
        texts = kinds[0] + kinds[1]
        labels = np.repeat([0.0, 1.0], [len(kind) for kind in kinds])
        importance = np.repeat([len(texts) / 2 / len(kind) for kind in kinds], [len(kind) for kind in kinds])
        weights, squares = np.zeros(1 << bits), np.zeros(1 << bits)
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            order = rng.permutation(len(texts))
            for chosen in np.split(order, range(batch, len(order), batch)):
                sizes = np.array([len(texts[index]) for index in chosen])
                buckets = np.concatenate([texts[index] for index in chosen])
                values = np.repeat(sizes**-0.5, sizes)
                logits = np.add.reduceat(weights[buckets] * values, np.cumsum(sizes) - sizes)
                errors = (_sigmoid(logits) - labels[chosen]) * importance[chosen] / len(chosen)
                gradient = np.bincount(buckets, np.repeat(errors, sizes) * values, minlength=len(weights))
                squares += gradient**2
                weights -= rate * gradient / (np.sqrt(squares) + 1e-12)
        return cls(weights.astype(np.float32))

    def score(self, text: str) -> float:
        """From 0 (like the bad ones) to 1 (like the good ones)."""
        buckets = _buckets(text, self.bits)
        return float(_sigmoid(self.weights[buckets].sum(dtype=np.float64) / np.sqrt(len(buckets))))

    def keep(self, text: str, *, min_score: float = 0.5) -> str | Reason:
        """The score as a filter."""
        score = self.score(text)
        return text if score >= min_score else Reason("min_score", score)

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file."""
        with atomic_path(path) as temporary:
            save_file({"weights": self.weights}, temporary, metadata={"features": FEATURES})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """What `save` wrote, with the same scores. Raises BadInput for anything else."""
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                features, weights = (file.metadata() or {}).get("features"), file.get_tensor("weights")
        except (OSError, safetensors.SafetensorError) as error:
            raise BadInput(f"{os.fspath(path)} is not a saved quality score: {error}") from error
        if features != FEATURES:
            raise BadInput(f"{os.fspath(path)} is not a quality score of this version (its features: {features!r}); train it again")
        if weights.ndim != 1 or weights.dtype != np.float32 or len(weights).bit_count() != 1 or not np.isfinite(weights).all():
            raise BadInput(f"{os.fspath(path)} is damaged: a quality score is 2^bits finite float32 weights")
        return cls(weights)


def _buckets(text: str, bits: int) -> NDArray[np.int64]:
    """The distinct buckets of a text's words and pairs of words, and bucket 0; the same in every process."""
    data = text.lower().encode(errors="replace").split()
    words = np.fromiter(map(crc32, data), np.uint64, len(data))
    words *= np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64; the upper bits are well mixed
    pairs = ((words[:-1] >> np.uint64(7)) + words[1:]) * np.uint64(0xC2B2AE3D27D4EB4F)
    both = np.concatenate((words, pairs, np.zeros(1, np.uint64)))
    return np.unique((both >> np.uint64(64 - bits)).astype(np.int64))


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(logits / 2))
