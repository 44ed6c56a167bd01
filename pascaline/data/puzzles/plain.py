"""A problem and its solution as plain text: how the corpus writes a trace, and how a base model, which knows no chat tokens, is asked."""

from pascaline.tokenizer import Tokenizer

ANSWER = "Answer: "


def prompt(problem: str) -> str:
    """What a base model goes on from: the problem, and a new line."""
    return f"{problem}\n"


def prompt_ids(tokenizer: Tokenizer, problem: str) -> list[int]:
    return [*tokenizer.prefix, *tokenizer.encode(prompt(problem))]


def text(problem: str, thought: str, answer: str) -> str:
    """A trace as the base model reads it."""
    return f"{prompt(problem)}{thought}\n{ANSWER}{answer}"


def split(written: str) -> tuple[str, str | None]:
    """(thought, answer) of what a base model wrote: what follows the last "Answer: " that begins a line counts; None without one, for then
    the thought was never closed."""
    thought, found, answer = written.rpartition(f"\n{ANSWER}")
    return (thought, answer) if found else (answer, None)
