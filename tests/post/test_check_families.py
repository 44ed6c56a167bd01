"""Families of problems that cannot work: one sentence, before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from pascaline.errors import BadInput
from pascaline.post.check import check
from pascaline.recipe import load

TINY = Path(__file__).parent.parent.parent / "recipes" / "tiny.toml"
JUDGE = "pascaline.post.verifiers.base:answers"  # any function will do


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "rows.jsonl")


def test_a_family_from_a_file_passes(file: str) -> None:
    check(load(TINY, {"puzzles.mine": {"file": file, "verifier": JUDGE, "examples": 10}, "rl.puzzles": ["mine"]}))


@pytest.mark.parametrize(
    ("table", "more", "why"),
    [
        ({"verifier": None}, {}, "puzzles.mine.verifier is missing: who judges"),
        ({"verifier": "nobody"}, {}, "no verifier 'nobody'"),
        ({"dials": {"steps": 3}}, {}, "puzzles.mine.dials is of problems that are made up"),
        ({"quality": {"slip": 0.5}}, {}, "puzzles.mine.quality is of problems that are made up"),
        ({"file": None, "test": "b.jsonl"}, {}, "puzzles.mine.test is the held-out side of a file"),
        ({"file": "gone.jsonl"}, {}, "there is no file gone.jsonl"),
        ({}, {"eval.puzzles": ["mine"], "eval.problems": 50}, "held-out problems, 50 were asked for"),
        ({}, {"rl.rewards": {"frmat": 0.5}}, "no verifier 'frmat'"),
    ],
)
def test_what_does_not(file: str, table: dict[str, Any], more: dict[str, Any], why: str) -> None:
    whole = {"file": file, "verifier": JUDGE} | table
    with pytest.raises(BadInput, match=why):
        check(load(TINY, {"puzzles.mine": {k: v for k, v in whole.items() if v is not None}, **more}))
