"""Pascaline: from raw text to a language model that reasons out loud.

    model  = pascaline.load("runs/demo/model")
    engine = pascaline.Engine("runs/demo/model")
    report = pascaline.run("recipes/laptop.toml", out="runs/demo", overrides={"rl.steps": 50})

Everything is imported on first use, so `import pascaline` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pascaline.engine import Engine, Sampling
    from pascaline.model.hf import load
    from pascaline.post.chain import run

__all__ = ["Engine", "Sampling", "load", "run"]

_WHERE = {
    "Engine": "pascaline.engine",
    "Sampling": "pascaline.engine",
    "load": "pascaline.model.hf",
    "run": "pascaline.post.chain",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pascaline' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
