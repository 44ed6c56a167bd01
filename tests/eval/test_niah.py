"""Needles as a suite's task: RULER's text, lengths and depths that were asked for, and known seekers' cells."""

import json
import re
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from pascaline import tokenizer as tokenizers
from pascaline.data import puzzles
from pascaline.data.puzzles import Problem
from pascaline.data.puzzles import needle as puzzle
from pascaline.engine import Engine, Sampling
from pascaline.errors import BadInput
from pascaline.eval import needle, niah, plots
from pascaline.eval.plan import Plan
from pascaline.tokenizer import Tokenizer

# S-NIAH-1 as RULER's niah.py and constants.py write it for one needle: prompt, then the answer's prefix.
RULERS = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "One of the special magic numbers for calm-boat is: 1234567.\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "What is the special magic number for calm-boat mentioned in the provided text?"
)
PREFIX = " The special magic number for calm-boat mentioned in the provided text is"
CALM = puzzle.write("calm-boat", "1234567", 0, 0)
TEXT = """It was a dark night; the rain fell. "Who is there?" asked the miller. Nobody
answered!   He took 2.5 pounds of flour, e.g. for bread.

The second paragraph has no mark at its end

But the third has. (So it goes.) 雨が降る。風が吹く。"""
SENTENCES = [
    "It was a dark night; the rain fell.", '"Who is there?" asked the miller.', "Nobody answered!",
    "He took 2.5 pounds of flour, e.g. for bread.",
    "The second paragraph has no mark at its end", "But the third has.", "(So it goes.)", "雨が降る。", "風が吹く。",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"{p.prompt}\n{puzzle.opening(p)} {p.data['value']}." for p in puzzles.problems("needle", 60, 3, held_out=False)]
    return tokenizers.train([*texts, TEXT * 3], 600)


@pytest.fixture
def essay(tmp_path: Path) -> Path:
    path = tmp_path / "essay.txt"
    path.write_text(TEXT)
    return path


class Seeker:
    """An engine that finds a needle among the last `reach` tokens of the prompt, and says it as `form` does."""

    def __init__(self, tokenizer: Tokenizer, reach: int = 10**9, positions: int = 1024, form: str = " {}.\nAnswer"):
        self.tokenizer, self.reach, self.form, self.capacity = tokenizer, reach, form, 10**6
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
        self.asked, self.samplings = list[list[int]](), list[Sampling]()

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Any]]:
        self.asked += prompts
        self.samplings += [sampling] * len(prompts)
        said = []
        for ids in prompts:
            found = re.findall(r"One of the special magic \w+ for \S+ is: ([0-9a-f-]+)\.", self.tokenizer.decode(ids[-self.reach :]))
            said.append([SimpleNamespace(text=self.form.format(found[0] if found else "7777777"), reasoning=None)] * sampling.n)
        return said

    @property
    def texts(self) -> list[str]:
        return [self.tokenizer.decode(ids) for ids in self.asked]


def measure(engine: Any, task: str = "niah:1", problems: int = 40, max_tokens: int = 16, **dials: Any) -> dict[str, Any]:
    plan = Plan(task=task, problems=problems, max_tokens=max_tokens, dials={"plain": True, **dials})
    return json.loads(json.dumps(niah.niah(engine, plan, lambda done, total: None)))  # a measurement is JSON


def test_the_prompt_is_rulers_to_the_letter(tokenizer: Tokenizer) -> None:
    problem = niah.haystack("1").write(CALM, 2, 1)
    assert problem.prompt == RULERS
    plain = niah.asker(tokenizer, "", niah.Dials(plain=True))(problem)
    assert tokenizer.decode(plain) == RULERS + PREFIX and plain[0] == tokenizer.begin
    chat = niah.asker(tokenizer, "Be brief.", niah.Dials())(problem)
    said = tokenizer.decode(chat, special=True)
    assert said == f"<|begin|>Be brief.<|user|>{RULERS}<|assistant|><think></think>{PREFIX}"
    free = niah.asker(tokenizer, "", niah.Dials(prefix=False))(problem)
    assert tokenizer.decode(free, special=True) == f"<|begin|><|user|>{RULERS}<|assistant|><think>"


def test_an_essay_has_rulers_prompt_around_one_line_and_uuids_their_name(essay: Path) -> None:
    value = "6a1f8f0e-1111-4222-8333-444455556666"
    problem = niah.haystack(f"3:{essay}").write(Problem("needle", "", "", {"key": "calm-boat", "value": value}), 2, 1)
    assert problem.prompt.split("\n") == [
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the uuid afterwards.",
        f"{SENTENCES[0]} One of the special magic uuids for calm-boat is: {value}. {SENTENCES[1]}",
        "What is the special magic uuid for calm-boat mentioned in the provided text?",
    ]
    assert puzzle.opening(problem) == "The special magic uuid for calm-boat mentioned in the provided text is"


def test_greedy_and_at_most_as_long_as_rulers_answer(tokenizer: Tokenizer) -> None:
    engine = Seeker(tokenizer, positions=2048)
    found = measure(engine, max_tokens=512, lengths=[2048])
    assert found["answer_tokens"] == 128 and {(s.temperature, s.max_tokens, s.n) for s in engine.samplings} == {(0.0, 128, 1)}
    assert min(map(len, engine.asked)) > 2048 - 128 - 60 and max(map(len, engine.asked)) <= 2048 - 128


def test_without_the_prefix_the_plans_sampling_holds_and_the_answer_is_read_whole(tokenizer: Tokenizer) -> None:
    engine = Seeker(tokenizer, positions=2048, form="The number is **{}**.")
    plan = Plan(task="niah:1", problems=5, samples=3, max_tokens=300, dials={"prefix": False, "lengths": [1024]})
    found = niah.niah(engine, plan, lambda done, total: None)  # type: ignore[arg-type]
    assert (found["score"], found["ruler_score"], found["answer_tokens"], found["way"]) == (1.0, 1.0, 300, "chat")
    assert {(s.temperature, s.top_p, s.n, s.seed) for s in engine.samplings} == {(0.6, 0.95, 3, plan.seed)}
    assert max(map(len, engine.asked)) <= 724


@pytest.mark.parametrize("argument", ["1", "2:FILE", "3:FILE"])
def test_a_length_is_used_up_to_one_part_of_the_haystack_and_never_passed(tokenizer: Tokenizer, essay: Path, argument: str) -> None:
    hay = niah.haystack(argument.replace("FILE", str(essay)))
    for plain in (True, False):
        ask = niah.asker(tokenizer, "", niah.Dials(plain=plain))
        for length in (300, 333, 512, 1000):
            for depth in (0.0, 0.3, 1.0):
                (drawn,) = niah.needles(7, length, depth, 1, hay.kind)
                problem = niah.fill(drawn, hay, ask, length, depth)
                assert problem is not None
                count, before = problem.data["parts"], problem.data["before"]
                assert before == round(depth * count)
                assert len(ask(problem)) <= length < len(ask(hay.write(drawn, count + 1, round(depth * (count + 1)))))


def test_the_largest_number_that_fits_is_found_however_long_the_parts_are() -> None:
    sizes = [1 + (i * 7919) % 23 for i in range(200)]
    made: list[int] = []

    def write(n: int) -> Problem:
        made.append(n)
        return Problem("needle", "", "", {"size": 30 + sum(sizes[:n])})

    for most in range(10, 1500):
        found = needle.fit(write, lambda problem: [0] * problem.data["size"], most)
        fits = [size for n in range(1, 200) if (size := 30 + sum(sizes[:n])) <= most]
        assert (found and found.data["size"]) == (max(fits) if fits else None)
    assert len(made) < 12 * 1500  # a look at a few numbers, not at all of them


def test_depth_0_is_the_beginning_and_depth_1_the_end(tokenizer: Tokenizer, essay: Path) -> None:
    for task, joint in (("niah:1", "\n"), (f"niah:2:{essay}", " ")):
        engine = Seeker(tokenizer)
        measure(engine, task, problems=2, lengths=[512], depths=[0, 1])
        first, last = (text.split("\n", 1)[1].rpartition("\nWhat is the special magic")[0] for text in engine.texts)
        assert first.startswith("One of the special magic numbers") and joint in first
        assert re.search(r"One of the special magic numbers for \S+ is: \d{7}\.$", last) and not last.startswith("One")


def test_cells_of_one_that_finds_all_none_or_what_is_late(tokenizer: Tokenizer) -> None:
    lengths = [256, 512, 1024]
    found = measure(Seeker(tokenizer), problems=60)
    assert [(c["length"], c["depth"]) for c in found["cells"]] == [(n, d) for n in lengths for d in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all((c["recall"], c["ruler"], c["n"]) == (1.0, 1.0, 4) for c in found["cells"])
    assert (found["score"], found["ruler_score"], found["n"], found["left_out"], found["text"]) == (1.0, 1.0, 60, {}, None)
    assert len(set(found["keys"])) == 60
    found = measure(Seeker(tokenizer, 1), problems=60)
    assert found["score"] == found["ruler_score"] == 0.0 and 0 < found["high"] < 0.1
    found = measure(Seeker(tokenizer, 600), problems=60)
    assert [c["recall"] for c in found["cells"]] == [1.0] * 10 + [0.0, 0.0, 1.0, 1.0, 1.0]
    assert found["values"] == [1.0] * 40 + [0.0] * 8 + [1.0] * 12 and found["score"] == 52 / 60


def test_rulers_score_takes_a_value_inside_others_and_ours_does_not(tokenizer: Tokenizer) -> None:
    found = measure(Seeker(tokenizer, form=" one of 7654321 and {}8"), lengths=[512])
    assert (found["score"], found["ruler_score"]) == (0.0, 1.0) and {c["ruler"] for c in found["cells"]} == {1.0}


@pytest.mark.parametrize("said", ["1234567", "The number is 1234567.", "**1234567**!", "calm-boat: 1234567, that is 1234567."])
def test_a_free_answer_that_names_the_number_is_right(said: str) -> None:
    assert niah.only(CALM, said)


@pytest.mark.parametrize("said", ["", "none", "7654321 or 1234567", "12345678", "1,234,567", "-1234567", "1234567 2"])
def test_a_free_answer_with_another_number_is_wrong(said: str) -> None:
    assert not niah.only(CALM, said)


def test_the_needle_stands_once_and_only_between_sentences(tokenizer: Tokenizer, essay: Path) -> None:
    engine = Seeker(tokenizer)
    found = measure(engine, f"niah:2:{essay}", problems=33, lengths=[256, 400, 700], depths=[i / 10 for i in range(11)])
    assert len(engine.texts) == 33 and found["score"] == 1.0
    for text in engine.texts:
        haystack = text.split("\n")[1]
        before, hidden, after = re.split(r"(One of the special magic numbers for [a-z-]+ is: \d{7}\.)", haystack)
        parts = [part.strip() for part in (before, after) if part.strip()]
        count, around = 0, [SENTENCES[i % 9] for i in range(200)]
        for part in parts:  # each side is whole sentences, and the second goes on where the first ended
            n = next(n for n in range(1, 100) if len(" ".join(around[count : count + n])) >= len(part))
            assert part == " ".join(around[count : count + n])
            count += n
        assert hidden and text.count("One of the special magic") == 1


def test_a_text_that_is_too_short_is_repeated_and_that_is_said(tokenizer: Tokenizer, essay: Path, tmp_path: Path) -> None:
    found = measure(Seeker(tokenizer), f"niah:2:{essay}", lengths=[160, 1024])
    assert found["text"]["repeated"] == [1024] and found["text"]["sentences"] == 9 and len(found["text"]["sha256"]) == 64
    (tmp_path / "long.txt").write_text("\n".join(f"Sentence number {i} of a long text. " for i in range(500)))
    assert measure(Seeker(tokenizer), f"niah:2:{tmp_path / 'long.txt'}")["text"]["repeated"] == []


def test_sentences_end_at_their_marks_and_at_blank_lines() -> None:
    assert niah.sentences(TEXT) == SENTENCES
    assert niah.sentences(" \n\n ") == []


def test_values_are_uuids(tokenizer: Tokenizer, essay: Path) -> None:
    engine = Seeker(tokenizer, form=" {}.")
    found = measure(engine, f"niah:3:{essay}", max_tokens=40, lengths=[512], problems=10)
    values = [re.search(r"is: (\S+)\.", text)[1] for text in engine.texts]  # type: ignore[index]
    assert found["score"] == 1.0 and len(set(values)) == 10 and all(uuid.UUID(value).version == 4 for value in values)
    assert all(str(uuid.UUID(value)) == value for value in values)


def test_lengths_that_do_not_fit_are_left_out_and_said(tokenizer: Tokenizer) -> None:
    engine = Seeker(tokenizer, positions=600)
    found = measure(engine, lengths=[64, 512, 4096])
    assert {c["length"] for c in found["cells"]} == {512} and set(found["left_out"]) == {"64", "4096"}
    assert "no room for a haystack" in found["left_out"]["64"] and "600 tokens" in found["left_out"]["4096"]
    nothing = measure(engine, lengths=[64])
    assert (nothing["score"], nothing["n"], nothing["cells"], nothing["values"]) == (None, 0, [], []) and niah.draw(nothing) is None


def test_the_lengths_are_powers_of_two_up_to_the_models(tokenizer: Tokenizer) -> None:
    assert {c["length"] for c in measure(Seeker(tokenizer, positions=700))["cells"]} == {256, 512}
    assert measure(Seeker(tokenizer, positions=200))["cells"] == []


def test_needles_are_the_held_out_side_and_those_of_a_cell_do_not_depend_on_others(tokenizer: Tokenizer) -> None:
    one, all_ = Seeker(tokenizer), Seeker(tokenizer)
    found, whole = measure(one, problems=10, lengths=[512]), measure(all_, problems=30)
    assert set(found["keys"]) == {key for key in whole["keys"] if key.startswith("niah:1 512 ")} and set(one.texts) <= set(all_.texts)
    assert measure(Seeker(tokenizer), problems=30) == whole
    assert all(puzzles.held_out(key.split(" ", 3)[3]) for key in whole["keys"])
    other = niah.niah(Seeker(tokenizer), Plan(task="niah:1", problems=30, seed=5, max_tokens=16), lambda done, total: None)  # type: ignore[arg-type]
    assert not set(other["keys"]) & set(whole["keys"])


def test_progress_is_told_up_to_its_end(tokenizer: Tokenizer) -> None:
    told: list[tuple[int, int]] = []
    plan = Plan(task="niah:1", problems=30, max_tokens=16, dials={"plain": True})
    niah.niah(Seeker(tokenizer), plan, lambda done, total: told.append((done, total)))  # type: ignore[arg-type]
    assert told == [(10, 30), (20, 30), (30, 30)]


@pytest.mark.parametrize(
    ("task", "dials", "said"),
    [
        ("niah:4", {}, "niah:1, niah:2:FILE or niah:3:FILE"), ("niah:", {}, "niah:2:FILE"), ("niah:2", {}, "niah:2:FILE"),
        ("niah:1:x.txt", {}, "niah:2:FILE"), ("niah:2:/nowhere/a.txt", {}, "cannot be read"), ("niah:1", {"depths": [1.5]}, "depths"),
        ("niah:1", {"depths": []}, "depths"), ("niah:1", {"lengths": ["256"]}, "lengths"), ("niah:1", {"depth": [0]}, "depths"),
        ("niah:1", {"plain": True, "prefix": False}, "plain"),
    ],
)  # fmt: skip
def test_a_wrong_task_is_refused_in_a_sentence(tokenizer: Tokenizer, task: str, dials: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        niah.niah(Seeker(tokenizer), Plan(task=task, dials=dials), lambda done, total: None)  # type: ignore[arg-type]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(BadInput, match="holds no text"):
        niah.haystack(f"2:{tmp_path / 'empty.txt'}")


def test_a_real_engine_answers_in_all_three_ways(tokenizer: Tokenizer) -> None:
    engine = Engine(tiny.talker(tokenizer), tokenizer, device="cpu")
    for dials in ({"plain": True}, {}, {"prefix": False}):
        plan = Plan(task="niah:1", problems=4, max_tokens=24, dials={"lengths": [512], "depths": [0, 1], **dials})
        found = niah.niah(engine, plan, lambda done, total: None)
        assert (found["score"], found["n"]) == (0.0, 4)


def test_the_heat_map_has_a_number_a_cell_and_none_where_nothing_was_measured() -> None:
    cells = [{"length": n, "depth": d, "recall": (n + d) / 20_000, "n": 8} for n in (256, 1024, 16384) for d in (0.0, 0.5, 1.0)]
    svg = niah.draw({"cells": cells[:-1]})
    assert svg is not None and svg.startswith("<svg")
    texts = [re.sub(r"<[^>]+>", "", text).strip() for text in re.findall(r"<text.*?</text>", svg, re.DOTALL)]
    assert [texts.count(said) for said in ("1", "5", "82")] == [4, 3, 2] and {"256", "1,024", "16k"} <= set(texts)  # depth 1 says "1" too
    assert "length in tokens (8 a cell)" in texts and "depth of the needle" in texts
    pairs = plots.heat_map([{"length": 64, "pairs": 4, "recall": None, "n": 1}, {"length": 64, "pairs": 8, "recall": 0.5, "n": 1}], "Pairs")
    assert pairs is not None and "pairs of key and value" in pairs
    assert plots.heat_map([], "Nothing") is None


def test_the_beginning_is_at_the_top_and_short_lengths_on_the_left() -> None:
    cells = [{"length": 256, "depth": 1.0, "recall": 1.0, "n": 8}, {"length": 512, "depth": 0.0, "recall": 0.33, "n": 8}]
    svg = niah.draw({"cells": [*cells, {"length": 256, "depth": 0.0, "recall": 0.22, "n": 8}]})
    x, y = ({n: float(re.search(rf' {axis}="([0-9.]+)"[^>]*>{n}<', svg)[1]) for n in (22, 33, 100)} for axis in "xy")  # type: ignore[arg-type, index]
    assert x[22] == x[100] < x[33] and y[22] == y[33] < y[100]
    opacity = [float(said) for said in re.findall(r"var\(--blue\); opacity: ([0-9.]+)", svg)]  # type: ignore[arg-type]
    assert len(opacity) == 3 and opacity == sorted(opacity) and max(opacity) == 0.5
