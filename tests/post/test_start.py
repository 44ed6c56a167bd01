"""A chain that starts from a folder of another family: every stage takes it, and it stays what it is."""

import json
from pathlib import Path

import foreign
import pytest
import torch
import transformers
from test_chain import COIN

import pascaline
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.recipe import load
from pascaline.runs import read_json
from pascaline.tokenizer import Tokenizer

SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=256
)
FEW = {"eval.problems": 16, "eval.votes": 2, "rl.steps": 3, "sft.epochs": 1.0}


def folder(path: Path, family: str, kind: str) -> Path:
    """A model that knows nothing, with a vocabulary padded as theirs are."""
    foreign.write(path, kind)
    size = Tokenizer.load(path).vocab_size + 5
    Model(ModelConfig(model_type=family, vocab_size=size, tie_word_embeddings=True, **SHAPE)).init_(3).save(path)
    return path


def recipe(tmp_path: Path, start: Path, *tables: str) -> Path:
    """coin.toml with model.folder in place of its model; of its other tables only `tables`."""
    text = COIN.read_text()
    parts = [part for part in text.split("\n[") if part.split("]")[0] in ('puzzles."coin:puzzle"', "sft", "rl", "eval", *tables)]
    path = tmp_path / "recipe.toml"
    path.write_text('seed = 1\ndtype = "float32"\n\n' + f"[model]\nfolder = {json.dumps(str(start))}\n\n[" + "\n[".join(parts))
    return path


@pytest.mark.parametrize("family, kind", [("qwen3", "qwen3"), ("qwen2", "qwen2"), ("llama", "opened")])
def test_a_chain_from_a_folder_tunes_it_and_leaves_a_folder_of_its_family(tmp_path, family, kind):
    start = folder(tmp_path / "start", family, kind)
    path = recipe(tmp_path, start)
    assert load(path).stages == ("tokenizer", "sft", "rl", "eval")
    told = pascaline.run(path, tmp_path / "out", FEW, quiet=True)
    assert [row["name"] for row in told["stages"]] == ["start", "tokenizer", "sft", "rl", "eval"]
    assert told["stages"][0]["n"] == 16
    model = tmp_path / "out" / "model"
    found = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert found.config.model_type == family
    ids = torch.tensor([Tokenizer.load(model).prompt_ids("coin?")])
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, pascaline.load(model)(ids), atol=1e-4)
        assert not torch.allclose(pascaline.load(start)(ids), pascaline.load(model)(ids), atol=1e-2)
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    chat = [{"role": "user", "content": "coin?"}]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ids[0].tolist()
    assert str(start) in read_json(tmp_path / "out" / "02-sft" / "lineage.json")["parents"]
    assert pascaline.run(path, tmp_path / "out", FEW, quiet=True)["stages"] == told["stages"]
    assert load(tmp_path / "out" / "recipe.toml") == load(path, {**FEW, "device": "auto"})


def test_sft_teaches_a_foreign_model_to_close_its_thoughts(tmp_path):
    start = folder(tmp_path / "start", "qwen3", "qwen3")
    pascaline.run(recipe(tmp_path, start), tmp_path / "out", {**FEW, "sft.epochs": 5.0}, stage="sft", quiet=True)
    engine = pascaline.Engine(tmp_path / "out" / "02-sft" / "model")
    outputs = [o for group in engine.generate([f"Coin {n}?" for n in range(40, 60)], pascaline.Sampling(max_tokens=30)) for o in group]
    assert sum(o.finish_reason == "stop" and o.reasoning == "toss" and o.text in set("0123456789") for o in outputs) > 15


def test_pre_training_goes_on_from_a_folder_and_reads_the_corpus_with_its_tokenizer(tmp_path):
    start = folder(tmp_path / "start", "llama", "llama3")
    path = recipe(tmp_path, start, "corpus", "pretrain")
    assert load(path).stages == ("corpus", "tokenizer", "pretrain", "sft", "rl", "eval")
    pascaline.run(path, tmp_path / "out", FEW, stage="pretrain", quiet=True)
    first = json.loads((tmp_path / "out" / "03-pretrain" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and "max_violation" not in first  # no experts to balance
    before, after = hf.load(start), hf.load(tmp_path / "out" / "03-pretrain" / "model")
    assert before.config == after.config and not torch.equal(before.head_weight, after.head_weight)
    assert str(start) in read_json(tmp_path / "out" / "03-pretrain" / "lineage.json")["parents"]


def test_a_folder_that_cannot_be_started_from_is_refused_before_anything_begins(tmp_path):
    start = folder(tmp_path / "start", "qwen2", "qwen2")
    path = recipe(tmp_path, start)
    for override, words in [
        ({"model.folder": str(tmp_path / "nowhere")}, "tokenizer.json is missing"),
        ({"model.folder": 3}, "model.folder"),
        ({"model.hidden_size": 64}, "leave out model.hidden_size"),
        ({"tokenizer.vocab_size": 512}, "brings its own tokenizer"),
        ({"sft.sequence_length": 512}, "256 positions"),
    ]:
        with pytest.raises(BadInput, match=words):
            pascaline.run(path, tmp_path / "out", override, quiet=True)
        assert not (tmp_path / "out").exists()
    settings = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**settings, "model_type": "gemma"}))
    with pytest.raises(BadInput, match="gemma"):
        pascaline.run(path, tmp_path / "out", quiet=True)
    with pytest.raises(BadInput, match="starts with"):
        pascaline.run(COIN, tmp_path / "out", {"pretrain": None}, quiet=True)
