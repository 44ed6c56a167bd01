"""The first weights of several ranks: the bits of one process, and no rank ever holds the whole model."""

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trainee
from test_ranks import together
from trainee import SHAPE

from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.train import parallel
from pascaline.train.initial import drawn, stored
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss

SHAPES: dict[str, dict[str, Any]] = {
    "mtp, low-rank queries": dict(q_lora_rank=6),
    "tied, uneven": dict(num_nextn_predict_layers=0, tie_word_embeddings=True, n_routed_experts=6, n_group=2),
}
QWEN = dict(model_type="qwen2", vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24)  # fmt: skip
MESHES = [(2, 1, 1), (2, 2, 1), (4, 2, 1), (4, 2, 2)]
LARGE = dict(SHAPE, vocab_size=4000, hidden_size=512, num_hidden_layers=12, intermediate_size=1536, moe_intermediate_size=256,
             num_nextn_predict_layers=0)  # fmt: skip


def begun(ranks: parallel.Ranks, config: ModelConfig, folder: Path, source: str) -> Trainer:
    cpu = torch.device("cpu")
    model, first = drawn(config, 7, cpu, ranks) if source == "drawn" else stored(folder / "start", cpu, ranks)
    return Trainer(model, trainee.stage(), Loss(), folder / "run", "toy", torch.float32, ranks, first)


def same_bits(ranks: parallel.Ranks, folder: Path, shape: dict[str, Any], source: str) -> None:
    config = ModelConfig(**shape)
    whole = dict(Model(config).init_(7).state_dict()) if source == "drawn" else dict(hf.load(folder / "start").state_dict())
    found = dict(begun(ranks, config, folder, source).tensors())
    assert whole.keys() == found.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("size, experts, replicas", MESHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_ranks_begin_with_the_bits_of_one(size: int, experts: int, replicas: int, shape: str, tmp_path: Path) -> None:
    """Drawn from a seed; and read from a folder, whose router biases are no zeros."""
    (tmp_path / "run").mkdir()
    asked = {**SHAPE, **SHAPES[shape]}
    model = Model(ModelConfig(**asked)).init_(3)
    for router in model.routers():
        router.e_score_correction_bias.copy_(torch.arange(len(router.weight)))
    model.save(tmp_path / "start")
    for source in ("drawn", "stored"):
        assert together(size, tmp_path, same_bits, experts=experts, replicas=replicas, shape=asked, source=source) == [""] * size


def test_a_dense_model_with_biases_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    model = Model(ModelConfig(**QWEN)).init_(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save(tmp_path / "start")
    for source in ("drawn", "stored"):
        assert together(2, tmp_path, same_bits, shape=QWEN, source=source) == ["", ""]


def test_any_rows_of_any_tensor(tmp_path: Path) -> None:
    model = Model(ModelConfig(**{**SHAPE, "q_lora_rank": 6})).init_(3)
    model.save(tmp_path)
    config, weights = hf.opened(tmp_path)
    for name, tensor in model.state_dict().items():
        for first in range(len(tensor)):
            for stop in {first, first + 1, (first + len(tensor)) // 2, len(tensor)}:
                assert torch.equal(hf.read_rows(weights, config, name, tensor.shape, slice(first, stop)), tensor[first:stop]), name


def test_a_folder_that_does_not_fit_is_refused_before_a_row_is_read(tmp_path: Path) -> None:
    Model(ModelConfig(**SHAPE)).init_(3).save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for depth, told in ((4, "lacks the tensor model.layers.3"), (1, "holds model.layers.1")):
        changed = raw | {"num_hidden_layers": depth, "num_nextn_predict_layers": 0}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(BadInput, match=told):
            stored(tmp_path, torch.device("cpu"), parallel.Ranks(0, 2))


def peak(folder: Path) -> int:
    """The most bytes that this process had in memory since `forget`."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def forget() -> int:
    """Bytes in memory now, from which a peak is counted on; what is freed from now on goes back to the system at once."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def in_memory(ranks: parallel.Ranks, folder: Path, source: str) -> None:
    """What a rank's start and its part in writing the finished model add to its memory."""
    config = ModelConfig(**LARGE)
    begun(ranks, ModelConfig(**SHAPE), folder, "drawn")  # what is needed once
    tensors = Model(config).state_dict()
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    del tensors
    before = forget()
    begun(ranks, config, folder, source).run(trainee.loader(ranks), 0, quiet=True)
    added = peak(folder) - before
    (folder / f"added-{ranks.rank}").write_text(json.dumps([added, total, largest]))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("source", ["drawn", "stored"])
@pytest.mark.parametrize("experts", [1, 2])
def test_no_rank_holds_the_whole_model(source: str, experts: int, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    if source == "stored":
        Model(ModelConfig(**LARGE)).init_(3).save(tmp_path / "start")
    assert together(2, tmp_path, in_memory, experts=experts, source=source) == ["", ""]
    for rank in range(2):
        added, total, largest = json.loads((tmp_path / f"added-{rank}").read_text())
        most = total / 2 + 4 * largest  # its share, and a tensor with the messages in which it comes
        assert added < most < 0.8 * total
