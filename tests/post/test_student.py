"""A student of its own shape beside the chain's model: drawn anew, with the chain's tokenizer, dense if it likes."""

import json
from pathlib import Path

import foreign
import pytest
import torch
import transformers

import pascaline
from pascaline.errors import BadInput
from pascaline.model.presets import PRESETS, from_recipe
from pascaline.model.transformer import Model
from pascaline.post.check import check
from pascaline.recipe import load
from pascaline.runs import Metrics
from pascaline.tokenizer import Tokenizer
from pascaline.train.loop import active_parameters

COIN = Path(__file__).parent.parent / "coin.toml"
FEW = {"pretrain.tokens": 2048, "sft.epochs": 1.0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 256}
DENSE = {
    "nano-dense": {"preset": "nano-dense", **SMALL},
    "llama": {"model_type": "llama", "num_attention_heads": 2, **SMALL},
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, **SMALL},
}


def recipe(folder: Path, chain: str, *tables: str, without: tuple[str, ...] = ()) -> Path:
    """coin.toml with another chain and more tables."""
    parts = [part for part in COIN.read_text().split("\n[") if part.split("]")[0] not in without]
    path = folder / "recipe.toml"
    path.write_text(f"chain = {chain}\n" + "\n[".join(parts) + "\n" + "\n".join(tables))
    return path


STUDENT = "[pretrain-student]\ntokens = 16_000\ntokens_per_step = 1024\nlr = 5e-3\nwarmup = 2"


def test_the_dense_preset_costs_what_the_sparse_one_does() -> None:
    sparse, dense = (active_parameters(Model(from_recipe({"preset": name}))) for name in ("nano", "nano-dense"))
    assert abs(dense / sparse - 1) < 0.05 and PRESETS["nano-dense"]["model_type"] == "qwen3"


@pytest.mark.parametrize("shape", DENSE)
def test_a_dense_student_learns_and_its_folder_loads_in_transformers(shape: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, '["pretrain-student", "sft"]', STUDENT)
    settings = {**FEW, "pretrain-student.model": DENSE[shape]}
    pascaline.run(path, tmp_path / "out", settings, stage="sft", quiet=True)
    losses = [row["ce"] for row in Metrics.read(tmp_path / "out" / "04-pretrain-student" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 1
    folder = tmp_path / "out" / "05-sft" / "model"  # which starts from the student
    theirs, own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), pascaline.load(folder)
    assert theirs.config.model_type == own.config.model_type == ("llama" if shape == "llama" else "qwen3")
    ids = torch.tensor([Tokenizer.load(folder).prompt_ids("Coin 3?")])
    with torch.no_grad():
        torch.testing.assert_close(own(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert own.config.vocab_size == Tokenizer.load(tmp_path / "out" / "02-tokenizer").vocab_size


def test_a_student_beside_a_folder_has_that_folders_special_tokens(tmp_path: Path) -> None:
    """With ours it would never end its turn, and answer with another word's id."""
    start = tmp_path / "start"
    foreign.write(start, "qwen3")
    own = Tokenizer.load(start)
    Model(from_recipe({**DENSE["qwen3"], "vocab_size": own.vocab_size + 5})).init_(1).save(start)
    table = f"{STUDENT}\nmodel = {{ preset = 'nano-dense', hidden_size = 32 }}"
    path = recipe(tmp_path, '["pretrain-student", "sft"]', f"[model]\nfolder = {json.dumps(str(start))}", table,
                  without=("model", "tokenizer", "pretrain"))  # fmt: skip
    pascaline.run(path, tmp_path / "out", {"pretrain-student.tokens": 1024}, stage="pretrain-student", quiet=True)
    config = pascaline.load(tmp_path / "out" / "03-pretrain-student" / "model").config
    assert (config.eos_token_id, config.pad_token_id, config.vocab_size) == (own.end_of_turn, own.pad, own.vocab_size)
    assert config.eos_token_id != 1 and config.bos_token_id is None


@pytest.mark.parametrize(
    "model, told",
    [
        ({"preset": "nano-dens"}, r"pretrain-student\.model\.preset 'nano-dens' is unknown; did you mean 'nano-dense'"),
        ({"model_type": "llama", "n_routed_experts": 4}, r"pretrain-student\.model.*n_routed_experts is no field of llama"),
        ({"preset": "nano", "vocab_size": 7}, r"pretrain-student\.model\.vocab_size follows from the tokenizer"),
        ({"preset": "nano-dense", "max_position_embeddings": 64}, r"pretrain-student\.sequence_length = 256 is more than.*64"),
    ],
)
def test_an_impossible_student_is_refused_by_its_name_before_anything_starts(model: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=told):
        check(load(recipe(tmp_path, '["pretrain-student", "sft"]', STUDENT), {"pretrain-student.model": model}))
