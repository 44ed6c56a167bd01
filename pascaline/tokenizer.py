"""Byte-level BPE and the chat template: text to token ids and back, the same ids and rendering as transformers gives.

Two backends read the same vocabulary: one parses special tokens in text (for rendered chats), one never does (for
everything a user or a document says, so that nobody can forge a turn by writing `<|end|>`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pascaline.errors import BadInput
from pascaline.runs import write_atomic, write_json
from pascaline.template import TEMPLATE, compiled

SPECIALS = ("<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<think>", "</think>")
BEGIN, END, PAD, USER, ASSISTANT, THINK, UNTHINK = SPECIALS
MARK = "\ue000"  # a private character, to find what stands beside it
BYTES = 256  # the byte alphabet: with it no text is unknown

# The character that byte-level vocabularies write for each byte (GPT-2's table).
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {chr(b): b for b in _SHOWN} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _SHOWN)}

Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """A vocabulary with its chat template. Made by `train` or `Tokenizer.load`; never changes."""

    def __init__(self, definition: str, config: Mapping[str, Any], template: str | None):
        """definition: the text of tokenizer.json; config: the object in tokenizer_config.json; template: Jinja source.

        Raises ValueError (json) or Exception (tokenizers' own) for a broken definition; `load` says which file.
        """
        self.config, self.template = dict(config), template
        self._parsing = tokenizers.Tokenizer.from_str(definition)
        plain = json.loads(definition)
        plain["added_tokens"] = [token for token in plain.get("added_tokens") or [] if not _reserved(token)]
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        for backend in (self._parsing, self._plain):
            backend.no_padding()
            backend.no_truncation()
        added = self._parsing.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if _reserved(_fields(token))}
        self._special_ids = frozenset(self._special.values())
        self._decoder = json.dumps(plain.get("decoder"))
        self._pieces: dict[tuple[int, bool], bytes] = {}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if self._special else "(?!)")

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From a folder with tokenizer.json and tokenizer_config.json (and chat_template.jinja), ours or a model's.

        Raises BadInput naming the file that is missing or broken.
        """
        folder = Path(folder)
        definition = _read(folder / "tokenizer.json")
        config_path = folder / "tokenizer_config.json"
        try:
            config = json.loads(_read(config_path))
        except ValueError as error:
            raise BadInput(f"{config_path} is not JSON: {error}; it may have been cut off, copy it again") from error
        if not isinstance(config, dict):
            raise BadInput(f"{config_path} must hold a JSON object, not a {type(config).__name__}")
        template = config.get("chat_template")
        if isinstance(template, list):  # older folders list several by name
            template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
        if (folder / "chat_template.jinja").exists():
            template = _read(folder / "chat_template.jinja")
        try:
            return cls(definition, config, template)
        except Exception as error:  # tokenizers raises plain Exception for a bad definition
            raise BadInput(f"{folder / 'tokenizer.json'} is not a tokenizer definition: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, each atomically. Byte-stable."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer.json", self._parsing.to_str(pretty=True) + "\n")
        write_json(folder / "tokenizer_config.json", {k: v for k, v in self.config.items() if k != "chat_template"})
        if self.template is not None:
            write_atomic(folder / "chat_template.jinja", self.template)

    # ---- ids ---------------------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """How many ids there are; the largest id is one less in a vocabulary without holes."""
        return int(self._parsing.get_vocab_size(with_added_tokens=True))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token's name and id. Where two are equal, ids of the one mean the same to a model of the other."""
        return dict(self._parsing.get_vocab(with_added_tokens=True))

    @cached_property
    def begin(self) -> int:
        return self._configured("bos_token")

    @cached_property
    def end(self) -> int:
        return self._configured("eos_token")

    @cached_property
    def pad(self) -> int:
        """Fills up rows, and is never seen; the end token where a folder names none."""
        return self._configured("pad_token") if self._token_text("pad_token") else self.end

    @cached_property
    def prefix(self) -> list[int]:
        """What a document begins with: the begin token, or nothing where a folder has none (Qwen's)."""
        return [self.begin] if self._token_text("bos_token") else []

    @cached_property
    def end_of_turn(self) -> int:
        """What the template puts after the assistant's words, which need not be the end of a document (`end`)."""
        try:
            said = self.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}])
        except BadInput:  # no template, or one that cannot be used: chats say so, plain text needs none
            return self.end
        found = self._special_pattern.search(said.rpartition(MARK)[2])
        return self._special[found[0]] if found else self.end

    @cached_property
    def user(self) -> int:
        return self.id(USER)

    @cached_property
    def assistant(self) -> int:
        return self.id(ASSISTANT)

    @cached_property
    def think(self) -> int:
        return self.id(THINK)

    @cached_property
    def unthink(self) -> int:
        return self.id(UNTHINK)

    def id(self, token: str) -> int:
        """The id of a token by its exact name. Raises BadInput when the vocabulary has none of that name."""
        found = self._parsing.token_to_id(token)
        if found is None:
            raise BadInput(f"this tokenizer has no token '{token}'; it was made for another chat format")
        return int(found)

    def _token_text(self, name: str) -> str | None:
        value = self.config.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _configured(self, name: str) -> int:
        token = self._token_text(name)
        if token is None:
            raise BadInput(f"tokenizer_config.json names no {name}; add one")
        return self.id(token)

    # ---- text to ids and back ----------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing put before or after. Special tokens written in it are text unless special=True.

        Raises BadInput for a lone surrogate, which is not a character.
        """
        backend = self._parsing if special else self._plain
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        except (UnicodeError, TypeError):
            return self.encode_batch([text], special)[0]  # which says what is wrong

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        backend = self._parsing if special else self._plain
        try:
            return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (UnicodeError, TypeError) as error:
            for text in texts:
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise BadInput(f"text holds a lone surrogate and is not Unicode: {text[:40]!a}") from error
            raise

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of the ids. Special tokens are left out unless special=True; bytes that are not UTF-8 become U+FFFD."""
        kept = list(ids) if special else [i for i in ids if i not in self._special_ids]
        return str(self._parsing.decode(kept, skip_special_tokens=False))

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves it out."""
        return token in self._special_ids

    def piece(self, token: int, first: bool = False) -> bytes:
        """The bytes that a token stands for, perhaps not whole characters. first: at the beginning of a text, where some vocabularies
        leave a blank out. Nothing for an id that the vocabulary has not."""
        found = self._pieces.get((token, first))
        if found is None:
            found = self._pieces[token, first] = self._bytes_of(token, first)
        return found

    def _bytes_of(self, token: int, first: bool) -> bytes:
        name = self._parsing.id_to_token(token)
        if name is None:
            return b""
        if "ByteLevel" in self._decoder:
            return bytes(ALPHABET[c] for c in name) if all(c in ALPHABET for c in name) else name.encode()
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name) if "ByteFallback" in self._decoder else None
        if byte and int(byte[1], 16) > 127:
            return bytes.fromhex(byte[1])
        before = [] if first else self.encode("a")
        return self.decode([*before, token], special=True)[len(self.decode(before)) :].encode()

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token, where text is nothing but tokens' bytes; else 0."""
        if "ByteLevel" not in self._decoder or self._parsing.normalizer is not None:
            return 0
        return max(map(len, self._parsing.get_vocab()))  # a character a byte

    def at_least(self, text: str) -> int:
        """A number of tokens that the text has at least, without tokenising it; 0 where that cannot be told."""
        return len(text.encode(errors="replace")) // self._longest if self._longest else 0

    # ---- chats -------------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, add_generation_prompt: bool = False, thinking: bool = True) -> str:
        """The conversation as text, as transformers' apply_chat_template(tokenize=False) writes it.

        messages: {"role": "system" | "user" | "assistant", "content": str, and for the assistant optionally
        "reasoning_content": str}. Raises BadInput for messages that the template cannot take.
        """
        for index, message in enumerate(messages):
            for field in ("role", "content"):
                if not isinstance(message, Mapping) or not isinstance(message.get(field), str):
                    raise BadInput(f"message {index} must be an object whose {field} is a string")
        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                thinking=thinking,
                enable_thinking=thinking,  # Qwen3's name for it
                **{name: text for name in ("bos_token", "eos_token", "pad_token") if (text := self._token_text(name))},
            )
        except Exception as error:  # a folder's own template is a program; whatever it raises is told in one sentence
            raise BadInput(f"the chat template refuses these messages: {error}") from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if self.template is None:
            raise BadInput("this tokenizer has no chat template; put a chat_template.jinja beside its tokenizer.json")
        return compiled(self.template)

    def prompt_ids(self, messages: Messages | str, thinking: bool = True, finished: bool = False) -> list[int]:
        """Ids of the conversation (or of one user message) up to where the assistant's turn goes on; finished: up to its last message.

        The same ids as transformers gives, except that special tokens written inside a message stay text.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        said = "\n".join(str(value) for message in messages for value in dict(message).values())
        if not self._special_pattern.search(said):
            return self.encode(self.render(messages, not finished, thinking), special=True)
        # Break each forged token with a character that occurs nowhere, render, and take the character out again.
        marker = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in said)
        guarded = [
            {
                k: self._special_pattern.sub(lambda m: m[0][0] + marker + m[0][1:], v) if isinstance(v, str) else v
                for k, v in message.items()
            }
            for message in messages
        ]
        ids: list[int] = []
        for piece in self._special_pattern.split(self.render(guarded, not finished, thinking)):
            ids += [self._special[piece]] if piece in self._special else self.encode(piece.replace(marker, ""))
        return ids

    def chat_ids(self, user: Messages | str, thought: str, answer: str) -> tuple[list[int], list[int]]:
        """(prompt ids, completion ids): the completion goes on where the template leaves the assistant's turn, and ends with the token
        that ends a turn.

        Together they are the ids of the rendered conversation with the thought as `reasoning_content`, where the template has a place for
        it. Where it has none the thought is written as R1 and Qwen3 do, in lines of its own.
        """
        prompt = self.prompt_ids(user)
        gap = "" if self._bare(prompt) else "\n"
        start = ["", THINK, gap] if self._standing(prompt) != THINK else [""]
        start[-1] += f"{thought}{gap}"
        return prompt, [*self._tagged(*start, UNTHINK, f"{2 * gap}{answer}"), self.end_of_turn]

    def _tagged(self, *pieces: str) -> list[int]:
        """Ids of text, tag, text, ..., text; a tag is a token in some vocabularies and plain text in the others."""
        ids: list[int] = []
        text = ""
        for i, piece in enumerate(pieces):
            if i % 2 and piece in self._special:
                ids += [*self.encode(text), self._special[piece]]
                text = ""
            else:
                text += piece
        return ids + self.encode(text)

    def _standing(self, prompt: Sequence[int]) -> str:
        """The think tag at the end of a prompt, "" if there is none: a template may open the thought, or close it at once."""
        tail = self.decode(prompt[-8:], special=True).rstrip()
        return next((tag for tag in (THINK, UNTHINK) if tail.endswith(tag)), "")

    def _bare(self, prompt: Sequence[int]) -> bool:
        """Whether nothing stands between a tag and its text, as in our own template."""
        return bool(prompt) and prompt[-1] in (self._special.get(THINK), self._special.get(UNTHINK))

    def tags(self, prompt: Sequence[int]) -> tuple[str, bool, int | None, int | None]:
        """How thoughts are written after `prompt`: the think tag that stands at its end ("" if none), whether nothing stands between a
        tag and its text, and the ids of the two tags (None where they are plain text)."""
        return self._standing(prompt), self._bare(prompt), self._special.get(THINK), self._special.get(UNTHINK)

    def thought(self, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str | None, str | None]:
        """What was said after `prompt`, perhaps not to its end, as (thought, answer). The thought is None where there is none, the answer
        None where the thought is not closed. A closing tag that closes nothing is no tag."""
        standing, bare, open_, close = self.tags(prompt)
        if close is None:  # the tags are plain text
            before, tag, after = self.decode(ids).partition(UNTHINK)
            closed, opened = bool(tag), before.lstrip().startswith(THINK)
        else:
            ids = list(ids)
            border = ids.index(close) if close in ids else len(ids)
            before, closed, after = self.decode(ids[:border]), border < len(ids), self.decode(ids[border + 1 :])
            opened = ids[:1] == [open_]
        if standing == UNTHINK or not (standing or opened):
            return None, self.decode(ids)
        if not bare:
            before, after = before.lstrip().removeprefix(THINK).strip("\n"), after.lstrip("\n")
        return before, after if closed else None


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens (fewer when the texts have no more pairs that occur twice) from the texts.

    The same texts in the same order give the same file. Digits are always single tokens, so that numbers are read
    digit by digit. Raises BadInput when the byte alphabet and the special tokens do not fit.
    """
    least = BYTES + len(SPECIALS)
    if vocab_size < least:
        raise BadInput(f"vocabulary of {vocab_size} is smaller than the byte alphabet and the special tokens; take at least {least}")
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    definition = json.loads(backend.to_str())
    for token in definition["added_tokens"]:
        # As in DeepSeek-R1's files: skip_special_tokens must not swallow the tags that reasoning parsers look for.
        token["special"] = token["content"] not in (THINK, UNTHINK)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(json.dumps(definition), config, TEMPLATE)


def _fields(token: tokenizers.AddedToken) -> dict[str, Any]:
    """The two fields of an added token that decide whether text may name it."""
    return {"content": token.content, "special": token.special}


def _reserved(token: Mapping[str, Any]) -> bool:
    """Whether a token steers the chat (and must not be parsed in what people write)."""
    return bool(token.get("special")) or token.get("content") in (THINK, UNTHINK)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing; a tokenizer folder has tokenizer.json and tokenizer_config.json") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
