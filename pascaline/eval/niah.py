"""Needle in a haystack over length and depth, after RULER (arXiv 2404.06654; github.com/NVIDIA/RULER), as a task of a suite.

`niah:1` is RULER's S-NIAH-1: a word and its seven-digit number in a repeated refrain. `niah:2:FILE` is S-NIAH-2 and `niah:3:FILE`
S-NIAH-3 (the value is a UUID), in the sentences of a text of your own where RULER has Paul Graham's essays. Prompt, needle, question,
answer prefix and greedy answers of at most 128 tokens are RULER's. Not RULER's: the depths are a grid and not drawn, the words are those
of data/puzzles/needle.py, a text ends with a whole sentence, and the score is strict; RULER's own stands beside it.
"""

import hashlib
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem
from pascaline.data.puzzles import needle as puzzle
from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput, describe_validation
from pascaline.eval import needle, plots
from pascaline.eval.plan import Plan, measured
from pascaline.post.verifiers import closed
from pascaline.tables import Table
from pascaline.tokenizer import THINK, Tokenizer

SHORTEST = 256  # tokens, where no lengths are given
ANSWER_TOKENS = 128  # RULER's tokens_to_generate
# A sentence ends with its mark and what closes a quotation, before a blank and no small letter; or with a blank line.
BORDER = re.compile(r"""(?<=[.!?])\s+(?![a-z])|(?<=[.!?]["”’')\]])\s+(?![a-z])|(?<=[。！？])\s*|\n\s*\n""")


class Dials(Table):
    """lengths: tokens of prompt and answer together; none: the powers of two from 256 that the model has positions for. depths: where
    the needle stands, 0 at the beginning. plain: the prompt as a text to be continued, for a base model. prefix: the answer begins with
    RULER's prefix, and there is no thought; without it the model says, and thinks, what it likes."""

    lengths: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field([*needle.DEPTHS], min_length=1)
    plain: bool = False
    prefix: bool = True


@dataclass(frozen=True)
class Haystack:
    """Parts, which begin anew where they are used up, and how they are joined; kind: of the needle's value. told: of the text it is from,
    for the measurement."""

    parts: Sequence[str]
    joint: str
    kind: str
    told: dict[str, Any]

    def write(self, problem: Problem, count: int, before: int) -> Problem:
        """The needle of `problem` after `before` of the first `count` parts."""
        key, value = problem.data["key"], problem.data["value"]
        parts = (list(self.parts) * -(-count // len(self.parts)))[:count]
        data = {"key": key, "value": value, "kind": self.kind, "parts": count, "before": before}
        return Problem("needle", puzzle.hide(key, value, parts, before, self.joint, self.kind), problem.key, data)


def niah(engine: Engine, plan: Plan, watch: Callable[[int, int], None]) -> dict[str, Any]:
    """Recall of max(1, plan.problems // cells) needles in each cell of lengths x depths.

    Strict: after the prefix the value comes first and alone; without it the answer names the value and no other number. Beside it
    ruler_score: the value occurs in the answer (string_match_all). Lengths without room for a haystack are left_out, and why. Answers
    have plan.max_tokens, with the prefix at most 128, which a length counts; they are greedy, but without the prefix plan's sampling
    holds.
    """
    own = engine.tokenizer
    if own is None:
        raise BadInput(f"'{plan.task}' counts lengths in tokens, and this engine has no tokenizer.")
    dials, hay = _dials(plan), haystack(plan.argument)
    positions = min(engine.model.config.max_position_embeddings, engine.capacity)
    wanted = sorted(set(dials.lengths)) or [SHORTEST << i for i in range(40) if SHORTEST << i <= positions]
    lengths, depths = [length for length in wanted if length <= positions], sorted(set(dials.depths))
    left_out = {str(length): f"model and cache hold {positions:,} tokens" for length in wanted if length > positions}
    each = max(1, plan.problems // max(1, len(lengths) * len(depths)))
    ask, sampling = asker(own, plan.system, dials), _sampling(plan, dials)
    values, keys, ruler, cells = list[float](), list[str](), list[float](), list[dict[str, Any]]()
    repeated, unclosed = list[int](), 0
    for done, length in enumerate(lengths):
        drawn = [(depth, problem) for depth in depths for problem in needles(plan.seed, length, depth, each, hay.kind)]
        written = [fill(problem, hay, ask, length - sampling.max_tokens, depth) for depth, problem in drawn]
        problems = [problem for problem in written if problem is not None]
        if len(problems) < len(written):
            left_out[str(length)] = f"no room for a haystack beside {sampling.max_tokens} tokens of answer"
        else:
            outputs = engine.generate([ask(problem) for problem in problems], sampling)
            strict, loose = ([_share(judge, *pair) for pair in zip(problems, outputs, strict=True)] for judge in _judges(dials))
            values, ruler = values + strict, ruler + loose
            keys += [f"{plan.task} {length} {depth:g} {problem.key}" for depth, problem in drawn]
            cells += _cells(length, depths, strict, loose)
            repeated += [length] * any(problem.data["parts"] > len(hay.parts) for problem in problems)
            unclosed += sum(not closed(output) for group in outputs for output in group)
        watch((done + 1) * len(depths) * each, len(lengths) * len(depths) * each)
    told = {**hay.told, "repeated": repeated} if hay.told else None  # a refrain is repeated by its nature
    way = "plain" if dials.plain else "chat with prefix" if dials.prefix else "chat"
    return measured(
        values, keys, cells=cells, ruler_score=sum(ruler) / len(ruler) if ruler else None, left_out=left_out, way=way,
        answer_tokens=sampling.max_tokens, unclosed=unclosed, text=told,
    )  # fmt: skip


def haystack(argument: str) -> Haystack:
    """What stands behind `niah:`. BadInput for another number than 1, 2 and 3, and for a file that is missing or holds no text."""
    number, _, file = argument.partition(":")
    if number == "1" and not file:
        return Haystack([puzzle.REFRAIN], "\n", "number", {})
    if number not in ("2", "3") or not file:
        raise BadInput(f"'niah:{argument}' must be niah:1, niah:2:FILE or niah:3:FILE, where FILE is a text to hide the needles in.")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"'niah:{argument}': the file cannot be read as UTF-8 text: {error}") from error
    parts = sentences(text)
    if not parts:
        raise BadInput(f"'niah:{argument}': {file} holds no text; name one with sentences to hide the needles between.")
    told = {"file": file, "sha256": hashlib.sha256(text.encode()).hexdigest(), "sentences": len(parts)}
    return Haystack(parts, " ", "number" if number == "2" else "uuid", told)


def sentences(text: str) -> list[str]:
    """The sentences of a text in their order; as RULER does, any white space in them becomes one blank."""
    return [sentence for part in BORDER.split(text) if (sentence := " ".join(part.split()))]


def needles(seed: int, length: int, depth: float, count: int, kind: str) -> list[Problem]:
    """Held-out needles of one cell, the same whatever other cells there are; more of them begin like fewer."""
    drawn = puzzles.problems("needle", count, seed + 2000 * length + round(1000 * depth), held_out=True)
    if kind == "uuid":
        for problem in drawn:
            bits = random.Random(f"{seed} {problem.key}").getrandbits(128)
            problem.data["value"] = str(uuid.UUID(int=bits, version=4))
    return drawn


def fill(problem: Problem, hay: Haystack, ask: Callable[[Problem], list[int]], most: int, depth: float) -> Problem | None:
    """The needle in as many parts of the haystack as make a prompt of at most `most` tokens; None if not even one fits."""
    return needle.fit(lambda count: hay.write(problem, count, round(depth * count)), ask, most)


def asker(own: Tokenizer, system: str, dials: Dials) -> Callable[[Problem], list[int]]:
    """From a problem to the prompt's token ids, which end where the answer begins."""

    def plain(problem: Problem) -> list[int]:
        return [*own.prefix, *own.encode(f"{problem.prompt} {puzzle.opening(problem)}")]

    def chat(problem: Problem) -> list[int]:
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": problem.prompt}]
        ids = own.prompt_ids(messages, thinking=not dials.prefix)
        if not dials.prefix:
            return ids
        if own.tags(ids)[0] == THINK:
            raise BadInput("this model's chat template opens every answer with a thought, where no prefix can stand; set prefix = false.")
        return [*ids, *own.encode(f" {puzzle.opening(problem)}")]

    return plain if dials.plain else chat


def only(problem: Problem, answer: str) -> bool:
    """Whether the answer names the value, and no other word with a digit in it."""
    said = {word.rstrip(".,-") for word in re.findall(r"[\w.,-]*[0-9][\w.,-]*", answer)}
    return said == {problem.data["value"]}


def draw(measurement: dict[str, Any], title: str = "Needles found") -> str | None:
    """The heat map of a measurement of `niah` or `mqar` as <svg> text; None where nothing was measured."""
    return plots.heat_map(measurement["cells"], title)


def _ruler(problem: Problem, answer: str) -> bool:
    return problem.data["value"].lower() in answer.lower()


def _judges(dials: Dials) -> tuple[Callable[[Problem, str], bool], Callable[[Problem, str], bool]]:
    return (needle.score if dials.prefix else only), _ruler


def _share(judge: Callable[[Problem, str], bool], problem: Problem, outputs: Sequence[Output]) -> float:
    return sum(judge(problem, output.text) for output in outputs) / len(outputs)


def _cells(length: int, depths: Sequence[float], strict: Sequence[float], ruler: Sequence[float]) -> list[dict[str, Any]]:
    each = len(strict) // len(depths)
    parts = [(depth, slice(i * each, (i + 1) * each)) for i, depth in enumerate(depths)]
    return [{"length": length, "depth": depth, **needle.mean(strict[at]), "ruler": sum(ruler[at]) / each} for depth, at in parts]


def _dials(plan: Plan) -> Dials:
    try:
        dials = Dials.model_validate(plan.dials)
    except ValidationError as error:
        raise BadInput(describe_validation(error, f"dials of '{plan.task}'", Dials.model_fields)) from None
    if (dials.plain or plan.plain) and not (dials.prefix and not plan.system):
        raise BadInput(f"'{plan.task}': plain = true goes with the prefix and without a system message; drop one or the other.")
    return dials.model_copy(update={"plain": dials.plain or plan.plain})


def _sampling(plan: Plan, dials: Dials) -> Sampling:
    if dials.prefix:
        return Sampling(temperature=0.0, max_tokens=min(plan.max_tokens, ANSWER_TOKENS))
    return Sampling(temperature=plan.temperature, top_p=plan.top_p, max_tokens=plan.max_tokens, n=plan.samples, seed=plan.seed)
