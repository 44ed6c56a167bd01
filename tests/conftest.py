"""Two threads at most: the tests' shapes are tiny, and more threads only get in each other's way."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # there is no hub, and asking for it takes a minute
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _run(folder: Path, recipe: Path, *settings: str) -> Path:
    import forked

    code, out, err = forked.call(folder, "run", recipe, "--out", folder / "run", *settings)
    assert code == 0, err
    (folder / "printed").write_text(out)
    return folder / "run"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipes/tiny.toml, run to its end by the command line; what it printed is beside the folder. Not to be changed."""
    return _run(tmp_path_factory.mktemp("tiny"), HERE.parent / "recipes" / "tiny.toml", "--set", "dtype=float32")


@pytest.fixture(scope="session")
def coin_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/coin.toml, run to its end without a disturbance. Not to be changed."""
    return _run(tmp_path_factory.mktemp("coin"), HERE / "coin.toml")
