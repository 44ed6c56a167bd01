"""What the hygiene suite looks at: a verifier with problems from a file, or a puzzle with problems drawn from it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pascaline.data import puzzles
from pascaline.data.dedup import normalised
from pascaline.data.puzzles import Problem, Verdict, collection
from pascaline.engine import Output
from pascaline.errors import BadInput, nearest
from pascaline.post.verifiers import base, scores

GOLDS = ("answer", "solution", "ground_truth", "label", "gold", "target", "completion")

THOUGHT = "Is it 17? No, 23 is nearer."  # has numbers, so that who looks for the answer in it finds a wrong one
PLAIN = "I cannot say."
HELD_OUT_DRAWS = 2000


@dataclass
class Subject:
    """A verifier or a puzzle under test.

    problems: those it is asked about; golds: the right answer to each, None where there is none to be had; train and test: the two sides
    of the split (test is empty where only one is known); drawn: whether they were drawn from a puzzle. low and high: the least and the
    greatest score that it has ever given here; part: the most that wrong answers of one kind have earned on average, and the first of them.
    """

    name: str
    problems: list[Problem]
    golds: list[str | None]
    train: list[Problem]
    test: list[Problem]
    drawn: bool = False
    low: float = 0.0
    high: float = 0.0
    part: tuple[float, str] = (0.0, "")
    trouble: list[str] = field(default_factory=list)

    def ask(self, pairs: Sequence[tuple[Problem, str]], thought: str | None = THOUGHT) -> tuple[base.Scores, str]:
        """The scores of these answers in one call, each behind the thought (None: the model does not think); and why the first that has
        none has none. A puzzle's verdicts count 1 and 0."""
        found, why = ask([problem for problem, _ in pairs], [said(answer, thought) for _, answer in pairs])
        known = [score for score in found if score is not None]
        self.low, self.high = min([self.low, *known]), max([self.high, *known])
        return found, why

    def rate(self, answers: Sequence[str], thought: str | None = THOUGHT) -> list[bool]:
        """Whether each of these answers, one a problem, is right."""
        found, _ = self.ask(list(zip(self.problems, answers, strict=True)), thought)
        wrong = [score or 0.0 for score in found if not right(score)]
        self.part = max(self.part, (sum(wrong) / max(1, len(wrong)), answers[0]))
        return [right(score) for score in found]

    @property
    def honest(self) -> list[tuple[Problem, str]]:
        """Each problem with its right answer; where none is known, with one that a person might give."""
        return [(p, PLAIN if gold is None else gold) for p, gold in zip(self.problems, self.golds, strict=True)]


def right(score: float | None) -> bool:
    return score is not None and score >= base.RIGHT


def said(answer: str, thought: str | None = THOUGHT, finish: str = "stop") -> Output:
    return Output([0], [0.0], finish, answer, thought)


def ask(problems: Sequence[Problem], outputs: Sequence[Output]) -> tuple[base.Scores, str]:
    """What `post.verifiers.judge` would ask, without what it knows by itself of answers that were cut off: the judged one is on trial."""
    if problems and problems[0].verifier:
        return scores(problems[0].verifier, problems, outputs)
    found: base.Scores = []
    trouble = ""
    for problem, output in zip(problems, outputs, strict=True):
        try:
            verdict = puzzles.get(problem.puzzle).verify(problem, output.text)
            found.append(None if verdict is Verdict.UNJUDGED else float(verdict is Verdict.RIGHT))
        except BadInput:  # of the puzzle's name
            raise
        except Exception as error:  # of a plugin, or of a puzzle that an answer broke
            found.append(None)
            trouble = trouble or f"puzzle '{problem.puzzle}' raised {type(error).__name__}: {error}"
    return found, trouble


def from_puzzle(name: str, count: int, draws: int, seed: int, dials: Mapping[str, Any]) -> Subject:
    """The first `count` different ones (0: all) of `draws` training problems are asked about. BadInput if the puzzle is unknown."""
    train = list(islice(puzzles.draw(name, seed, False, **dials), draws))
    test = list(islice(puzzles.draw(name, seed, True, **dials), min(draws, HELD_OUT_DRAWS)))
    different = list({problem.key: problem for problem in train}.values())
    asked = different[: count or None]
    subject = Subject(name, asked, [], train, test, drawn=True)
    for problem in asked:
        try:
            subject.golds.append(puzzles.get(name).solve(problem))
        except Exception as error:  # of a plugin
            subject.golds.append(None)
            subject.trouble.append(f"solve raised {type(error).__name__}: {error}")
    return subject


def from_file(
    name: str, data: Path, test: Path | None, count: int, seed: int, columns: Mapping[str, str], oracle: str | None, form: bool
) -> Subject:
    """The verifier of this name with `count` rows of the file (0: all), chosen by the seed.

    columns: the verifier's name of a column -> the file's; oracle: the column that holds the right answer (default: the first of GOLDS
    that there is). BadInput for an unknown verifier, a line that is no JSON object, and a missing column; form: no gold is needed.
    """
    base.get(name)
    rows = read(data, columns)
    gold = oracle or next((column for column in GOLDS if column in rows[0]), None)
    if gold is None and not form:
        raise BadInput(f"{data}: there is no column {', '.join(GOLDS)} with the right answers; name it with --oracle COLUMN, or say "
                       "--form if the verifier judges how an answer is written and not what it says.")  # fmt: skip
    train = problems(name, data, rows)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count or len(rows), len(rows))))
    golds = [None if gold is None else _gold(rows[i], gold, data, i) for i in chosen]
    return Subject(name, [train[i] for i in chosen], golds, train, [] if test is None else problems(name, test, read(test, columns)))


def read(path: Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of a JSONL file, with the columns named as the verifier wants them; the others keep their names."""
    rows = []
    for where, row in collection.rows(path):
        for ours, theirs in columns.items():
            if theirs not in row:
                raise BadInput(f"{where} has no column '{theirs}'{nearest(theirs, row)} (it has {', '.join(row)})")
            row[ours] = row[theirs] if ours == theirs else row.pop(theirs)
        rows.append(row)
    if not rows:
        raise BadInput(f"{path} has no rows; it must have one JSON object a line.")
    return rows


def problems(verifier: str, path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Problem]:
    found = []
    for number, row in enumerate(rows, 1):
        column = next((name for name in collection.PROMPTS if name in row), None)
        if column is None or not isinstance(row[column], str):
            raise BadInput(
                f"{path}, row {number} has no text in a column {', '.join(collection.PROMPTS)}; name one with --columns prompt=COLUMN."
            )
        data = {key: value for key, value in row.items() if key != column}
        found.append(Problem(path.name, row[column], same(row[column]), data, verifier))
    return found


def same(prompt: str) -> str:
    """Prompts that are equal in this are the same problem: unicode, white space and case do not count, signs and digits do."""
    return normalised(prompt).casefold()


def _gold(row: Mapping[str, Any], column: str, path: Path, place: int) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadInput(f"{path}, row {place + 1}: the right answer in '{column}' must be a text or a number, not {value!r:.60}.")
    return str(value).rpartition(collection.MARK)[2].strip()
