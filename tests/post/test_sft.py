"""The cold start: the loss lies on the assistant's tokens, all of them and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from pascaline.data import puzzles
from pascaline.data.batch import Sample, batches
from pascaline.data.chats import documents
from pascaline.data.loader import ListSamples, Loader
from pascaline.errors import BadInput
from pascaline.post.sft import puzzle_chats
from pascaline.tables import Puzzle, Sft
from pascaline.tokenizer import SPECIALS, Tokenizer, train
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss, totals


def chat_sample(prompt: list[int], completion: list[int]) -> Sample:
    return Sample(np.array(prompt + completion), {"ce": np.array([0.0] * len(prompt) + [1.0] * len(completion), np.float32)})


def puzzle_samples(tables: dict[str, Puzzle], tokenizer: Tokenizer, seed: int) -> list[Sample]:
    return [sample for chat in puzzle_chats(tables, seed) for sample in documents(chat, tokenizer, ["assistant"])]


TABLES = {"countdown": Puzzle(examples=20, quality={"attempts": 3}), "chain": Puzzle(examples=10)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [p.prompt for name in TABLES for p in puzzles.problems(name, 200, 0, held_out=False)]
    return train(texts, 300)


def test_weights_lie_on_the_completion(tokenizer: Tokenizer) -> None:
    samples = puzzle_samples(TABLES, tokenizer, seed=3)
    assert len(samples) == 30
    for sample in samples:
        assert set(sample.streams) == {"ce"} and len(sample.tokens) == len(sample.streams["ce"])
        ids, weights = sample.tokens.tolist(), sample.streams["ce"]
        border = ids.index(tokenizer.think) + 1
        assert not weights[:border].any() and (weights[border:] == 1).all()
        prompt, completion = ids[:border], ids[border:]
        assert prompt[0] == tokenizer.begin and prompt[-2:] == [tokenizer.assistant, tokenizer.think]
        assert completion[-1] == tokenizer.end and completion.count(tokenizer.unthink) == 1
        assert not set(completion) & {tokenizer.begin, tokenizer.user, tokenizer.assistant, tokenizer.pad}


def test_a_chat_is_the_rendered_conversation_and_its_answer_is_the_traces(tokenizer: Tokenizer) -> None:
    for sample in puzzle_samples(TABLES, tokenizer, seed=3):
        text = tokenizer.decode(sample.tokens.tolist(), special=True)
        head, _, rest = text.partition("<|assistant|><think>")
        thought, _, answer = rest.removesuffix("<|end|>").partition("</think>")
        prompt = head.removeprefix("<|begin|><|user|>")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "reasoning_content": thought, "content": answer}]
        assert tokenizer.render(messages) == text
        assert prompt.startswith(("Make ", "Start with ")) and answer and not any(s in prompt + thought + answer for s in SPECIALS)


def test_mtp_modules_learn_the_chats_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """And only the completions: a draft of the prompt is worth nothing."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1, max_position_embeddings=512)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loader = Loader(ListSamples(puzzle_samples(TABLES, tokenizer, 1)), 256, 4, 4, tokenizer.pad, 1)
    stage = Sft(lr=5e-3, warmup=2, mtp=0.3)
    Trainer(model, stage, Loss(mtp=stage.mtp), tmp_path, "sft", torch.float32).run(loader, 25, quiet=True)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found[-1]["mtp"] < 0.7 * found[0]["mtp"]
    own = [name for name, _ in model.named_parameters() if name.startswith("model.layers.2.")]
    assert own and all(not torch.equal(dict(model.named_parameters())[name], before[name]) for name in own if ".experts." not in name)


def test_the_same_seed_gives_the_same_chats(tokenizer: Tokenizer) -> None:
    def ids(seed: int) -> list[list[int]]:
        return [s.tokens.tolist() for s in puzzle_samples(TABLES, tokenizer, seed)]

    assert ids(1) == ids(1) != ids(2)


def test_weights_survive_packing(tokenizer: Tokenizer) -> None:
    samples = puzzle_samples(TABLES, tokenizer, seed=3)
    packed = batches(samples, 256, 2, tokenizer.pad)
    expected = sum(float(s.streams["ce"].sum()) for s in samples)
    assert totals(packed)["ce"] == expected
    for batch in packed:
        learnt = batch.streams["ce"] > 0
        assert not learnt[batch.document_ids < 0].any() and not (batch.tokens[learnt] == tokenizer.user).any()
        assert (batch.tokens == tokenizer.end).sum() == (learnt & (batch.tokens == tokenizer.end)).sum()


def test_a_batch_without_any_weight_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    sample = chat_sample([1, 2, 3, 4], [])
    assert not sample.streams["ce"].any()
    loader = Loader(ListSamples([sample] * 4), 8, 2, 2, 2, seed=0)
    trainer = Trainer(model, Sft(sequence_length=8, tokens_per_step=16), Loss(), tmp_path, "sft", torch.float32)
    with pytest.raises(BadInput, match="sft step 0: no token carries any weight"):
        trainer.run(loader, 2, quiet=True)
    assert not (tmp_path / "model").exists() and not (tmp_path / "state").exists()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_prompt_only_learns_its_completion(tmp_path: Path) -> None:
    """Two chats with the same completion and unlike prompts: what is learnt is the completion."""
    model = tiny_model(tie_word_embeddings=True)
    samples = [chat_sample([5, 6, 7, 8], [9, 10, 1]), chat_sample([8, 7, 6, 5], [9, 10, 1])]
    tokens = torch.from_numpy(np.stack([s.tokens for s in samples]))

    def surprise() -> torch.Tensor:
        with torch.no_grad():
            return -model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].mean(0)

    before = surprise()
    stage = Sft(sequence_length=8, tokens_per_step=16, lr=1e-2, warmup=0, schedule="constant", weight_decay=0.0)
    trainer = Trainer(model, stage, Loss(), tmp_path, "sft", torch.float32)
    trainer.run(Loader(ListSamples(samples), 8, 2, 2, 2, seed=0), 30, quiet=True)
    after = surprise()
    assert (after[3:] < 0.1).all() and (after[:3] > before[:3] - 1).all()
