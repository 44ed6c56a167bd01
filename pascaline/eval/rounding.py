"""What a GGUF file's number type costs: perplexity with the folder's weights and with the file's."""

from pathlib import Path
from typing import Any

import numpy as np

from pascaline.data.sources import STDLIB, documents
from pascaline.errors import BadInput
from pascaline.eval.perplexity import by_position
from pascaline.model import gguf, hf
from pascaline.progress import Progress
from pascaline.tokenizer import Tokenizer

TOKENS = 20_000  # of text, at most
WINDOW = 512  # positions


def cost(folder: str | Path, file: str | Path, text: str | Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """{"text", "tokens", "before", "after"}: perplexity a token of the model in `folder` on the first TOKENS tokens of a text (None:
    the standard library), in windows of WINDOW, and with the weights of `file`, which `gguf.export` wrote from it; both in float32.

    BadInput where the text is missing or holds fewer than two tokens.
    """
    model, tokenizer = hf.load(folder), Tokenizer.load(folder)
    length = min(WINDOW, model.config.max_position_embeddings)
    windows = _windows(tokenizer, str(text) if text else STDLIB, length)
    told: dict[str, Any] = {"text": str(text) if text else "the standard library", "tokens": 0}
    with Progress("perplexity", 2 * len(windows), "window", enabled=not quiet) as progress:

        def watch() -> None:
            progress.update(progress.step + 1)

        for when in ("before", "after"):
            if when == "after":
                gguf.load_into(model, file)
            (found,) = by_position(model, windows, [length], watch)
            told |= {"tokens": found["tokens"], when: found["perplexity"]}
    if not told["tokens"]:
        raise BadInput(f"{told['text']} holds no two tokens to measure on.")
    return told


def _windows(tokenizer: Tokenizer, source: str, length: int) -> list[np.ndarray]:
    """Token ids of the source's documents, each cut every `length` tokens, TOKENS in all."""
    windows, left = list[np.ndarray](), TOKENS
    for document in documents([source], None, lambda _: None):
        ids = np.array(tokenizer.encode(document.text)[:left], np.int64)
        windows += [ids[start : start + length] for start in range(0, len(ids), length)]
        left -= len(ids)
        if not left:
            break
    return windows


def describe(told: dict[str, Any]) -> str:
    """What an export wrote and what it cost, in lines for the terminal."""
    lines = [f"{told['file']}: {told['type']}, {told['tensors']} tensors, {told['bytes'] / 1e6:.1f} MB."]
    if told["unfit"]:
        lines.append(f"{told['unfit']} of them are float32: their rows are no multiple of the type's block.")
    lines += told["notes"]
    if lost := told.get("perplexity"):
        change = 100 * (lost["after"] / lost["before"] - 1)
        values = f"{lost['before']:.4g} -> {lost['after']:.4g} ({change:+.2f} %)"
        lines.append(f"Perplexity on {lost['tokens']:,} tokens of {lost['text']}: {values}.")
    return "\n".join(lines)
