"""reasoning-gym's families as puzzles, `gym:FAMILY`, with what was measured to be wrong in them fenced (0.1.25; bench/gym.py measures it).

- Item i of its data set of seed s comes from Random(s + i), so data sets of near seeds share their items. Here a problem is item 0 of a
  data set of its own, seeds are at least SEEDS_APART apart, and equal questions are one problem, on one side of the split.
- A scorer pays in parts: for text that holds the answer, for cells, for nearness. Only 1 is right; 0.99 would forgive a day in a time
  interval, or a cell in a hundred.
- A problem names its item by family, seed and config; who judges makes it again. So nothing is lost in JSON (tuples, dates, integer keys).
- Families that cannot be had so are REFUSED by name.

The split knows no two wordings of one problem. Where a family asks the same sum in several ways, both sides may hold it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

from pascaline.data.puzzles.base import WHITESPACE, Dial, Problem, Trace, Verdict
from pascaline.errors import BadInput, nearest

PREFIX = "gym:"
SEEDS_APART = 10**7
SEEDS = 2**32
DRAWS = 100  # seeds tried for one item: a generator may fail at one (maze: at 8 of 36,768)
SIZE = 5  # of a data set, of which item 0 is taken: acre deals its kinds of question out in fifths
DRAWN_AT_BIRTH = ("acre", "gsm_symbolic", "list_functions")  # (the last two for bench/gym.py) items are drawn as the data set is made

ADMITTED = tuple(
    """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion bf binary_alternation bitwise_arithmetic caesar_cipher
    calendar_arithmetic chain_sum circuit_logic color_cube_rotation count_bits count_primes course_schedule cryptarithm decimal_chain_sum
    dice emoji_mystery family_relationships fraction_simplification game_of_life gcd group_anagrams jugs kakurasu knights_knaves
    largest_island lcm leg_counting letter_counting mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid
    needle_haystack number_filtering number_format palindrome_generation palindrome_partitioning path_star
    polynomial_equations power_function prime_factorization products quantum_lock rearc rectangle_count rotate_matrix rotten_oranges
    self_reference sentence_reordering shortest_path simple_equations simple_geometry spell_backward string_manipulation string_splitting
    string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego word_sequence_reversal word_sorting zebra_puzzles
    """.split()  # noqa: SIM905 (otherwise as many pairs of quotes)
)

_NO_ORACLE = "it gives no answer of its own, so that nothing shows whether its scorer can be satisfied"
_EVAL = "its scorer runs Python's eval on what the model wrote"
_PARSE = "its scorer runs sympy's parse_expr, which is an eval, on what the model wrote"
_HASH = "its items depend on PYTHONHASHSEED, so that no run can be repeated"
_SLOW = "making one item takes seconds at times, and it is made again to be judged"
_HANGS = "at one seed in some thousands making an item takes ten seconds or more, for its numbers grow huge"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_ORACLE),
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _EVAL),
    **dict.fromkeys(("intermediate_integration", "polynomial_multiplication", "simple_integration"), _PARSE),
    **dict.fromkeys(("isomorphic_strings", "ransom_note", "word_ladder"), _HASH),
    **dict.fromkeys(("futoshiki", "knight_swap", "sokoban"), _SLOW),
    **dict.fromkeys(("basic_arithmetic", "number_sequence"), _HANGS),
    "codeio": "it runs programs from its data file with exec; some write files, or start threads",
    "coin_flip": "its scorer pays in full for the answer 0, by comparing only as many digits as the shorter number has",
    "complex_arithmetic": "its scorer pays in full for the answer nan",
    "composite": "it is a mixture of families; name these as puzzles of their own",
    "countdown": f"{_PARSE}; Pascaline's own puzzle countdown asks the same",
    "decimal_arithmetic": "its scorer forgives a wrong last digit",
    "figlet_font": "its scorer pays in full once ten letters are right, whatever follows",
    "game_of_life_halting": "its scorer pays in full for any text",
    "gsm_symbolic": "its scorer reads the first number of a text, without its sign",
    "letter_jumble": "its scorer pays in full for a right beginning, whatever follows",
    "list_functions": "it draws from Python's global random numbers, so that no run can be repeated",
    "number_sorting": "its scorer forgives an error of 1 in each number, and pays in full for a list of NaN",
    "pool_matrix": "its scorer forgives an error of 1 %, and it takes no seed of 2**32 or more",
    "puzzle24": f"{_PARSE}, and pays in full for 1*2*3*4, whatever numbers were given",
}


@dataclass(frozen=True)
class Gym:
    """One family as a puzzle. Its dials are the keys of the family's own config, without seed and size."""

    family: str
    LEVELS: Mapping[str, Dial]

    def generate(self, rng: random.Random, **dials: Any) -> Problem:
        """The item of a seed drawn from rng. BadInput for dials that the family does not take, or with which it makes no item."""
        config = _text(self.family, dials)
        _dataset(self.family, config)
        trouble = "its answers are empty"
        for _ in range(DRAWS):
            seed = SEEDS_APART * int(rng.random() * SEEDS)
            try:
                entry = _item(self.family, seed, config)[1]
            except Exception as error:  # of a generator that is not ours: it found nothing for this seed
                trouble = _said(error)
                continue
            question, answer = entry["question"], entry["answer"]
            if not answer.strip():  # as ab's is, once in 200 items: nothing is no answer
                continue
            data = {"family": self.family, "seed": seed, "config": dials, "question": question, "answer": answer}
            return Problem(PREFIX + self.family, question, f"{PREFIX}{self.family} {' '.join(question.casefold().split())}", data, "gym")
        raise BadInput(f"puzzle '{PREFIX}{self.family}' with {dials or 'its default dials'} makes no item: {trouble}.")

    def trace(self, problem: Problem, rng: random.Random) -> Trace:
        """The family's answer, without a thought: it has none."""
        return Trace("", problem.data["answer"])

    def solve(self, problem: Problem) -> str | None:
        """The family's answer."""
        return str(problem.data["answer"])

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """As the verifier `gym`, but in this process, with no limit on time."""
        return Verdict.RIGHT if score(**problem.data, given=answer) == 1.0 else Verdict.WRONG


def get(name: str) -> Gym:
    """The puzzle of this name, `gym:FAMILY`; BadInput if it is refused, or there is none."""
    family = name.removeprefix(PREFIX)
    if family in REFUSED:
        raise BadInput(f"puzzle '{PREFIX}{family}' is refused: {REFUSED[family]}.")
    if family not in ADMITTED:
        raise BadInput(f"no puzzle '{name}'{nearest(family, ADMITTED)} (they are gym: and a family of reasoning-gym's that was measured)")
    _library()
    return Gym(family, {})


def families() -> list[str]:
    """The families that can be had, without their prefix."""
    return list(ADMITTED)


def score(family: str, seed: int, config: dict[str, Any], question: str, answer: str, given: str) -> float:
    """1.0 if the family's scorer pays in full for the answer given, else 0.0: also if it raises what a text out of form makes it raise, and
    for digits of other scripts, which Python's int and float read, unless the right answer has such.

    What the verifier calls in a process of its own (post/verifiers/gym.py). The item is made again and must be the one that was asked:
    BadInput if it is not, which another release of reasoning-gym would cause.
    """
    get(family)  # data from elsewhere may name a refused one, whose scorer would run what stands in the answer
    dataset, entry = _remembered(family, seed, _text(family, config))
    if (entry["question"], entry["answer"]) != (question, answer):
        raise BadInput(f"puzzle '{PREFIX}{family}', seed {seed}: reasoning-gym makes another item here than the one that was asked.")
    if foreign(given) - foreign(answer):
        return 0.0
    try:
        with _quiet():
            return float(dataset.score_answer(given.strip(WHITESPACE), copy.deepcopy(entry)) == 1)
    except (ValueError, TypeError, LookupError, ArithmeticError):  # as prime_factorization does for what is no number
        return 0.0


def foreign(text: str) -> set[str]:
    """Its digits that are none of 0 to 9."""
    return {character for character in text if character.isdecimal() and not character.isascii()}


def _library() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise BadInput(f"puzzles '{PREFIX}...' need reasoning-gym: pip install 'pascaline[gym]'.") from error


def _text(family: str, dials: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dials, sort_keys=True)
    except TypeError as error:
        raise BadInput(f"puzzle '{PREFIX}{family}': a dial is a number, a text, true or false, or a list of these ({error}).") from error


@lru_cache(maxsize=32)
def _dataset(family: str, config: str) -> Any:
    """A data set of this config (JSON), of any seed: making one reads files for up to half a second, so each is made once."""
    kind, dials = _library().factory.DATASETS[family][1], json.loads(config)
    known = [one.name for one in fields(kind) if one.name not in ("seed", "size") and not is_dataclass(getattr(kind(), one.name))]
    for name in dials:
        if name not in known:
            raise BadInput(f"puzzle '{PREFIX}{family}' has no dial '{name}'{nearest(name, known)} (it has {', '.join(known) or 'none'})")
    try:
        return _library().create_dataset(family, seed=0, size=SIZE, **dials)
    except Exception as error:  # of checks that are not ours, which know these dials alone
        raise BadInput(f"puzzle '{PREFIX}{family}' does not take {dials}: {_said(error)}.") from error


def _item(family: str, seed: int, config: str) -> tuple[Any, dict[str, Any]]:
    """The data set of this seed, to be asked for scores, and its item 0. Raises whatever the generator does."""
    dataset = copy.copy(_dataset(family, config))
    dataset.config, dataset.seed = replace(dataset.config, seed=seed), seed
    with _quiet():
        dataset = type(dataset)(dataset.config) if family in DRAWN_AT_BIRTH else dataset
        return dataset, dataset[0]


_remembered = lru_cache(maxsize=256)(_item)  # where an item is judged, several answers to it come one after the other


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Several generators and scorers print (bf, tower_of_hanoi), and standard output may be JSON."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ")
