"""llama.cpp as the oracle: its low-level interface in three calls; and strings of all kinds, with a tokenizer for them."""

import ctypes
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from pascaline import tokenizer
from pascaline.tokenizer import Tokenizer


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

    def text(self, token: int) -> str:
        """As the file has it."""
        return llama_cpp.llama_vocab_get_text(self.vocab, token).decode()


RUNS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFXYZ", "0123456789", " ", " \t", "\n", "\r\n", "\x0b\x0c\x1c\x85\xa0\u2003\u2028\u2029\u3000\ufeff",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "àéîõüçñßæøłžſK", "абвгдежэюяЁ", "αβγδωΆ", "אבגדה", "ابتثجحخ\u064b\u064e", "नमस्तेकि", "ไทยภาษา",
    "漢字中文日本語龥", "ひらがなカタカナー", "한국어\u1100\u1161", "🙂🚀👍🏽👨‍👩‍👧🇩🇪", "①②³½Ⅷ٣४៣𝟙", 
    "\u0301\u0308\u20dd\ufe0f\u200d\u200b",
    "\x00\x01\x1b\x7f\u0090",
    "\U000f0000\ue000\ufffe\ufdd0\U0010ffff", "«»“”‘’—…。、！？", "+<=>|~^$€∑∞", "𐐀𐐨ǅʰªº", "\u00ad\u2060\u180e\u061c",
]  # fmt: skip
PIECES = ["'s", "'LL", "'re", "don't", " the", "  ", "\n\n", " \n", "1234", "3.14", "<|", "|>", "<|begin|", "<think", "http://a.b/c?d=1"]
# Characters that Unicode 16 added: tokenizers knows them, llama.cpp's tables end with 15.1, so the two cut words there otherwise.
NEWER = [
    (0x1C89, 0x1C8A), (0xA7CB, 0xA7CD), (0xA7DA, 0xA7DC), (0x105C0, 0x105F3), (0x10D40, 0x10D85), (0x10EC2, 0x10EC4), (0x11380, 0x113D3),
    (0x116D0, 0x116E3), (0x11BC0, 0x11BF9), (0x11DE0, 0x11DE9), (0x13460, 0x143FA), (0x16100, 0x16139), (0x16D40, 0x16D79),
    (0x16FF4, 0x16FF6), (0x18CFF, 0x18CFF), (0x1CCF0, 0x1CCF9), (0x1E5D0, 0x1E5FA), (0xD800, 0xDFFF),
    (0x897, 0x897), (0x1B4E, 0x1B7F), (0x2427, 0x2429), (0x1CC00, 0x1CEB3), (0x1F8B2, 0x1F8C1), (0x1FA89, 0x1FAF8), (0x1FBCB, 0x1FBEF),
]  # fmt: skip
SPECIALS = [s for s in tokenizer.SPECIALS if s not in (tokenizer.THINK, tokenizer.UNTHINK)]


def strings(seed: int, count: int, specials: list[str]) -> list[str]:
    """Runs of one kind after another, ready pieces, special tokens written out, and characters from anywhere in Unicode."""
    draw = random.Random(seed)

    def run() -> str:
        kind = draw.random()
        if kind < 0.15:
            return draw.choice(PIECES + specials)
        if kind < 0.25:
            anywhere = (draw.randrange(0x110000) for _ in range(3))
            return "".join(chr(c) for c in anywhere if not any(first <= c <= last for first, last in NEWER))
        return "".join(draw.choices(draw.choice(RUNS), k=draw.randint(1, 6)))

    return ["".join(run() for _ in range(draw.randint(0, 12))) for _ in range(count)]


@cache
def trained(size: int = 414) -> Tokenizer:
    """On text and on strings like the tested ones, so that merges cross whatever a wrong cut would cut."""
    docs = Path(__file__).parents[2] / "docs"
    return tokenizer.train([*(p.read_text() for p in sorted(docs.glob("*.md"))[:3]), *strings(99, 2000, [])], size)
