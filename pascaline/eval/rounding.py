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


def export(
    folder: str | Path, file: str | Path, kind: str, text: str | Path | None = None, measure: bool = True, quiet: bool = False
) -> dict[str, Any]:
    """`gguf.export`, and for a rounded type what it costs, as "perplexity": {"text", "tokens", "before", "after"}.

    Perplexity is a token's, on the first TOKENS tokens of a text (None: the standard library) in windows of WINDOW, with the weights of
    the folder and with those read back from the file, both in float32. BadInput, before anything is written, for a text that is not
    there or holds fewer than two tokens.
    """
    measured = measure and kind != "f32"
    windows = _windows(folder, str(text) if text else STDLIB) if measured else []
    told = gguf.export(folder, file, kind, quiet)
    if measured:
        before, after = _perplexities(folder, file, windows, quiet)
        tokens = sum(len(window) - 1 for window in windows)
        told["perplexity"] = {"text": str(text) if text else "the standard library", "tokens": tokens, "before": before, "after": after}
    return told


def _windows(folder: str | Path, source: str) -> list[np.ndarray]:
    """Token ids of the source's documents, each cut into windows, TOKENS in all."""
    length, tokenizer = min(WINDOW, hf.read_config(folder).max_position_embeddings), Tokenizer.load(folder)
    windows, left = list[np.ndarray](), TOKENS
    for document in documents([source], None, lambda _: None):
        ids = np.array(tokenizer.encode(document.text)[:left], np.int64)
        cut = [ids[start : start + length] for start in range(0, len(ids), length)]
        windows += [window for window in cut if len(window) > 1]
        left -= len(ids)
        if not left:
            break
    if not windows:
        raise BadInput(f"{source} holds no two tokens to measure on.")
    return windows


def _perplexities(folder: str | Path, file: str | Path, windows: list[np.ndarray], quiet: bool) -> tuple[float, float]:
    """With the weights of the folder, and of the file."""
    model = hf.load(folder)
    with Progress("perplexity", 2 * len(windows), "window", enabled=not quiet) as progress:

        def mean() -> float:
            (found,) = by_position(model, windows, [WINDOW], lambda: progress.update(progress.step + 1))
            return float(found["perplexity"])

        before = mean()
        gguf.load_into(model, file)
        return before, mean()


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
