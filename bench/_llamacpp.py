"""llama.cpp on our own export of the measured model, through the low-level interface of llama-cpp-python."""

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _common import twins

from pascaline import tokenizer
from pascaline.model import gguf


def missing() -> str:
    """Why it cannot be measured, or ""."""
    try:
        import gguf as _
        import llama_cpp as _  # noqa: F811
    except ImportError as e:
        return f"llama.cpp is not measured: {e.name} is not installed (pip install pascaline[gguf,llama])"
    return ""


def file(kind: str) -> Path:
    """The measured model as a GGUF file; a small tokenizer, which nobody uses, makes it whole."""
    folder = Path(tempfile.mkdtemp())
    twins()[0].save(folder)
    tokenizer.train(["one two three " * 40], 300).save(folder)
    gguf.export(folder, folder / "model.gguf", kind, quiet=True)
    return folder / "model.gguf"


def decoder(path: Path, tokens: torch.Tensor, new: int) -> Callable[[], int]:
    """A function that reads prompts [B, T] and then computes new - 1 more tokens of each, whose ids are given: nothing is sampled. Each
    sequence has a stream of the cache to itself, which is llama.cpp's fastest way."""
    import llama_cpp as lib

    log = _silence(lib)
    (rows, length), threads = tokens.shape, torch.get_num_threads()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_seq_max, options.kv_unified = rows * (length + new), rows, False
    options.n_batch = 2048
    options.n_threads = options.n_threads_batch = threads
    context = lib.llama_init_from_model(model, options)
    assert model and context and log, "llama.cpp does not load the model"
    per_step = max(2048 // length, 1)
    batch = lib.llama_batch_init(max(per_step * length, rows), 0, 1)

    def decode(ids: list[list[int]], first_row: int, start: int) -> None:
        batch.n_tokens = 0
        for row, own in enumerate(ids, first_row):
            for at, token in enumerate(own):
                i = batch.n_tokens
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + at, 1, row
                batch.logits[i] = at == len(own) - 1
                batch.n_tokens += 1
        assert lib.llama_decode(context, batch) == 0
        lib.llama_get_logits(context)  # waits until they are computed

    def work() -> int:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for first in range(0, rows, per_step):
            decode(tokens[first : first + per_step].tolist(), first, 0)
        step = tokens[:, :1].tolist()
        for at in range(length, length + new - 1):
            decode(step, 0, at)
        return rows * new

    return work


def _silence(lib):  # type: ignore[no-untyped-def]
    """Kept alive by whoever calls: llama.cpp holds the bare function."""
    if not hasattr(lib, "_quiet"):
        lib._quiet = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(lib._quiet, ctypes.c_void_p(0))
    return lib._quiet
