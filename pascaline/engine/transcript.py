"""From the token ids of one answer to its thought and its text, piece by piece.

It reads one token after the other, so any split of the ids gives the same whole: what Tokenizer.thought gives, with stop strings cut out.
Held back is only what may still change: at most 3 bytes of an unfinished character, the beginning of a stop string or of a think tag, and
the empty lines around a thought.
"""

import codecs
from collections.abc import Collection, Sequence
from enum import Enum, auto

from pascaline.tokenizer import THINK, UNTHINK, Tokenizer


class _Part(Enum):
    UNDECIDED = auto()  # blanks and perhaps the beginning of "<think>": a thought or not
    OPENING = auto()  # in the thought, before its first letter
    THOUGHT = auto()
    CLOSED = auto()  # after the thought, before the text's first letter
    TEXT = auto()
    STOPPED = auto()


class Transcript:
    """Token ids of one answer -> thought and text, piece by piece. Any split of the ids gives the same whole.

    prompt: the ids before the answer; stop: strings that end the text (never inside the thought) and are no part of it: the one that is
    complete first, and of several that end together the longest; ends: ids that end an answer and are not text. thoughts: False for plain
    completions, where all is text, tags too.
    In a vocabulary with bytes to fall back on, a broken character may count fewer U+FFFD than tokenizers gives to it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (), ends: Collection[int] = (),
                 thoughts: bool = True):  # fmt: skip
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        self.stop = sorted({s for s in stop if s}, key=len, reverse=True)
        self.stopped: str | None = None
        self.reasoning_tokens = 0
        self._thought: list[str] | None = None
        self._text: list[str] = []
        standing, self._bare, self._open, self._close = tokenizer.tags(prompt)
        self._shown = frozenset() if thoughts else frozenset((self._open, self._close))
        self._part = _Part.TEXT if standing == UNTHINK or not thoughts else _Part.UNDECIDED
        if standing == THINK and thoughts:
            self._begin_thought()
        self._blank: list[str] = []  # blanks before it is decided
        self._held = ""  # characters that may still change their meaning
        self._lines = 0  # empty lines that count only if the thought goes on
        self._tokens = 0  # read so far
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True  # nothing of this part has been decoded yet
        self._new = ["", ""]  # reasoning and text that feed has not given out yet

    @property
    def reasoning(self) -> str | None:
        """The thought so far, None where there is none."""
        return None if self._thought is None else "".join(self._thought)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    @property
    def thinking(self) -> bool:
        """Whether it is inside an unclosed thought now."""
        return self._part in (_Part.OPENING, _Part.THOUGHT)

    @property
    def undecided(self) -> bool:
        """Whether it is still open if there is a thought."""
        return self._part is _Part.UNDECIDED

    def feed(self, ids: Sequence[int]) -> tuple[str, str]:
        """Read the next ids; what is new and settled, as (reasoning, text)."""
        for token in ids:
            if self._part is _Part.STOPPED:
                break
            if token not in self.ends:
                self._read(token)
        return self._take()

    def finish(self) -> tuple[str, str]:
        """The answer has ended: the rest, as (reasoning, text)."""
        self._flush()
        if self._part is _Part.UNDECIDED:
            self._no_thought()
            self._push("")
        if self._part is _Part.TEXT:
            self._say(self._held)
        elif self.thinking:
            self._end_thought()
        self._held = ""
        return self._take()

    def _take(self) -> tuple[str, str]:
        reasoning, text = self._new
        self._new = ["", ""]
        return reasoning, text

    # ---- tokens to characters ----------------------------------------------------------------------------------------

    def _read(self, token: int) -> None:
        self._tokens += 1
        if self.thinking:
            self.reasoning_tokens += 1
        if self._part is _Part.UNDECIDED and self._close is not None:  # where the tags are tokens, the first one decides
            if token == self._open:
                self._begin_thought()
                self.reasoning_tokens += 1
                return
            self._no_thought()
        if self.thinking and token == self._close:
            self._flush()
            self._end_thought()
        elif token in self._shown or not self.tokenizer.is_special(token):
            piece = self.tokenizer.piece(token, self._first)
            self._first = False
            self._push(self._bytes.decode(piece))

    def _flush(self) -> None:
        """A character that lacks bytes will not get them any more."""
        self._push(self._bytes.decode(b"", final=True))
        self._bytes.reset()
        self._first = True

    # ---- characters to thought and text ------------------------------------------------------------------------------

    def _push(self, characters: str) -> None:
        """Go through the parts as far as the characters lead."""
        self._held += characters
        steps = {_Part.UNDECIDED: self._decide, _Part.OPENING: self._lead, _Part.THOUGHT: self._body, _Part.CLOSED: self._gap}
        before = None
        while before is not self._part and self._held:
            before = self._part
            if before is _Part.TEXT:
                self._answer()
            elif before in steps:
                steps[before]()

    def _decide(self) -> None:
        said = self._held.lstrip()
        self._blank.append(self._held[: len(self._held) - len(said)])
        self._held = said
        if said.startswith(THINK):
            self._begin_thought()
            self.reasoning_tokens = self._tokens
        elif not THINK.startswith(said):
            self._no_thought()

    def _no_thought(self) -> None:
        self._held, self._part = "".join(self._blank) + self._held, _Part.TEXT

    def _begin_thought(self) -> None:
        self._part = _Part.THOUGHT if self._bare else _Part.OPENING
        self._thought = []

    def _lead(self) -> None:
        """Leave out blanks, a tag that repeats the template's, and the empty lines after it."""
        self._held = self._held.lstrip()
        if self._held.startswith(THINK):
            rest = self._held.removeprefix(THINK).lstrip("\n")
            if rest:
                self._held, self._part = rest, _Part.THOUGHT
            else:
                self._held = THINK
        elif not THINK.startswith(self._held):
            self._part = _Part.THOUGHT

    def _body(self) -> None:
        at = self._held.find(UNTHINK) if self._close is None else -1
        if at >= 0:
            after, self._held = self._held[at + len(UNTHINK) :], self._held[:at]
            self._end_thought()
            self._held = after
            return
        sure = len(self._held) - (_beginning(self._held, UNTHINK) if self._close is None else 0)
        self._think(self._held[:sure])
        self._held = self._held[sure:]

    def _end_thought(self) -> None:
        """What is held belongs to the thought, but a tag that repeats the template's."""
        self._think(self._held.removeprefix(THINK) if self._part is _Part.OPENING else self._held)
        self._held, self._part = "", _Part.TEXT if self._bare else _Part.CLOSED

    def _gap(self) -> None:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._part = _Part.TEXT

    def _answer(self) -> None:
        """Give out the text up to where a stop string is, or may begin."""
        found = [(at + len(s), -len(s), s) for s in self.stop if (at := self._held.find(s)) >= 0]
        if found:
            end, _, self.stopped = min(found)
            self._say(self._held[: end - len(self.stopped)])
            self._held, self._part = "", _Part.STOPPED
            return
        kept = max((_beginning(self._held, s) for s in self.stop), default=0)
        sure = len(self._held) - kept
        self._say(self._held[:sure])
        self._held = self._held[sure:]

    def _think(self, said: str) -> None:
        if not self._bare:  # the empty lines at the end of a thought are the template's
            body = said.rstrip("\n")
            lines = len(said) - len(body)
            said = "\n" * self._lines + body if body else ""
            self._lines = lines if body else self._lines + lines
        assert self._thought is not None
        self._thought.append(said)
        self._new[0] += said

    def _say(self, said: str) -> None:
        self._text.append(said)
        self._new[1] += said


def _beginning(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a beginning of `word`, but not the whole of it."""
    at = text.find(word[0], max(0, len(text) - len(word) + 1))
    while at >= 0:
        if word.startswith(text[at:]):
            return len(text) - at
        at = text.find(word[0], at + 1)
    return 0
