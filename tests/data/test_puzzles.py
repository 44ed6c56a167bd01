"""Puzzles: the oracle is right, the verifier accepts exactly the right answers, the split never leaks."""

import ast
import random
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from functools import cache
from importlib.metadata import EntryPoint
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline import plugins
from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict, arithmetic, chain, countdown, needle
from pascaline.data.puzzles.expression import evaluate
from pascaline.errors import BadInput

DIALS = [
    ("countdown", {}),
    ("countdown", {"numbers": 4}),
    ("countdown", {"numbers": [3, 4], "largest": 30}),
    ("chain", {}),
    ("chain", {"steps": 2}),
    ("chain", {"steps": [2, 5], "modulo": 50}),
    ("arithmetic", {}),
    ("arithmetic", {"digits": [1, 4], "terms": [2, 4], "operators": 3}),
    ("needle", {}),
    ("needle", {"refrains": [0, 30], "digits": 4}),
]


def reference(text: str) -> tuple[Fraction, list[int]] | None:
    """A second reader of expressions, by recursive descent: value and numbers, or None."""
    numbers: list[int] = []
    position = 0

    def peek() -> str:
        return text[position] if position < len(text) else ""

    def expect(character: str) -> None:
        nonlocal position
        if peek() != character:
            raise ValueError
        position += 1

    def spaces() -> None:
        nonlocal position
        while peek() == " ":
            position += 1

    def atom() -> Fraction:
        nonlocal position
        spaces()
        if peek() == "(":
            expect("(")
            value = total()
            expect(")")
        else:
            begin = position
            while peek() != "" and peek() in "0123456789":
                position += 1
            digits = text[begin:position]
            if digits == "" or str(int(digits)) != digits:
                raise ValueError
            numbers.append(int(digits))
            value = Fraction(int(digits))
        spaces()
        return value

    def product() -> Fraction:
        nonlocal position
        value = atom()
        while peek() != "" and peek() in "*/":
            operator, position = peek(), position + 1
            right = atom()
            value = value * right if operator == "*" else value / right
        return value

    def total() -> Fraction:
        nonlocal position
        value = product()
        while peek() != "" and peek() in "+-":
            operator, position = peek(), position + 1
            right = product()
            value = value + right if operator == "+" else value - right
        return value

    try:
        value = total()
    except (ValueError, ZeroDivisionError):
        return None
    return (value, numbers) if position == len(text) else None


def values(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value that any expression over exactly these numbers can take, fractions and negatives included."""
    if len(numbers) == 1:
        return set(numbers)
    found: set[Fraction] = set()
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            if i != j:
                a, b = numbers[i], numbers[j]
                rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
                for value in [a + b, a - b, a * b] + ([a / b] if b else []):
                    found |= values((*rest, value))
    return found


def any_expression(rng: random.Random, numbers: list[int]) -> str:
    parts = [str(number) for number in rng.sample(numbers, len(numbers))]
    while len(parts) > 1:
        i = rng.randrange(len(parts) - 1)
        joined = parts[i] + rng.choice("+-*/") + parts[i + 1]
        parts[i : i + 2] = [f"({joined})" if rng.random() < 0.6 else joined]
    return parts[0]


@pytest.mark.parametrize(("name", "dials"), DIALS)
def test_the_oracle_is_always_right(name, dials):
    puzzle = puzzles.get(name)
    for side in (False, True):
        for problem in puzzles.problems(name, 150, 5, side, **dials):
            answer = puzzle.solve(problem)
            assert puzzle.verify(problem, answer) is Verdict.RIGHT
            assert puzzle.verify(problem, f" {answer}\n") is Verdict.RIGHT
            assert puzzle.verify(problem, " none\n") is Verdict.ABSTAIN
            if name == "countdown":
                value, numbers = reference(answer)
                assert value == problem.data["target"] and sorted(numbers) == problem.data["numbers"]
                assert 1 <= problem.data["target"] <= 99


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 4]))
def test_countdown_agrees_with_a_second_judge_on_any_expression_and_its_mutations(seed, numbers):
    rng = random.Random(seed)
    problem = countdown.generate(rng, numbers=numbers)
    good = countdown.solve(problem)
    for _ in range(10):
        text = any_expression(rng, problem.data["numbers"]) if rng.random() < 0.5 else good
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice([*"0123456789+-*/() ", ""]) + text[at + rng.randrange(2) :]
        read = reference(text)
        assert evaluate(text) == read
        right = read is not None and read[0] == problem.data["target"] and sorted(read[1]) == problem.data["numbers"]
        assert countdown.verify(problem, text) is (Verdict.RIGHT if right else Verdict.WRONG)
        if right and numbers == 3:
            assert read[0] in values(tuple(Fraction(n) for n in problem.data["numbers"]))


def test_countdown_accepts_fractions_on_the_way_and_refuses_near_misses():
    problem = Problem("countdown", "", "", {"numbers": [3, 3, 7, 7], "target": 24})
    assert countdown.verify(problem, "7*(3+3/7)") is Verdict.RIGHT
    assert countdown.solve(problem) is None or countdown.verify(problem, countdown.solve(problem)) is Verdict.RIGHT
    problem = Problem("countdown", "", "", {"numbers": [6, 6, 13], "target": 12})
    assert countdown.verify(problem, "13-(6/6)") is Verdict.RIGHT
    assert countdown.verify(problem, "13 - 6/6") is Verdict.RIGHT
    for wrong in [
        "13-(06/6)",
        "13-6/6=12",
        "12",
        "13-(6/6",
        "13-6/6)",
        "13-1",
        "6+6",
        "13-6/6+0",
        "-6/6+13",
        "+13-6/6",
        "13-6//6",
        "13-6**0-6",
        "(13)-(6)(6)",
        "6/6",
        "",
        "()",
        "None",
        "none.",
        "13-6/6 13-6/6",
        "1 3-6/6",
        "13-６/6",
        "13−6/6",
        "13-6/6\x00",
        "13\u00a0-6/6",
        "\u200913-6/6",
        "13-\n6/6",
        "1_3-6/6",
        "13.0-6/6",
    ]:
        assert countdown.verify(problem, wrong) is Verdict.WRONG, wrong


def test_countdown_reach_is_exactly_what_brute_force_reaches():
    def brute(numbers: tuple[int, ...]) -> set[int]:
        if len(numbers) == 1:
            return set(numbers)
        found: set[int] = set()
        for i, a in enumerate(numbers):
            for j, b in enumerate(numbers):
                if i != j:
                    rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
                    results = [a + b, a - b, a * b] + ([a // b] if a % b == 0 else [])
                    found |= {v for r in results if 0 < r <= 99 for v in brute((*rest, r))}
        return found

    rng = random.Random(0)
    for _ in range(60):
        numbers = tuple(sorted(rng.randint(1, 20) for _ in range(rng.choice([3, 3, 4]))))
        solvable = {t for t in range(1, 100) if countdown.solve(Problem("countdown", "", "", {"numbers": list(numbers), "target": t}))}
        assert solvable == brute(numbers)


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9",
        "9" * 1_000_000,
        "(" * 100_000 + "1" + ")" * 100_000,
        "1" + "+1" * 500_000,
        "(" * 250,
        "1/0",
        "6/(6-6)*13",
        "٣+٤",
        "１３-６/６",
        "²",
        "\x00",
        "13-(6/6)\x00",
        "__import__('os')",
        "13-6/6#",
        "lambda:0",
        "1e9",
        "0x0d",
        "{{7*7}}",
        " " * 1_000_000,
        "none" * 100_000,
        "\ud800",
        "9*" * 120 + "9",
        "(1/3" * 50,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_hostile_answers_are_wrong_in_bounded_time(answer):
    cases = [
        (countdown, Problem("countdown", "", "", {"numbers": [6, 6, 13], "target": 12})),
        (chain, Problem("chain", "", "", {"start": 7, "steps": [["+", 5]], "modulo": 100})),
        (arithmetic, arithmetic.write([6, 6], "+")),
    ]
    for puzzle, problem in cases:
        start = time.process_time()
        assert puzzle.verify(problem, answer) is Verdict.WRONG
        assert time.process_time() - start < 0.1


@given(st.text(max_size=40))
def test_any_text_gets_a_verdict(text):
    problem = Problem("countdown", "", "", {"numbers": [1, 2, 3], "target": 6})
    assert countdown.verify(problem, text) in (Verdict.WRONG, Verdict.ABSTAIN)


@given(st.integers(0, 2**32))
def test_chain_accepts_only_the_canonical_integer(seed):
    problem = chain.generate(random.Random(seed), steps=3)
    value = problem.data["start"]
    for operator, operand in problem.data["steps"]:
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
    right = str(value % 100)
    assert chain.verify(problem, right) is Verdict.RIGHT
    shown = "".join(chr(ord("０") + int(digit)) for digit in right)
    for wrong in [
        f"0{right}",
        f"+{right}",
        f"{right}.0",
        f"{right}.",
        shown,
        f"-{right}",
        str(value % 100 + 100),
        "",
        f"{right} {right}",
        f"\u00a0{right}",
        f"{right}\x00",
        f"({right})",
        str((value + 1) % 100),
    ]:
        assert chain.verify(problem, wrong) is Verdict.WRONG, wrong


def test_constant_and_copied_answers_score_at_their_known_baseline():
    for problem in puzzles.problems("countdown", 500, 3, True):
        numbers = problem.data["numbers"]
        for answer in [str(problem.data["target"]), "1", *map(str, numbers), problem.prompt]:
            assert countdown.verify(problem, answer) is Verdict.WRONG  # an answer must use all the numbers
    draws = 8000
    drawn = puzzles.problems("chain", draws, 3, False, steps=2)
    exact: Counter[int] = Counter()  # of all 100 starts x (3 operations x 8 operands) squared, each equally likely
    copied = 0
    operations = [(operator, operand) for operator in "+-*" for operand in range(2, 10)]
    for start in range(100):
        for first in operations:
            for second in operations:
                value = start
                for operator, operand in (first, second):
                    value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 100
                exact[value] += 1
                copied += value == start
    space = 100 * len(operations) ** 2

    def close(answers, share):
        score = sum(chain.verify(p, a) is Verdict.RIGHT for p, a in zip(drawn, answers, strict=True)) / draws
        return abs(score - share) < 4 * (share * (1 - share) / draws) ** 0.5

    for constant in (0, 1, 50):
        assert close([str(constant)] * draws, exact[constant] / space)
    assert close([str(problem.data["start"]) for problem in drawn], copied / space)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 4]), st.integers(1, 12))
def test_countdown_traces_say_only_what_is_true_and_never_try_twice(seed, numbers, attempts):
    rng = random.Random(seed)
    problem = countdown.generate(rng, numbers=numbers)
    trace = countdown.trace(problem, rng, attempts=attempts, give_up=0.1, false_claim=0.2)
    lines = trace.thought.split("\n")
    assert 1 <= len(lines) <= attempts
    seen = set()
    for index, line in enumerate(lines):
        forms, result, target, off, said = re.fullmatch(r"(.+)=(\d\d),(\d\d):(\d\d) (yes|no)", line).groups()
        expressions = forms.split("=")
        assert len(expressions) == numbers - 1 and int(target) == problem.data["target"]
        assert int(off) == abs(int(result) - int(target))
        for expression in expressions:  # every rewriting has the same value
            assert reference(re.sub(r"\b0+(?=\d)", "", expression))[0] == int(result)
        assert sorted(reference(expressions[0])[1]) == problem.data["numbers"]
        assert said == ("yes" if index == len(lines) - 1 and trace.answer != "none" else "no")
        assert said == "yes" or result != target
        name = fingerprint(expressions[0])
        assert name not in seen
        seen.add(name)
    if trace.answer != "none":
        assert trace.answer == expressions[0]
        right = int(result) == problem.data["target"]
        assert countdown.verify(problem, trace.answer) is (Verdict.RIGHT if right else Verdict.WRONG)


@cache
def fingerprint(expression):
    """Equal for expressions that the laws of arithmetic make equal: values modulo a prime with each number read as a fixed random one."""
    prime = 2**89 - 1
    stand_in = re.sub(r"\d+", lambda m: str(random.Random(m[0]).getrandbits(80)), expression)

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        x, y = value(node.left), value(node.right)
        kind = type(node.op).__name__
        return {"Add": x + y, "Sub": x - y, "Mult": x * y, "Div": x * pow(y, -1, prime)}[kind] % prime

    return value(ast.parse(stand_in, mode="eval").body)


@pytest.mark.parametrize("numbers", [(4, 9, 19), (6, 6, 13), (1, 1, 1), (2, 3, 5, 7), (3, 4, 5, 6), (5, 5, 10, 20)])
def test_countdown_attempts_are_all_there_are_each_once_and_one_follows_the_other(numbers):
    rng = random.Random(1)
    tried = []
    for target in range(1, 100):
        problem = Problem("countdown", "", "", {"numbers": list(numbers), "target": target})
        trace = countdown.trace(problem, rng, attempts=10**4, give_up=0.0, planted=0.0, false_claim=0.0)  # more than there are
        assert (trace.answer != "none") == (countdown.solve(problem) is not None)
        tried.append([line.split("=")[0] for line in trace.thought.split("\n")])
    longest = max(tried, key=len)
    order = {fingerprint(e): i for i, e in enumerate(longest)}
    assert len(order) == len(longest) < 10**4
    for lines in tried:
        places = [order.get(fingerprint(e)) for e in lines]
        assert None not in places
        assert all((b - a) % len(longest) == 1 for a, b in pairwise(places))


def test_countdown_trace_qualities_do_what_they_say():
    drawn = puzzles.problems("countdown", 3000, 1, False)
    rng = random.Random(0)

    def shares(**quality):
        traces = [countdown.trace(problem, rng, **quality) for problem in drawn]
        verdicts = Counter(countdown.verify(p, t.answer) for p, t in zip(drawn, traces, strict=True))
        return {verdict: verdicts[verdict] / len(drawn) for verdict in Verdict}, traces

    assert shares(planted=1.0)[0][Verdict.RIGHT] == 1
    assert shares(planted=0.0, give_up=0.0, attempts=1000)[0][Verdict.RIGHT] == 1
    none, traces = shares(planted=0.0, false_claim=0.0, give_up=0.3, attempts=6)
    assert none[Verdict.WRONG] == 0 and 0.05 < none[Verdict.RIGHT] < 0.5
    lengths = Counter(t.thought.count("\n") + 1 for t in traces if t.answer == "none")
    assert min(lengths) == 1 and max(lengths) == 6
    assert abs(lengths[1] / 3000 - 0.3 * 0.9) < 0.03 and abs(lengths[2] / lengths[1] - 0.7 * 0.9) < 0.1
    claims = shares(planted=0.0, false_claim=1.0, give_up=0.3, attempts=6)[0]
    assert claims[Verdict.ABSTAIN] == 0 and abs(claims[Verdict.WRONG] - none[Verdict.ABSTAIN]) < 0.05
    assert shares(planted=1.0, slip=1.0, attempts=1)[0][Verdict.RIGHT] < 0.05
    with pytest.raises(BadInput, match="share from 0 to 1"):
        countdown.trace(drawn[0], rng, planted=1.5)
    with pytest.raises(BadInput, match="attempts"):
        countdown.trace(drawn[0], rng, attempts=0)


def test_chain_trace_qualities_do_what_they_say():
    drawn = puzzles.problems("chain", 3000, 1, False, steps=4)
    rng = random.Random(0)

    def share(**quality):
        traces = [chain.trace(problem, rng, **quality) for problem in drawn]
        right = sum(chain.verify(p, t.answer) is Verdict.RIGHT for p, t in zip(drawn, traces, strict=True))
        return right / len(drawn), sum(t.thought == "" for t in traces) / len(drawn)

    assert share(slip=0.0, direct=0.0) == (1.0, 0.0)
    right, empty = share(slip=0.1, direct=0.0)
    assert empty == 0 and abs(right - 0.9**4) < 0.05
    right, empty = share(direct=1.0, lucky=0.25)
    assert empty == 1 and abs(right - 0.2575) < 0.04
    problem = Problem("chain", "", "", {"start": 7, "steps": [["+", 5], ["*", 3], ["-", 4]], "modulo": 100})
    assert chain.trace(problem, rng, slip=0.0, direct=0.0) == puzzles.Trace("7+5=12\n12*3=36\n36-4=32", "32")


def test_needles_have_the_lengths_depths_and_digits_of_their_dials():
    drawn = puzzles.problems("needle", 4000, 1, False, refrains=[1, 30], digits=[2, 7])
    assert {p.data["refrains"] for p in drawn} == set(range(1, 31))
    assert Counter(len(p.data["value"]) for p in drawn).keys() == {2, 3, 4, 5, 6, 7} and all(p.data["value"][0] != "0" for p in drawn)
    depths = [p.data["before"] / p.data["refrains"] for p in drawn]
    assert min(depths) == 0 and max(depths) == 1 and abs(sum(depths) / len(depths) - 0.5) < 0.03
    for problem in drawn[:200]:
        assert problem.prompt.count(needle.REFRAIN) == problem.data["refrains"] and problem.prompt.count(problem.data["value"]) == 1
        assert problem.key == needle.write(problem.data["key"], problem.data["value"], 99, 5).key  # the same needle in any haystack


def test_needle_traces_say_the_number_and_slips_are_wrong():
    rng = random.Random(0)
    for problem in puzzles.problems("needle", 200, 2, False):
        value = problem.data["value"]
        said = f"The special magic number for {problem.data['key']} mentioned in the provided text is {value}."
        assert needle.trace(problem, rng) == puzzles.Trace(said, value)
        off = needle.trace(problem, rng, slip=1.0)
        assert needle.verify(problem, off.answer) is Verdict.WRONG and f" {off.answer}." in off.thought
        assert sum(a != b for a, b in zip(off.answer, value, strict=True)) == 1
        for wrong in [f"0{value}", f"+{value}", f"{value}.0", value[:-1], f"{value} {value}", "", problem.prompt]:
            assert needle.verify(problem, wrong) is Verdict.WRONG


@pytest.mark.parametrize(("name", "dials"), DIALS)
def test_training_draws_never_share_a_problem_with_the_held_out_ones(name, dials):
    held = puzzles.problems(name, 400, 1, True, **dials)
    training = puzzles.problems(name, 4000, 2, False, **dials)
    assert len({p.key for p in held}) == len({p.prompt for p in held}) == 400
    assert not {p.key for p in held} & {p.key for p in training}
    assert not {p.prompt for p in held} & {p.prompt for p in training}
    assert all(puzzles.held_out(p.key) for p in held) and not any(puzzles.held_out(p.key) for p in training)


def test_one_problem_in_eight_is_held_out_and_the_split_never_moves():
    share = sum(puzzles.held_out(f"key {i}") for i in range(20_000)) / 20_000
    assert abs(share - 1 / 8) < 0.01
    assert [i for i in range(1, 41) if puzzles.held_out(f"countdown 1 2 {i} = {i}")] == [3, 7, 9, 38]


def test_draws_are_the_same_in_another_process_and_a_longer_list_begins_like_a_shorter():
    code = (
        "from pascaline.data import puzzles; import random; p = puzzles.problems('countdown', 20, 7, True);"
        "print([(x.prompt, puzzles.get('countdown').trace(x, random.Random(1))) for x in p])"
    )
    ours = [(x.prompt, countdown.trace(x, random.Random(1))) for x in puzzles.problems("countdown", 20, 7, True)]
    theirs = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert theirs.strip() == str(ours)
    for side in (False, True):
        long = puzzles.problems("chain", 60, 7, side)
        assert long[:30] == puzzles.problems("chain", 30, 7, side) != puzzles.problems("chain", 30, 8, side)


def test_too_small_a_space_and_wrong_dials_are_said():
    with pytest.raises(BadInput, match="held-out problems, 300 were asked for"):
        puzzles.problems("countdown", 300, 1, True, largest=4)
    for dials in ({"numbers": 5}, {"largest": 0}, {"numbers": "3"}, {"numbers": True}, {"numbers": [4, 3]}):
        with pytest.raises(BadInput, match=next(iter(dials))):
            puzzles.problems("countdown", 1, 1, False, **dials)
    with pytest.raises(BadInput, match="did you mean 'largest'"):
        puzzles.problems("countdown", 1, 1, False, lagest=9)


def test_puzzles_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    (tmp_path / "my_puzzles.py").write_text(
        "from pascaline.data.puzzles import chain\nimport types\n"
        "def mine(): return types.SimpleNamespace(**{n: getattr(chain, n) for n in "
        "('LEVELS', 'generate', 'trace', 'solve', 'verify')})\nhalf = types.SimpleNamespace(generate=chain.generate)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    problem = puzzles.problems("my_puzzles:mine", 1, 1, False)[0]
    assert problem.puzzle == "my_puzzles:mine"
    assert puzzles.get(problem.puzzle).verify(problem, puzzles.get(problem.puzzle).solve(problem)) is Verdict.RIGHT
    with pytest.raises(BadInput, match="lacks trace, solve, verify"):
        puzzles.get("my_puzzles:half")
    for bad in ("my_puzzles:absent", "no_such_module_here:x"):
        with pytest.raises(BadInput, match="cannot be loaded"):
            puzzles.get(bad)
    with pytest.raises(BadInput, match="did you mean 'countdown'"):
        puzzles.get("countdwn")


def test_a_module_can_be_a_plugin(monkeypatch):
    point = EntryPoint("links", "pascaline.data.puzzles.chain", puzzles.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == puzzles.GROUP else [])
    assert puzzles.get("links") is chain
    with pytest.raises(BadInput, match=r"no puzzle 'linkz'; did you mean 'links'\? \(there are countdown, .*, links; or module:function\)"):
        puzzles.get("linkz")
