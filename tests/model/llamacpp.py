"""llama.cpp as the oracle: its low-level interface in three calls."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import torch


@llama_cpp.llama_log_callback
def _silent(level, text, data):
    pass


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


class LlamaCpp:
    """A loaded file. Keys and values are cached in float32 and attention is the plain one: what is compared is the model."""

    def __init__(self, path: Path, context: int = 128):
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        assert self.context, "llama.cpp makes no context"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[T, V] of one sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        return self._decode(tokens, 0)

    def _decode(self, tokens: Sequence[int], start: int) -> torch.Tensor:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, start + i, 1, 0, 1
        assert llama_cpp.llama_decode(self.context, batch) == 0
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (len(tokens), self.size)).copy()
        llama_cpp.llama_batch_free(batch)
        return torch.from_numpy(found)

    def greedy(self, prompt: Sequence[int], length: int) -> list[int]:
        """`length` tokens, one at a time."""
        out = [int(self.logits(prompt)[-1].argmax())]
        while len(out) < length:
            out.append(int(self._decode(out[-1:], len(prompt) + len(out) - 1)[-1].argmax()))
        return out

    def tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), False, special)
        assert count >= 0
        return list(room[:count])
