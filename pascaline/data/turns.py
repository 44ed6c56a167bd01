"""Episodes as text: a conversation with an environment, encoded as the very tokens that playing it gives.

The chat template would write the whole conversation anew for each turn, and leave out the thoughts of earlier ones. An episode is never
written anew: each turn stands behind the one before it as it was said (post/environments/episode.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pascaline.errors import BadInput
from pascaline.tokenizer import MARK, Tokenizer

OTHER_MARK = chr(ord(MARK) + 1)
Messages = Sequence[Mapping[str, Any]]


def episode_ids(tokenizer: Tokenizer, prompt: Messages, turns: Messages, stops: Sequence[str]) -> tuple[list[int], list[slice]]:
    """Ids of prompt and turns, and the spans that the model says. turns: the assistant's and the environment's (of role user) in
    alternation, the assistant's first and last. A turn in whose answer one of `stops` occurs was over with it, and its end of turn is the
    environment's to say."""
    if len(turns) % 2 == 0 or any(turn["role"] != ("user" if i % 2 else "assistant") for i, turn in enumerate(turns)):
        raise BadInput(
            "behind an episode's prompt stand the assistant's turns and the user's in alternation, the assistant's first and last."
        )
    ids, spans = tokenizer.prompt_ids(list(prompt)), list[slice]()
    for turn in turns:
        if turn["role"] == "user":
            ids += reply_ids(tokenizer, turn["content"], ids[-1])
            continue
        thought, answer = turn.get("reasoning_content"), turn["content"]
        if thought is None:
            said = [*tokenizer.encode(answer), tokenizer.end_of_turn]
        else:  # behind any prompt, for all end alike
            said = tokenizer.chat_ids("?", thought, answer)[1]
        if any(stop in turn["content"] for stop in stops):
            said.pop()
        spans.append(slice(len(ids), len(ids) + len(said)))
        ids = ids + said
    return ids, spans


def reply_ids(tokenizer: Tokenizer, text: str, last: int) -> list[int]:
    """Ids of what stands between two turns of the assistant's, by the chat template: the end of the first (unless `last`, the token said
    last, is that), `text` as a user's message, and the beginning of the second. Special tokens written in the text stay text."""
    text = readable(text)
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}, {"role": "user", "content": OTHER_MARK}]
    before, _, after = tokenizer.render(said, add_generation_prompt=True).rpartition(MARK)[2].partition(OTHER_MARK)
    if tokenizer.encode(text) == tokenizer.encode(text, special=True):  # as the template's text is encoded: in one piece
        ids = tokenizer.encode(before + text + after, special=True)
    else:
        ids = [*tokenizer.encode(before, special=True), *tokenizer.encode(text), *tokenizer.encode(after, special=True)]
    return ids[1:] if ids[:1] == [last] else ids


def stops_of(row: Mapping[str, Any], name: str) -> list[str] | None:
    """A row's column `stops`, which makes it an episode; None if it has none. BadInput if it is no list of texts."""
    stops = row.get("stops")
    if stops is not None and not (isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)):
        raise BadInput(f"{name}: stops, which makes an episode of a chat, must be a list of texts.")
    return stops


def readable(text: str) -> str:
    """The text with a ? for each lone surrogate, which is no character."""
    return text.encode(errors="replace").decode()
