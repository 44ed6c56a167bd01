"""Tokenizers in the manner of other families, small: their pre-tokenizers, normalizers, special tokens, and templates of their kind."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEADS = """\
{{- bos_token }}{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
CHATML = """\
{%- for message in messages %}
{%- if message.role == 'assistant' and message.reasoning_content is defined and loop.last %}
{{- '<|im_start|>assistant\n<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' + message.content + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
OPENED = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '<U>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}{{- '<A>' + message['content'].split('</think>')[-1] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<A><think>\n' -}}{%- endif -%}
"""
TEXTS = [f"Ask {i}: don't 'S we'LL  add {i * 37} and {i * 1234567}?\n\n\tü日本é {i % 7}\r\n" for i in range(200)] + [
    "the coin is heads tails "
] * 50


def _byte_level(pattern: str, vocab_size: int, specials: list[str], ignore_merges: bool = False) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])  # after the merges, as theirs are
    return backend


def llama3() -> tuple[tokenizers.Tokenizer, dict[str, Any], str]:
    """No pad token, a document begins with bos, the end of a turn is not the end of a document."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = _byte_level(LLAMA3, 400, names, ignore_merges=True)
    begin = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[begin])
    return backend, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, HEADS


def qwen3() -> tuple[tokenizers.Tokenizer, dict[str, Any], str]:
    """No bos, think tags as tokens that are not special, text in NFC."""
    backend = _byte_level(QWEN, 400, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in ("<think>", "</think>")])
    return backend, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML


def qwen2() -> tuple[tokenizers.Tokenizer, dict[str, Any], str]:
    """As qwen3, but think tags are plain text."""
    backend = _byte_level(QWEN, 400, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.normalizer = normalizers.NFC()
    return backend, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML


def opened() -> tuple[tokenizers.Tokenizer, dict[str, Any], str]:
    """A template that opens the thought itself, as R1's distilled models have; llama 2's pieces with bytes to fall back on."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "<U>": 3, "<A>": 4} | {f"<0x{i:02X}>": 5 + i for i in range(256)} | {"▁": 261}
    letters = sorted({c for text in TEXTS for c in text if c.isascii() and c.isprintable() and c != " "})
    pieces |= {c: 262 + i for i, c in enumerate(letters)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<U>", "<A>")])
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, OPENED


KINDS = {"llama3": llama3, "qwen3": qwen3, "qwen2": qwen2, "opened": opened}


def write(folder: Path, kind: str) -> Path:
    """tokenizer.json and tokenizer_config.json of that kind, the template in the config as older folders have it."""
    backend, names, template = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "chat_template": template, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
