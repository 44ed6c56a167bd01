"""Chats from .jsonl files, as training documents whose loss lies on the tokens that a role would really have to say.

A model is asked turn by turn, and each time the chat template writes the whole conversation anew: many leave out the thoughts of
earlier turns. So a turn is learnt in the very context in which it will be asked for. Where that context goes on from the turn before,
both are one document; where the template has taken something back, the turn begins a document of its own.
"""

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pascaline.data.batch import Sample
from pascaline.data.puzzles.collection import rows
from pascaline.data.turns import episode_ids, stops_of
from pascaline.errors import BadInput
from pascaline.tokenizer import THINK, UNTHINK, Tokenizer

THOUGHTS = ("reasoning_content", "thinking")
MARKS = ("\ue000", "\uf8ff")  # private characters whose UTF-8 bytes differ at both ends


@dataclass(frozen=True)
class Chat:
    """A conversation. Each message has `role` and `content`, an assistant's perhaps its thought in `reasoning_content`. name: where it
    comes from, file:line. completion_from: the first message that may be learnt. stops: not None for an episode, whose turns are learnt as
    they were played (turns.py); strings that ended a turn."""

    messages: list[dict[str, Any]]
    name: str
    completion_from: int = 0
    stops: tuple[str, ...] | None = None


# ---- files -----------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> list[Chat]:
    """All chats of a .jsonl file with TRL's columns: `messages`, or `prompt` and `completion`. BadInput names a bad row's line."""
    return list(stream(path))


def stream(path: str | Path) -> Iterator[Chat]:
    """`read`, one chat at a time."""
    empty = True
    for where, row in rows(path):
        file, _, line = where.rpartition(" line ")
        yield _chat(row, f"{file}:{line}")
        empty = False
    if empty:
        raise BadInput(f"{path} holds no chat; it must have one JSON object a line, with messages, or prompt and completion.")


def _chat(row: dict[str, Any], name: str) -> Chat:
    if row.get("tools"):
        raise BadInput(f"{name} has tools, which no chat template is told of here; write them into the system message.")
    if row.get("messages") is not None:
        if isinstance(row["messages"], str):
            raise BadInput(f"{name}: messages must be a list, each with role and content.")
        return _episode(Chat(conversation(row["messages"], "user", f"{name}: messages"), name), row)
    if row.get("prompt") is None or row.get("completion") is None:
        raise BadInput(f"{name} needs messages, or prompt and completion, and has {', '.join(row) or 'no column'}.")
    prompt = conversation(row["prompt"], "user", f"{name}: prompt")
    completion = conversation(row["completion"], "assistant", f"{name}: completion")
    return _episode(Chat([*prompt, *completion], name, len(prompt)), row)


def _episode(chat: Chat, row: dict[str, Any]) -> Chat:
    """With the row's `stops`, if it has some: then it was played, from its first answer on or from where its completion begins."""
    stops = stops_of(row, chat.name)
    if stops is None:
        return chat
    first = next((i for i, m in enumerate(chat.messages) if m["role"] == "assistant"), len(chat.messages))
    return replace(chat, completion_from=chat.completion_from or first, stops=tuple(stops))


def conversation(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    """The messages of a column, checked: a list of them, or a text, which is one message of that role."""
    if isinstance(value, str):
        return [_thoughtful({"role": role, "content": value})]
    if not isinstance(value, list) or not value:
        raise BadInput(f"{where} must be a text, or a list of at least one message, each with role and content.")
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(value)]


def _message(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadInput(f'{where} must be an object like {{"role": "user", "content": "..."}}, not {type(raw).__name__}.')
    message = {key: value for key, value in raw.items() if value is not None}  # data sets fill missing columns with null
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise BadInput(f"{where}.{key} must be a text.")
    thoughts = [message.pop(key) for key in THOUGHTS if key in message]
    if thoughts:
        if not isinstance(thoughts[0], str):
            raise BadInput(f"{where}: the thought must be a text.")
        message["reasoning_content"] = thoughts[0]
    return _thoughtful(message)


def _thoughtful(message: dict[str, Any]) -> dict[str, Any]:
    """A thought that an answer begins with, between think tags as R1 says it, goes where thoughts stand: as text it would be spelt."""
    before, closed, answer = message["content"].lstrip().partition(UNTHINK)
    if message["role"] != "assistant" or "reasoning_content" in message or not closed or not before.startswith(THINK):
        return message
    return {**message, "content": answer.lstrip("\n"), "reasoning_content": before.removeprefix(THINK).strip("\n")}


# ---- what is learnt ---------------------------------------------------------------------------------------------------


def documents(chat: Chat, tokenizer: Tokenizer, roles: Collection[str]) -> list[Sample]:
    """The chat as documents: each turn of `roles` carries `ce` in one of them; none, if the chat has no such turn.

    BadInput with the chat's name for messages that the template cannot take, or writes so that a turn's tokens cannot be told."""
    if chat.stops is not None:
        return _played(chat, tokenizer, roles)
    found: list[tuple[list[int], list[slice]]] = []
    for i in range(chat.completion_from, len(chat.messages)):
        if chat.messages[i]["role"] not in roles:
            continue
        try:
            ids, learnt = _turn(chat.messages[: i + 1], tokenizer)
        except BadInput as error:
            raise BadInput(f"{chat.name}: {error}") from None
        spans = found.pop()[1] if found and found[-1][0] == ids[: len(found[-1][0])] else []
        found.append((ids, [*spans, learnt]))
    return [_sample(ids, spans) for ids, spans in found]


def _played(chat: Chat, tokenizer: Tokenizer, roles: Collection[str]) -> list[Sample]:
    """An episode is one document; of its words only the assistant's are anybody's to learn."""
    prompt, turns = chat.messages[: chat.completion_from], chat.messages[chat.completion_from :]
    try:
        ids, spans = episode_ids(tokenizer, prompt, turns, chat.stops or ())
    except BadInput as error:
        raise BadInput(f"{chat.name}: {error}") from None
    return [_sample(ids, spans)] if "assistant" in roles else []


def _sample(ids: list[int], spans: Iterable[slice]) -> Sample:
    weights = np.zeros(len(ids), np.float32)
    for span in spans:
        weights[span] = 1.0
    weights[:1] = 0.0  # nothing stands before it
    return Sample(np.array(ids), {"ce": weights})


def _turn(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], slice]:
    """Ids of the conversation up to its last message's end, and which of them that message's role has to say."""
    if messages[-1]["role"] != "assistant":
        return _words(messages, tokenizer)
    prompt, message = tokenizer.prompt_ids(messages[:-1]), messages[-1]
    thought = message.get("reasoning_content")
    completion = _going_on(prompt, tokenizer.prompt_ids(messages, finished=True), tokenizer)
    if completion is None or (thought is not None and not _shows(completion, thought, tokenizer)):
        if thought is None and tokenizer.tags(prompt)[0] != THINK:
            raise BadInput("the chat template writes an assistant's turn otherwise than its generation prompt begins one, so that no token "
                           "of it is sure to be the assistant's; mend the template.")  # fmt: skip
        _, completion = tokenizer.chat_ids(messages[:-1], thought or "", message["content"])  # as R1's own template wants it
    return [*prompt, *completion], slice(len(prompt), len(prompt) + len(completion))


def _going_on(prompt: list[int], whole: list[int], tokenizer: Tokenizer) -> list[int] | None:
    """What follows `prompt` in the conversation `whole`, up to the token that ends the turn; None if `whole` does not begin with it.

    A piece of text may reach over the border ("\\n" and an answer's own); a model never says half of it, so it is cut there, and what
    follows encoded again up to the next special token."""
    border = _common(prompt, whole)
    rest = whole[len(prompt) :]
    if border < len(prompt):
        after = next((i for i in range(border, len(whole)) if tokenizer.is_special(whole[i])), len(whole))
        before, text = (tokenizer.decode(ids, special=True) for ids in (prompt, whole[:after]))
        if not text.startswith(before):
            return None
        rest = [*tokenizer.encode(text[len(before) :]), *whole[after:]]
        if tokenizer.decode([*prompt, *rest], special=True) != tokenizer.decode(whole, special=True):
            return None
    end = tokenizer.end_of_turn
    return [*rest[: rest.index(end) if end in rest else None], end]


def _shows(completion: list[int], thought: str, tokenizer: Tokenizer) -> bool:
    said = tokenizer.decode(completion, special=True)
    return UNTHINK in said and thought.strip() in said


def _words(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], slice]:
    """The last message's words, and the token that ends the turn if one follows: what stands where other words would change the ids."""
    whole = tokenizer.prompt_ids(messages, finished=True)
    marked = [tokenizer.prompt_ids([*messages[:-1], {**messages[-1], "content": mark}], finished=True) for mark in MARKS]
    if marked[0] == marked[1]:
        raise BadInput(f"the chat template does not show the last of {len(messages)} messages, whose role is {messages[-1]['role']}.")
    start = min(_common(whole, other) for other in marked)
    stop = len(whole) - min(_common(whole[start:][::-1], other[start:][::-1]) for other in marked)
    if whole[stop : stop + 1] == [tokenizer.end_of_turn]:
        stop += 1
    return whole[:stop], slice(start, stop)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """A chat that is not learnt from. tokens: of its longest document, 0 if none of its tokens is to be learnt."""

    name: str
    tokens: int


@dataclass
class ChatSamples:
    """Documents of chats side by side, five bytes a token. starts: of each document, and where the last one ends; owners: the chat that
    each is of, by its number in `names`."""

    tokens: np.ndarray
    learnt: np.ndarray
    starts: np.ndarray
    owners: np.ndarray
    names: list[str]
    left_out: list[LeftOut]
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.diff(self.starts)

    def get(self, i: int) -> Sample:
        span = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return Sample(self.tokens[span].astype(np.int64), {"ce": self.learnt[span].astype(np.float32)})

    def name(self, i: int) -> dict[str, Any]:
        return {"chat": self.names[self.owners[i]]}


def gather(
    chats: Iterable[Chat], tokenizer: Tokenizer, roles: Collection[str], longest: int, watch: Callable[[int], None] = lambda n: None
) -> ChatSamples:
    """The documents of all chats. A chat is left out whole if one of its documents has more than `longest` tokens, or if it has nothing to
    learn. watch: told after each chat how many there were."""
    tokens, learnt, starts, owners = array("I"), bytearray(), array("q", [0]), array("q")
    names, left_out = list[str](), list[LeftOut]()
    for number, chat in enumerate(chats, 1):
        found = [sample for sample in documents(chat, tokenizer, roles) if sample.streams["ce"].any()]
        size = max((len(sample.tokens) for sample in found), default=0)
        if 0 < size <= longest:
            for sample in found:
                tokens.frombytes(sample.tokens.astype(np.uintc).tobytes())
                learnt += sample.streams["ce"].astype(np.uint8).tobytes()
                starts.append(len(tokens))
                owners.append(len(names))
            names.append(chat.name)
        else:
            left_out.append(LeftOut(chat.name, size))
        watch(number)
    flat = (np.frombuffer(tokens, np.uintc), np.frombuffer(learnt, np.uint8), np.array(starts), np.array(owners, np.int64))
    return ChatSamples(*flat, names, left_out)
