"""A conversation in the terminal."""

import sys
from pathlib import Path
from typing import Any

DIM, PLAIN = "\033[2m", "\033[0m"


def talk(model: Path, temperature: float, top_p: float, max_tokens: int, seed: int, history: bool, device: str) -> None:
    """Read lines from standard input until its end and answer each; thoughts dimmed, streamed as they come."""
    from pascaline.engine import Engine, Sampling

    engine = Engine(model, device=device)
    terminal = sys.stdin.isatty()
    if terminal:
        print("Ask something; Ctrl-D ends.  For the demo's model:  Make 12 from 6, 6, 13.")
    turns: list[dict[str, Any]] = []
    while True:
        try:
            line = input("\n> " if terminal else "").strip()
        except EOFError:
            return
        if not line:
            continue
        turns = [*(turns if history else []), {"role": "user", "content": line}]
        try:
            answer = _answer(engine, turns, Sampling(temperature, top_p, max_tokens, seed=seed + len(turns)))
        except KeyboardInterrupt:  # stops the answer, not the conversation
            print(PLAIN if sys.stdout.isatty() else "", "(stopped)")
            continue
        turns.append({"role": "assistant", "content": answer})


def _answer(engine: Any, turns: list[dict[str, Any]], sampling: Any) -> str:
    """Print thought and answer token by token; returns the answer's text."""
    own = engine.tokenizer
    dim, plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")
    pieces: dict[bool, list[int]] = {True: [], False: []}
    shown = {True: "", False: ""}
    thinking = True
    print(dim, end="", flush=True)
    for token in engine.stream(turns, sampling):
        if token == own.unthink:
            thinking = False
            print(f"{plain}\n", end="", flush=True)
        elif token != own.end:
            pieces[thinking].append(token)
            text = own.decode(pieces[thinking])
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                print(text[len(shown[thinking]) :], end="", flush=True)
                shown[thinking] = text
    print(f"{plain}\n(the thought was cut off at the token limit)" if thinking else "")
    return own.decode(pieces[False])
