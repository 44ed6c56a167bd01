"""A model's first weights, drawn or read from a folder. Of several ranks each fills its own share only, and none ever holds the whole."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pascaline.model import hf
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model, begin_
from pascaline.train.parallel import Ranks, Rows


def drawn(config: ModelConfig, seed: int, device: torch.device, ranks: Ranks) -> tuple[Model, Rows | None]:
    """A model with the bits of `Model.init_(seed)`; on several ranks one without memory, and what to fill the shares with."""
    if ranks.size == 1:
        return Model(config).init_(seed).to(device), None
    generator = torch.Generator().manual_seed(seed)

    def rows(name: str, shape: torch.Size, own: slice) -> Tensor:  # all ranks draw all of it, one tensor at a time
        return begin_(name, torch.empty(shape), config.initializer_range, generator)[own]

    return _empty(config), rows


def stored(folder: str | Path, device: torch.device, ranks: Ranks) -> tuple[Model, Rows | None]:
    """The model of a folder, as `hf.load` gives it; on several ranks one without memory, and what to fill the shares with."""
    if ranks.size == 1:
        return hf.load(folder, device=device), None
    config, weights = hf.opened(folder)
    return _empty(config), partial(hf.read_rows, weights, config)


def _empty(config: ModelConfig) -> Model:
    with torch.device("meta"):
        return Model(config)
