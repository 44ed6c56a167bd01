"""reasoning-gym's families as puzzles. Where a defect of the library is fenced, a test shows the defect in it as well: if it goes, so may
the fence."""

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reasoning_gym import create_dataset
from reasoning_gym.dataset import ReseedingDataset
from reasoning_gym.factory import DATASETS

from pascaline.data import puzzles
from pascaline.data.puzzles import Verdict, gym
from pascaline.errors import BadInput

EVALS = ["binary_matrix", "countdown", "n_queens", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
         "string_insertion"]  # fmt: skip
SAMPLE = ["acre", "advanced_geometry", "chain_sum", "group_anagrams", "rearc", "time_intervals", "tower_of_hanoi"]


def raw(family: str, answer: str | None, items: int = 20) -> list[float]:
    """What the library's own scorer pays for one answer."""
    dataset = create_dataset(family, seed=1, size=items)
    return [dataset.score_answer(answer, dataset[i]) for i in range(items)]


def test_data_sets_of_near_seeds_share_their_items_and_problems_of_near_seeds_do_not() -> None:
    mine, next_one = ([item["question"] for item in create_dataset("chain_sum", seed=seed, size=1000)] for seed in (42, 43))
    assert mine[1:] == next_one[:-1]  # the defect
    first, second = (puzzles.problems("gym:chain_sum", 1000, seed, held_out=False) for seed in (42, 43))
    assert len({p.key for p in first} & {p.key for p in second}) < 20
    seeds = sorted({p.data["seed"] for p in first + second})
    assert min(b - a for a, b in pairwise(seeds)) >= 10**7


def test_its_endless_data_set_repeats_itself_and_a_stream_of_problems_does_not() -> None:
    endless = iter(ReseedingDataset(create_dataset("chain_sum", seed=42, size=100), chunk_size=100))
    assert len({next(endless)["question"] for _ in range(1000)}) < 150  # the defect
    assert len({p.key for p in puzzles.problems("gym:chain_sum", 1000, 42, held_out=False)}) > 950


@pytest.mark.parametrize("family", ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"])
def test_families_without_an_answer_of_their_own_are_refused(family: str) -> None:
    entry = create_dataset(family, seed=1, size=1)[0]
    assert entry["answer"] is None  # the defect
    with pytest.raises(BadInput, match=f"gym:{family}' is refused: it gives no answer"):
        puzzles.get(f"gym:{family}")


@pytest.mark.parametrize(
    ("family", "answer", "least"),
    [("puzzle24", "1*2*3*4", 1.0), ("coin_flip", "0", 0.9), ("complex_arithmetic", "nan", 1.0), ("game_of_life_halting", "well", 1.0)],
)
def test_families_that_pay_for_a_constant_are_refused(family: str, answer: str, least: float) -> None:
    paid = raw(family, answer)
    assert sum(score == 1 for score in paid) / len(paid) >= least  # the defect
    with pytest.raises(BadInput, match="pays in full for"):
        puzzles.get(f"gym:{family}")


@pytest.mark.parametrize(
    ("family", "slip"),
    [
        ("number_sorting", lambda answer: json.dumps([float("nan")] * len(json.loads(answer.replace("'", '"'))))),
        ("decimal_arithmetic", lambda answer: answer[:-1] + str((int(answer[-1]) + 1) % 10)),
        ("gsm_symbolic", lambda answer: f"-{answer}"),
    ],
)
def test_families_that_pay_in_full_for_what_is_wrong_are_refused(family: str, slip: Any) -> None:
    dataset = create_dataset(family, seed=1, size=20)
    paid = [dataset.score_answer(slip(dataset[i]["answer"]), dataset[i]) for i in range(20)]
    assert sum(score == 1 for score in paid) > 15  # the defect
    assert family in gym.REFUSED


@pytest.mark.parametrize("family", EVALS)
def test_no_answer_is_run_as_code(family: str, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    entry = create_dataset(family, seed=1, size=1)[0]
    create_dataset(family, seed=1, size=1).score_answer(code, entry)
    assert trap.exists()  # the defect
    trap.unlink()
    with pytest.raises(BadInput, match=r"is refused: .* eval"):  # data of another run may name it
        gym.score(family, 0, {}, "", "", given=code)
    assert not trap.exists()


def test_no_family_that_is_admitted_runs_what_it_is_given(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    for family in gym.families():
        problem = gym.get(f"gym:{family}").generate(random.Random(1))
        assert gym.score(**problem.data, given=code) == gym.score(**problem.data, given=f"[{code}]") == 0.0
        assert not trap.exists(), family


def test_every_family_is_admitted_or_refused() -> None:
    assert not set(gym.ADMITTED) & set(gym.REFUSED)
    assert set(gym.ADMITTED) | set(gym.REFUSED) == set(DATASETS)  # those of a new release are to be measured: bench/gym.py
    assert gym.families() == sorted(gym.ADMITTED)


def test_the_answer_of_every_admitted_family_is_right_and_another_is_wrong() -> None:
    for family in gym.families():
        problem = puzzles.problems(f"gym:{family}", 1, 5, held_out=False)[0]
        puzzle, answer = puzzles.get(problem.puzzle), problem.data["answer"]
        assert puzzle.solve(problem) == puzzle.trace(problem, random.Random(0)).answer == answer
        assert puzzle.verify(problem, answer) == puzzle.verify(problem, f"\n{answer} ") == Verdict.RIGHT, family
        assert [puzzle.verify(problem, wrong) for wrong in ("", "there", problem.prompt)] == [Verdict.WRONG] * 3, family


def off(answer: str) -> str:
    """A time a minute later, of the form "5 days, 12:30"."""
    return answer[:-1] + str((int(answer[-1]) + 1) % 10)


@pytest.mark.parametrize(
    ("family", "slip", "least"),
    [
        ("lcm", lambda answer: f"{answer} or {answer}1", 0.2),  # text that holds the answer
        ("spell_backward", lambda answer: answer + "x", 0.99),
        ("game_of_life", lambda answer: answer.replace("0", "2", 1), 0.99),  # a cell in a hundred
        ("time_intervals", off, 0.99),
    ],
)
def test_partial_credit_is_not_right(family: str, slip: Any, least: float) -> None:
    most = 0.0
    for problem in puzzles.problems(f"gym:{family}", 10, 5, held_out=False):
        wrong, seed = slip(problem.data["answer"]), problem.data["seed"]
        dataset = create_dataset(family, seed=seed, size=5)
        most = max(most, dataset.score_answer(wrong, dataset[0]))
        assert puzzles.get(problem.puzzle).verify(problem, wrong) == Verdict.WRONG
    assert most >= least  # the defect


def test_what_a_scorer_stumbles_over_is_wrong() -> None:
    with pytest.raises(ValueError):
        raw("prime_factorization", "seven")  # the defect
    problem = puzzles.problems("gym:prime_factorization", 1, 0, held_out=False)[0]
    assert puzzles.get(problem.puzzle).verify(problem, "seven") == Verdict.WRONG


def test_a_seed_without_an_item_is_passed_over() -> None:
    class Fixed(random.Random):
        draws = iter((2266126735, 1))  # of SEEDS

        def random(self) -> float:
            return (next(self.draws) + 0.5) / gym.SEEDS

    with pytest.raises(RuntimeError, match="Could not find"):
        gym._item("maze", 2266126735 * gym.SEEDS_APART, "{}")  # the defect: 8 of 36,768 seeds
    assert gym.get("gym:maze").generate(Fixed()).data["seed"] == gym.SEEDS_APART


def test_no_problem_has_the_empty_answer() -> None:
    """Which a model that thinks cannot give, and which string_manipulation's own scorer does not pay for."""
    rng = random.Random("ab 0")
    assert not all(gym._item("ab", gym.SEEDS_APART * int(rng.random() * gym.SEEDS), "{}")[1]["answer"] for _ in range(2000))  # the defect
    assert all(problem.data["answer"] for problem in puzzles.problems("gym:ab", 2000, 0, held_out=False))


def test_training_and_held_out_problems_are_disjoint() -> None:
    train, test = (puzzles.problems("gym:gcd", 200, 1, held_out=side, max_value=99) for side in (False, True))
    assert not {p.key for p in train} & {p.key for p in test}
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert len({p.key for p in test}) == 200


def drawn() -> list[dict[str, Any]]:
    return [problem.data for family in SAMPLE for problem in puzzles.problems(f"gym:{family}", 3, 9, held_out=True)]


def test_another_process_draws_the_same_problems() -> None:
    program = "import json, test_gym; print(json.dumps(test_gym.drawn()))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == drawn()


def test_items_that_cannot_be_drawn_again_are_refused() -> None:
    program = "import reasoning_gym as g; print([[g.create_dataset(f, seed=s, size=1)[0] for s in range(8)] for f in {!r}])"
    families = ["isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder"]
    said = [
        subprocess.run([sys.executable, "-c", program.format(families)], env={**os.environ, "PYTHONHASHSEED": hashes},
                       capture_output=True, text=True, check=True).stdout
        for hashes in ("1", "2")
    ]  # fmt: skip
    assert said[0] != said[1]  # the defect
    assert not set(families) & set(gym.ADMITTED)


@pytest.mark.parametrize(
    ("name", "dials", "said"),
    [
        ("gym:chainsum", {}, "no puzzle 'gym:chainsum'; did you mean 'chain_sum'"),
        ("gym:chain_sum", {"max_term": 3}, "has no dial 'max_term'; did you mean 'max_terms'.*it has min_terms, max_terms"),
        ("gym:chain_sum", {"size": 3}, "has no dial 'size'"),
        ("gym:chain_sum", {"max_terms": 0}, "does not take .*max_terms must be >= min_terms"),
        ("gym:chain_sum", {"max_terms": "x"}, "does not take"),
        ("gym:chain_sum", {"max_terms": {1}}, "a dial is a number"),
        ("gym:arc_agi", {"board_format_opts": {}}, "has no dial 'board_format_opts'"),
    ],
)
def test_a_name_or_dial_that_is_wrong_is_told(name: str, dials: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        puzzles.problems(name, 1, 0, held_out=False, **dials)


def test_dials_turn_the_family() -> None:
    short = puzzles.problems("gym:chain_sum", 20, 0, held_out=False, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert all(len([word for word in p.prompt.split() if word.isdigit()]) == 2 for p in short)
    operators = puzzles.problems("gym:polynomial_equations", 3, 0, held_out=False, operators=["+"], max_degree=1)
    assert all(puzzles.get(p.puzzle).verify(p, p.data["answer"]) == Verdict.RIGHT for p in operators)


def test_dials_that_leave_no_item_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise RuntimeError("no way")

    monkeypatch.setattr(gym, "_item", none)
    with pytest.raises(BadInput, match="makes no item: RuntimeError: no way"):
        gym.get("gym:maze").generate(random.Random(0))


def test_an_item_that_is_not_the_one_that_was_asked_is_not_judged() -> None:
    problem = puzzles.problems("gym:chain_sum", 1, 0, held_out=False)[0]
    with pytest.raises(BadInput, match="another item"):
        gym.score(**{**problem.data, "question": "1 + 1 ="}, given="2")


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(BadInput, match=r"pip install 'pascaline\[gym\]'"):
        gym.get("gym:chain_sum")


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    problem = puzzles.problems("gym:tower_of_hanoi", 1, 0, held_out=False)[0]
    puzzles.get(problem.puzzle).verify(problem, "Move disk 9 from Peg 9 to Peg 9")
    puzzles.problems("gym:bf", 5, 0, held_out=False)
    assert capfd.readouterr().out == ""
