"""A conversation in the terminal."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pascaline.errors import BadInput

DIM, PLAIN = "\033[2m", "\033[0m"
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """A model may say any byte: control characters, which could steer the terminal, become U+FFFD, one for one."""
    return text.translate(_CONTROL)


def talk(model: Path, temperature: float, top_p: float, max_tokens: int, seed: int, history: bool, device: str) -> None:
    """Read lines from standard input until its end and answer each; thoughts dimmed, streamed as they come."""
    refuse(model)
    from pascaline.engine import Engine, Sampling

    sampling = Sampling(temperature, top_p, max_tokens)
    engine = Engine(model, device=device, max_rows=1, speculate=True)
    for stream in (sys.stdin, sys.stdout):  # a byte that is not text must not end the conversation
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    if terminal:
        print("Ask something; Ctrl-D ends.  For the demo's model:  Make 12 from 6, 6, 13.")
    turns: list[dict[str, Any]] = []
    while (line := _read(terminal)) is not None:
        if not line:
            continue
        turns = [*(turns if history else []), {"role": "user", "content": line}]
        try:
            answer = _answer(engine, turns, replace(sampling, seed=seed))
        except BadInput as e:  # a question that does not fit, with what went before it
            print(f"pascaline: {e}" + (" The earlier turns are forgotten now." if turns[1:] else ""), file=sys.stderr)
            turns = []
            continue
        except KeyboardInterrupt:  # stops the answer, not the conversation
            print(PLAIN if sys.stdout.isatty() else "", "(stopped)")
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": answer})
        seed += 1  # the same question again gets another answer


def refuse(model: Path) -> None:
    """Say what is wrong with the folder before torch is imported."""
    if not (model / "config.json").is_file():
        inside = (model / "model" / "config.json").is_file()
        raise BadInput(
            f"{model} is not a model folder: it has no config.json" + (f"; did you mean '{model / 'model'}'?" if inside else ".")
        )


def _read(terminal: bool) -> str | None:
    """The next line, None at the end."""
    try:
        return input("\n> " if terminal else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return None


def _answer(engine: Any, turns: list[dict[str, Any]], sampling: Any) -> str:
    """Print thought and answer token by token; returns the answer's text."""
    from pascaline.engine.transcript import Transcript

    dim, plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")
    prompt = engine.tokenizer.prompt_ids(turns)
    said = Transcript(engine.tokenizer, prompt)
    begun = False
    thinking = False

    def show(reasoning: str, text: str) -> None:
        nonlocal begun, thinking
        if not begun and said.reasoning is not None:  # not before the prompt has been found to fit
            begun = thinking = True
            print(dim, end="")
        print(printable(reasoning), end="", flush=True)
        if thinking and not said.thinking:
            thinking = False
            print(f"{plain}\n", end="", flush=True)
        print(printable(text), end="", flush=True)

    for token in engine.stream(prompt, sampling):
        show(*said.feed([token]))
    cut = said.thinking
    show(*said.finish())
    print("(the thought was cut off at the token limit)" if cut else "")
    return said.text
