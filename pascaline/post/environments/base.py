"""What an environment speaks, and the form in which tools are called.

A call is plain text at the end of a turn's answer, behind the thought:

    <tool>12*7</tool>

The turn ends there; a user's message <result>84</result> follows, and the model goes on in a turn of its own, thought first. So that a
call and its result never touch: between them stand the template's special tokens, which no BPE merge crosses. Were both in one turn, text
learnt in SFT would hold a token "><", which no transcript that is put together from its parts has.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pascaline.data.puzzles import Problem
from pascaline.data.puzzles.calls import CLOSE, OPEN

LONGEST = 1000  # characters of a result
TURNS = 8  # of an episode, where an environment does not say


@dataclass(frozen=True)
class Observation:
    """What the environment answers: text that the model reads next, or done, and then what was said last is the final answer."""

    text: str = ""
    done: bool = False


class Environment(Protocol):
    """One episode's world. It may also have `stop`, strings that end a turn where they occur behind the thought (they are part of what was
    said); `turns`, how many the model has at most; and `score(problem, answer)`, a Verdict or a number as a verifier's, in the place of
    the problem's own verifier. Episodes step side by side, in threads; what an environment raises leaves its episode unjudged."""

    def reset(self, problem: Problem) -> str | list[dict[str, Any]]:
        """The prompt: a user's message, or a conversation."""

    def step(self, said: str) -> Observation:
        """said: the answer of one turn, without its thought."""


def opening(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `reset` gave, as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class Refused(Exception):
    """A call that cannot be done, and why: the model reads it as the result."""


class Tool(ABC):
    """An environment of one tool. A turn without a call is the final answer."""

    stop: ClassVar[tuple[str, ...]] = (CLOSE,)
    turns: int = TURNS
    hint: str = ""

    @abstractmethod
    def call(self, argument: str) -> str:
        """The result; Refused where there is none."""

    def reset(self, problem: Problem) -> str:
        return f"{self.hint}\n{problem.prompt}" if self.hint else problem.prompt

    def step(self, said: str) -> Observation:
        try:
            asked = argument(said)
            if asked is None:
                return Observation(done=True)
            found = self.call(asked)
        except Refused as why:
            found = f"error: {why}"
        cut = f"... ({len(found) - LONGEST} characters more)" if len(found) > LONGEST else ""
        return Observation(f"<result>{found[:LONGEST]}{cut}</result>")


def argument(said: str) -> str | None:
    """What the call in a turn's answer asks for; None where there is none. Refused for one that is not well formed.

    Behind the closing tag there can be nothing but the rest of the token that the tag ended in; it is passed over.
    """
    head, closed, _ = said.partition(CLOSE)
    if not closed and OPEN not in said:
        return None
    if not closed or head.count(OPEN) != 1:
        raise Refused(f"a call is written {OPEN}...{CLOSE}, one at a time")
    return head.partition(OPEN)[2]
