"""Pairs of answers, of which one is better: read from files, and laid side by side as samples.

A line of a .jsonl file is an object in TRL's columns: `prompt`, `chosen` and `rejected`, each a text or a list of messages; or `chosen` and
`rejected` alone as whole conversations, whose common beginning is the prompt. A text as prompt is what the user says.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pascaline.data.batch import Sample
from pascaline.data.turns import episode_ids, stops_of
from pascaline.errors import BadInput
from pascaline.tokenizer import Tokenizer

Message = dict[str, str]
COLUMNS = 'a line has "chosen" and "rejected", and "prompt" unless they are whole conversations'


@dataclass(frozen=True)
class Pair:
    """prompt: messages up to where the assistant answers; chosen, rejected: its answers; name: where the pair stands, file:line. stops: not
    None for episodes, whose answers are all their turns (turns.py)."""

    prompt: list[Message]
    chosen: Message | list[Message]
    rejected: Message | list[Message]
    name: str
    stops: list[str] | None = None

    @property
    def key(self) -> str:
        """The prompt, as a text."""
        return json.dumps(self.prompt, ensure_ascii=False)


def read(path: str | Path) -> list[Pair]:
    """The pairs of a .jsonl file; empty lines are passed over. BadInput names file and line of what is no pair."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the pairs of {path} cannot be read: {error}.") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            name = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadInput(f"{name} is not JSON: {error}.") from None
            pairs.append(_pair(row, name))
    if not pairs:
        raise BadInput(f"{path} holds no pair: {COLUMNS}.")
    return pairs


def _pair(row: Any, name: str) -> Pair:
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise BadInput(f"{name} is no pair: {COLUMNS}.")
    chosen, rejected = (_messages(row[side], "assistant", f"{name}: {side}") for side in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        prompt = _messages(row["prompt"], "user", f"{name}: prompt")
        chosen, rejected = _without(prompt, chosen), _without(prompt, rejected)  # some sets repeat it
    elif isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise BadInput(f"{name}: without a prompt, chosen and rejected must be whole conversations (lists of messages), not texts.")
    else:
        prompt = _beginning(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt or prompt[-1]["role"] == "assistant":
        raise BadInput(f"{name}: the prompt must end with what the assistant answers to, a message of another role.")
    if (stops := stops_of(row, name)) is not None:
        return Pair(prompt, chosen, rejected, name, stops)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise BadInput(f"{name}: after the prompt, {side} must have one message of the assistant, and has {_roles(answer)}.")
    return Pair(prompt, chosen[0], rejected[0], name)


def _messages(value: Any, role: str, where: str) -> list[Message]:
    """A text is one message of this role."""
    given = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(given, list) or not given:
        raise BadInput(f"{where} must be a text or a list of messages.")
    return [_message(message, f"{where}, message {i}") for i, message in enumerate(given, 1)]


def _message(message: Any, where: str) -> Message:
    """role, content, and reasoning_content where there is some."""
    if not isinstance(message, Mapping) or not all(isinstance(message.get(field), str) for field in ("role", "content")):
        raise BadInput(f'{where} must be an object with two texts, "role" and "content".')
    thought = message.get("reasoning_content") or message.get("thinking") or ""
    if not isinstance(thought, str):
        raise BadInput(f"{where}: reasoning_content must be a text.")
    return {"role": message["role"], "content": message["content"], **({"reasoning_content": thought} if thought else {})}


def _without(prompt: list[Message], answer: list[Message]) -> list[Message]:
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _beginning(one: list[Message], other: list[Message]) -> list[Message]:
    """What the conversations have in common, but never their last message."""
    most = min(len(one), len(other)) - 1
    return one[: next((i for i in range(most) if one[i] != other[i]), most)]


def _roles(answer: list[Message]) -> str:
    return ", ".join(message["role"] for message in answer) or "none"


def split(pairs: Sequence[Pair], share: float) -> list[bool]:
    """Which pairs are held out: all of a prompt or none, by its hash, so that a prompt is on the same side in any data. At least one prompt
    is on each side; BadInput if all pairs have the same one."""
    place = {key: int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) / 2**64 for key in {pair.key for pair in pairs}}
    if len(place) < 2:
        raise BadInput(f"{pairs[0].name if pairs else 'the data'}: pairs of one prompt only cannot be learnt from and judged; add others.")
    border = min(max(share, float(np.nextafter(min(place.values()), 1.0))), max(place.values()))
    return [place[pair.key] < border for pair in pairs]


def encode(tokenizer: Tokenizer, prompt: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the answer with its end of turn. Where there is no thought, a template that opens none gets none."""
    thought = answer.get("reasoning_content") or answer.get("thinking") or ""
    before = tokenizer.prompt_ids(list(prompt))
    if thought or tokenizer.tags(before)[0] == "<think>":
        return tokenizer.chat_ids(list(prompt), thought, answer["content"])
    return before, [*tokenizer.encode(answer["content"]), tokenizer.end_of_turn]


def sample(pair: Pair, tokenizer: Tokenizer, stream: Literal["sum", "mean", "last"]) -> Sample:
    """Both answers after the same prompt, as two documents side by side. What weighs, positive in the chosen answer, negative in the other:
    in the stream `pair` each token by 1 ("sum") or by one over the answer's tokens ("mean"); in `score` its last token ("last")."""
    tokens: list[int] = []
    weights: list[np.ndarray] = []
    begins = []
    for answer, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
        try:
            ids, said = _said(tokenizer, pair, answer)
        except BadInput as error:
            raise BadInput(f"{pair.name}: {error}") from None
        begins.append(len(tokens))
        tokens += ids
        own = np.zeros(len(ids), np.float32)
        own[said[-1:] if stream == "last" else said] = sign / len(said) if stream == "mean" else sign
        weights.append(own)
    return Sample(np.array(tokens), {"score" if stream == "last" else "pair": np.concatenate(weights)}, tuple(begins))


def _said(tokenizer: Tokenizer, pair: Pair, answer: Message | list[Message]) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer, and the places that the assistant says."""
    if isinstance(answer, list):
        ids, spans = episode_ids(tokenizer, pair.prompt, answer, pair.stops or ())
        return ids, [place for span in spans for place in range(span.start, span.stop)]
    before, after = encode(tokenizer, pair.prompt, answer)
    return before + after, list(range(len(before), len(before) + len(after)))


def documents(samples: Iterable[Sample]) -> list[np.ndarray]:
    """The token ids of each sample's documents, one after the other."""
    return [part for sample in samples for part in np.split(sample.tokens, sample.begins[1:])]
