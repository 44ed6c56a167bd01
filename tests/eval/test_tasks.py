"""Results of held-out problems, from outputs written by hand."""

import pytest

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output, Sampling
from pascaline.errors import BadInput
from pascaline.eval import passk
from pascaline.eval.tasks import Result, evaluate, held_out
from pascaline.tables import Puzzle

R, W, A, U = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN, Verdict.UNJUDGED


def said(text: str, finish: str = "stop", tokens: int = 3) -> Output:
    return Output([0] * tokens, [0.0] * tokens, finish, text, "x")


def result(*rows: list[tuple[Output, Verdict]]) -> Result:
    problems = [Problem("p", f"q{i}", f"k{i}", {}) for i in range(len(rows))]
    return Result(problems, [[o for o, _ in row] for row in rows], [[v for _, v in row] for row in rows])


def test_summary() -> None:
    cut = said("", "length", 9)
    found = result(
        [(said("4"), R), (said("5"), W)],
        [(said("none"), A), (cut, W)],
        [(said("4"), R), (said("4"), R)],
        [(cut, W), (said("7", tokens=1), W)],
    ).summary()
    mean, low, high = passk.mean_interval([0.5, 0.0, 1.0, 0.0])
    assert found == {
        "accuracy": mean,
        "accuracy_low": low,
        "accuracy_high": high,
        "n": 4,
        "mean_tokens": (5 * 3 + 2 * 9 + 1) / 8,
        "abstain": 1 / 8,
        "false_claim": 2 / 8,
        "truncated": 2 / 8,
        "unclosed": 2 / 8,
        "unjudged": 0,
    }
    assert found["accuracy"] == 3 / 8 and low < 3 / 8 < high


@pytest.mark.parametrize(
    ("output", "judged", "kind"),
    [
        (said("5"), W, "false_claim"),
        (said("none"), A, "abstain"),
        (said("5", "length"), W, "truncated"),  # cut off is no claim, whatever had been said by then
        (said("", "length"), W, "truncated"),
        (said("4"), R, "accuracy"),
    ],
)
def test_every_answer_is_of_one_kind(output: Output, judged: Verdict, kind: str) -> None:
    found = result([(output, judged)]).summary()
    kinds = ("accuracy", "abstain", "false_claim", "truncated")
    assert {k: found[k] for k in kinds} == {k: float(k == kind) for k in kinds}


def test_what_could_not_be_judged_counts_as_neither_right_nor_wrong() -> None:
    found = result([(said("4"), R), (said("5"), U)], [(said("4"), W), (said("5"), W)], [(said("4"), U), (said("5"), U)])
    assert found.means == [1.0, 0.0, None]
    told = found.summary()
    assert told["accuracy"] == 0.5 and told["n"] == 2 and told["unjudged"] == 3 / 6 and told["false_claim"] == 2 / 6
    majority, best = found.votes([2])
    assert majority == pytest.approx([1 / 3]) and best == [0.0]  # only the second problem has two judged answers
    assert result([(said("4"), U)]).summary()["accuracy"] is None


def test_right_is_a_table_of_problems_and_samples() -> None:
    assert result([(said("1"), R), (said("2"), W)], [(said("none"), A), (said("1"), R)]).right.tolist() == [[True, False], [False, True]]


def test_votes() -> None:
    same = result(
        [(said("4"), R), (said(" 4\n"), R), (said("5"), W), (said("none"), A)],  # space around an answer makes no other answer
        [(said("5"), W), (said("5"), W), (said("4"), R), (said("9", "length"), W)],  # the many are wrong
    )
    majority, best = same.votes([1, 4])
    assert majority == pytest.approx([(2 / 4 + 1 / 4) / 2, 0.5])
    assert best == pytest.approx([(2 / 4 + 1 / 4) / 2, 1.0])


def test_who_abstains_is_cut_off_or_says_nothing_has_no_vote() -> None:
    idle = [(said("none"), A), (said("none"), A), (said("9", "length"), W), (said("9", "length"), W), (said(""), W), (said(" "), W)]
    majority, best = result([*idle, (said("4"), R)]).votes([7])
    assert majority == [1.0] and best == [1.0]
    assert result(idle).votes([1, 6]) == ([0.0, 0.0], [0.0, 0.0])


def test_held_out_problems_are_distinct_and_the_same_every_time() -> None:
    tables = {"countdown": Puzzle(dials={"numbers": 4}), "chain": Puzzle(dials={"steps": [2, 5]})}
    found = held_out(["chain", "countdown"], tables, 50, seed=7)
    assert list(found) == ["chain", "countdown"] and found == held_out(["chain", "countdown"], tables, 50, seed=7)
    for problems in found.values():
        assert len({p.key for p in problems}) == 50 and all(puzzles.held_out(p.key) for p in problems)
    assert all(len(p.data["numbers"]) == 4 for p in found["countdown"])
    assert {len(p.data["steps"]) for p in found["chain"]} == {2, 3, 4, 5}
    with pytest.raises(BadInput, match="held-out"):
        held_out(["countdown"], {"countdown": Puzzle(dials={"largest": 4})}, 500, seed=7)


class Parrot:
    """Answers every prompt in the same words."""

    def __init__(self, *answers: str) -> None:
        self.answers = answers

    def generate(self, prompts: list[object], sampling: Sampling) -> list[list[Output]]:
        self.asked, self.sampling = prompts, sampling
        return [[said(answer) for answer in self.answers] for _ in prompts]


def test_evaluate_asks_for_the_prompts_and_judges_each_sample() -> None:
    problems = puzzles.problems("chain", 20, 3, held_out=True)
    answers = [str(puzzles.get("chain").solve(p)) for p in problems]
    parrot = Parrot(answers[0], "none", "x")
    sampling = Sampling(n=3)
    found = evaluate(parrot, problems, sampling)  # type: ignore[arg-type]
    assert parrot.asked == [p.prompt for p in problems] and parrot.sampling is sampling
    assert found.verdicts[0] == [R, A, W]
    assert found.right[:, 0].tolist() == [a == answers[0] for a in answers] and not found.right[:, 1:].any()
    evaluate(parrot, problems[:2], sampling, prompt=lambda p: [1, len(p.prompt)])  # type: ignore[arg-type]
    assert parrot.asked == [[1, len(p.prompt)] for p in problems[:2]]
