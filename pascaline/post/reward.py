"""A Bradley-Terry reward model: the trunk of a language model with one score for an answer, read at the answer's last token.

In the folder of its stage: `model/`, a Hugging Face folder like any other; `reward_head.safetensors`, the weights [D] whose product with
the normed last hidden state is the score; `reward.json`, what the two are.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pascaline.data.batch import Sample, collate, pack
from pascaline.data.pairs import encode
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.transformer import Model, RewardHead
from pascaline.runs import atomic_path, read_json, write_json
from pascaline.tokenizer import Tokenizer

HEAD, CARD = "reward_head.safetensors", "reward.json"
TOKENS = 8192  # in one forward

Answered = Sequence[Any]  # token ids of a chat, or its messages, the assistant's last


class RewardModel:
    """Scores of answers; only differences between answers to the same prompt mean anything."""

    def __init__(self, model: Model, tokenizer: Tokenizer):
        """model: with its reward_head."""
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Self:
        """From the folder of a stage that trained one. BadInput if it holds none, or one that does not fit together."""
        folder = Path(folder)
        if read_json(folder / CARD) is None:
            raise BadInput(f"{folder} holds no reward model: {CARD} is missing; name the folder of a prefer stage with method 'reward'.")
        model = hf.load(folder / "model", dtype, device)
        try:
            weight = load_file(folder / HEAD)["weight"]
        except (OSError, SafetensorError, KeyError) as error:
            raise BadInput(f"{folder / HEAD} cannot be read: {error}.") from None
        if weight.shape != (model.config.hidden_size,) or not weight.isfinite().all():
            raise BadInput(f"{folder / HEAD} does not fit the model: it must be {model.config.hidden_size} finite numbers.")
        model.reward_head = RewardHead(model.config.hidden_size).to(device)
        model.reward_head.weight.data.copy_(weight)
        return cls(model.eval(), Tokenizer.load(folder / "model"))

    def save_head(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write what lies beside model/."""
        assert self.model.reward_head is not None
        with atomic_path(folder / HEAD) as temporary:
            save_file({"weight": self.model.reward_head.weight.detach().float().cpu().contiguous()}, temporary)
        about = "score = weight . hidden, hidden the normed last hidden state of the answer's last token"
        write_json(folder / CARD, {"hidden_size": self.model.config.hidden_size, "reads": about, **facts})

    def ids(self, chat: Answered) -> list[int]:
        """Token ids of a chat whose last message is the assistant's, as it was trained on them; ids stay as they are."""
        if chat and isinstance(chat[0], Mapping):
            messages = [dict(message) for message in chat]
            if len(messages) < 2 or messages[-1].get("role") != "assistant":
                raise BadInput("a chat to score must end with the assistant's answer to something.")
            before, after = encode(self.tokenizer, messages[:-1], messages[-1])
            return before + after
        return [int(i) for i in chat]

    @torch.no_grad()
    def scores(self, chats: Sequence[Answered], watch: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """The score of each chat, float32 [n]. They are packed, and none sees another. watch is told how many are done. BadInput for an
        empty one or one longer than the model's positions."""
        found = np.zeros(len(chats), np.float32)
        samples = [Sample(np.array(self.ids(chat), np.int64), {}) for chat in chats]
        lengths, room = [len(s.tokens) for s in samples], self.model.config.max_position_embeddings
        for i, length in enumerate(lengths):
            if not 0 < length <= room:
                raise BadInput(f"chat {i} has {length} tokens; the reward model reads 1 to {room}.")
        row, done = max(lengths, default=1), 0
        rows = pack(lengths, row)
        assert self.model.reward_head is not None
        for at in range(0, len(rows), some := max(TOKENS // row, 1)):
            own = rows[at : at + some]
            batch = collate([[samples[i] for i in r] for r in own], row, self.tokenizer.pad).to(self.model.device)
            hidden, _ = self.model.hidden(batch.tokens, batch.positions, batch.document_ids)
            score = self.model.reward_head(hidden).float().cpu().numpy()
            for b, r in enumerate(own):
                found[r] = score[b, np.cumsum([lengths[i] for i in r]) - 1]
                done += len(r)
            watch(done)
        return found
