"""The stage `reject`: answers sampled from a model of the chain, and the right ones of them, to learn from.

Rejection sampling as in DeepSeek-R1 (arXiv 2501.12948v1, section 2.3.3): several answers a problem, of which the right ones are kept. Easy
problems have most of these, so no band of solve rates may have more than an equal share of them (the trouble that DART-Math names, arXiv
2407.13690, which draws until every problem has as many). What is kept is counted and told in post/reject_card.py.
"""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pascaline.data.puzzles import Problem, Verdict
from pascaline.data.puzzles.families import Family
from pascaline.data.turns import episode_ids
from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput
from pascaline.ledger import COST, Totals
from pascaline.model import hf
from pascaline.post import environments, reject_card
from pascaline.post.environments import episode
from pascaline.post.environments.episode import Episode
from pascaline.post.reward import RewardModel
from pascaline.post.stage import Run
from pascaline.post.verifiers import closed, scores
from pascaline.post.verifiers.base import RIGHT
from pascaline.runs import read_json, write_atomic, write_json
from pascaline.stopping import Interrupt
from pascaline.tables import Puzzle, Reject
from pascaline.tokenizer import Tokenizer
from pascaline.train.loop import forward_flops

PART = 512  # answers sampled at a time, about: what a stopped stage may have to do again
BANDS = 4  # of solve rates: up to 25 %, 50 %, 75 % and 100 %
REDRAWS = (1, 2, 4, 8)  # times as many problems are drawn to find enough different ones
UNREADABLE = "\ufffd"  # bytes that are no text: they would be encoded as something else than what was sampled
BROKEN = 0.1  # share of answers without a verdict above which it is said on screen


@dataclass
class Answer:
    """One sampled answer. cut: by max_tokens; closed: there is an answer behind the thought. Of a right one, exact: its text encodes to
    the sampled tokens again; refused: the check that it fails; score: the reward model's, if there is one. Of an episode, prompt and turns:
    all its messages."""

    thought: str | None
    text: str
    verdict: str
    tokens: int
    cut: bool
    closed: bool
    exact: bool = False
    refused: str = ""
    score: float | None = None
    prompt: list[dict[str, Any]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def normal(self) -> tuple[str, ...]:
        """Answers and thoughts up to white space."""
        parts = [part for m in reversed(self.messages) for part in (m["content"], m.get("reasoning_content", ""))]
        return tuple(" ".join(part.split()) for part in parts)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What follows the prompt."""
        thought = {} if self.thought is None else {"reasoning_content": self.thought}
        return self.turns or [{"role": "assistant", **thought, "content": self.text}]


@dataclass
class Group:
    """A problem and the answers to it."""

    problem: Problem
    answers: list[Answer]

    def count(self, verdict: Verdict) -> int:
        return sum(a.verdict == verdict for a in self.answers)

    @property
    def rate(self) -> float:
        """Share of right answers among those that could be judged."""
        return self.count(Verdict.RIGHT) / max(len(self.answers) - self.count(Verdict.UNJUDGED), 1)

    @property
    def band(self) -> int:
        """0 for a problem that was never solved, else which of the bands its solve rate lies in, from 1."""
        judged = max(len(self.answers) - self.count(Verdict.UNJUDGED), 1)
        return -(-BANDS * self.count(Verdict.RIGHT) // judged)


def reject(run: Run, name: str) -> dict[str, Any]:
    """chats.jsonl: accepted answers; pairs.jsonl: a right and a wrong answer of the same problem; card.md and reject.json: how it came to
    them. BadInput if no answer was accepted."""
    stage: Reject = getattr(run.recipe, name)
    problems = drawn(name, stage, run.recipe.puzzles, run.recipe.seed)
    groups, stands, trouble = _sampled(run, name, stage, problems)
    distinct = [_distinct(a for a in g.answers if a.verdict == Verdict.RIGHT and not a.refused) for g in groups]
    accepted = [sorted(answers, key=_score, reverse=True)[: stage.keep] for answers in distinct]  # without scores as they came
    kept = balanced(accepted, [g.band for g in groups]) if stage.balance else accepted
    pairs = _pairs(groups, accepted)
    origin = run.recipe.before(name) or run.recipe.start
    facts = {"model": origin, "seed": run.recipe.seed, "asked": stage.prompts, **stage.model_dump(exclude={"start", "prompts", "puzzles"}),
             **reject_card.facts(groups, distinct, accepted, kept), "pairs": len(pairs), "sampled_tokens": stands.tokens,
             "trouble": trouble}  # fmt: skip
    if not facts["kept"]:
        raise BadInput(_nothing(name, stage, facts))
    folder = run.folder(name)
    acting = run.recipe.environment(name)
    stops = {"stops": environments.stops(acting)} if acting else {}
    chats = [
        {**_chat(g, a), **stops, "puzzle": g.problem.puzzle, "key": g.problem.key, "rate": g.rate}
        for g, answers in zip(groups, kept, strict=True)
        for a in answers
    ]
    for file, rows in (("chats.jsonl", chats), ("pairs.jsonl", [pair | stops for pair in pairs])):
        write_atomic(folder / file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder / "reject.json", facts)
    write_atomic(folder / "card.md", reject_card.card(name, facts))
    return {"tokens": stands.tokens, "chats": len(chats), "pairs": len(pairs)}


def drawn(name: str, stage: Reject, tables: dict[str, Puzzle], seed: int) -> list[Problem]:
    """The stage's problems, spread evenly over its puzzles and mixed, each once, of the training side of the split; fewer where a puzzle
    has no more."""
    found: list[Problem] = []
    seen: set[str] = set()
    for i, puzzle in enumerate(stage.puzzles):
        share = stage.prompts // len(stage.puzzles) + (i < stage.prompts % len(stage.puzzles))
        own_seed = random.Random(f"{name} {seed} {puzzle}").getrandbits(48)
        own: dict[str, Problem] = {}
        for times in REDRAWS:
            for problem in Family(puzzle, tables[puzzle]).problems(times * share, own_seed, held_out=False):
                text = " ".join(problem.prompt.split())
                if problem.key not in own and text not in seen and len(own) < share:
                    own[problem.key] = problem
                    seen.add(text)
            if len(own) == share:
                break
        found += own.values()
    random.Random(f"{name} {seed} order").shuffle(found)  # so that each part, and each band, has of every puzzle
    return found


def balanced(accepted: list[list[Answer]], bands: list[int]) -> list[list[Answer]]:
    """The answers that stay when no band may have more than an equal share of all: first one of every problem, then a second."""
    there = Counter(band for band, answers in zip(bands, accepted, strict=True) for _ in answers)
    room = dict.fromkeys(there, -(-there.total() // max(len(there), 1)))
    kept: list[list[Answer]] = [[] for _ in accepted]
    for turn in range(max(map(len, accepted), default=0)):
        for own, band, answers in zip(kept, bands, accepted, strict=True):
            if turn < len(answers) and room[band]:
                own.append(answers[turn])
                room[band] -= 1
    return kept


def _sampled(run: Run, name: str, stage: Reject, problems: list[Problem]) -> tuple[list[Group], Totals, str]:
    """The answers, what they have cost over all attempts, and why the first without a verdict has none. Each part is kept in parts/."""
    size = max(PART // stage.samples, 1)
    parts = [problems[i : i + size] for i in range(0, len(problems), size)]
    groups: list[Group] = []
    spent, stands, trouble = Totals(), Totals(), ""
    engine, scorer = None, None
    if run.attempt:
        run.attempt.follow(lambda: (spent, stands))
    with run.progress(name, len(parts), "part") as progress, Interrupt() as interrupt:
        for i, part in enumerate(parts):
            path = run.folder(name) / "parts" / f"{i:03d}.json"
            if (found := read_json(path)) is None:
                if engine is None:
                    engine, scorer = _models(run, name, stage)
                seed = random.Random(f"{name} {run.recipe.seed} {i}").getrandbits(48)
                found = _part(engine, scorer, stage, part, seed, run.recipe.environment(name))
                spent.add(*(found[key] for key in COST))
                write_json(path, found)
                found = read_json(path) or {}  # as one that goes on reads it
            stands.add(*(found[key] for key in COST))
            groups += [Group(p, [Answer(**a) for a in row]) for p, row in zip(part, found["answers"], strict=True)]
            trouble = trouble or found["trouble"]
            answers = [a for g in groups for a in g.answers]
            right = sum(a.verdict == Verdict.RIGHT and not a.refused for a in answers)
            progress.update(i + 1, accepted=right / len(answers), answers=len(answers))
            if interrupt.requested:
                raise interrupt.stopped(f"stopped after part {i + 1} of {len(parts)} of {name}")
        blind = sum(g.count(Verdict.UNJUDGED) for g in groups) / max(sum(len(g.answers) for g in groups), 1)
        if blind > BROKEN:
            progress.note(f"{blind:.0%} of the answers could not be judged ({trouble}); they are left out")
    return groups, stands, trouble


def _models(run: Run, name: str, stage: Reject) -> tuple[Engine, RewardModel | None]:
    engine = Engine(hf.load(run.origin(name), run.dtype, run.device), run.tokenizer())
    if not stage.reward:
        return engine, None
    return engine, RewardModel.load(run.folder(stage.reward), run.dtype, run.device)


def _part(
    engine: Engine, scorer: RewardModel | None, stage: Reject, problems: list[Problem], seed: int, acting: str = ""
) -> dict[str, Any]:
    before, began = engine.stats.generated + engine.stats.prefilled, time.perf_counter()
    sampling = Sampling(stage.temperature, stage.top_p, stage.max_tokens, stage.samples, seed=seed)
    if acting:
        outputs = episode.play(engine, environments.get(acting), problems, sampling)
    else:
        outputs = engine.generate([p.prompt for p in problems], sampling)
    engine.release()  # a part has the same bits whether others came before it or not
    judged = episode.judge(problems, outputs)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    stops = environments.stops(acting) if acting else []
    answers = [
        [_answer(tokenizer, p.prompt, o, v, stops) for o, v in zip(group, row, strict=True)]
        for p, group, row in zip(problems, outputs, judged.verdicts, strict=True)
    ]
    flat = list(zip(
        [p for p, group in zip(problems, outputs, strict=True) for _ in group],
        [o for group in outputs for o in group],
        [a for row in answers for a in row],
        strict=True,
    ))  # fmt: skip
    trouble = judged.trouble
    for check in stage.checks:
        trouble = _check(check, [item for item in flat if _stands(item[2])]) or trouble
    good = [item for item in flat if _stands(item[2])]
    read = 0.0
    if scorer and good:
        chats = [episode.whole(tokenizer.prompt_ids(p.prompt), o) for p, o, _ in good]
        given, read = scorer.scores(chats), forward_flops(scorer.model, sum(map(len, chats)))
        for (_, _, answer), value in zip(good, given, strict=True):
            answer.score = float(value)
    tokens = engine.stats.generated + engine.stats.prefilled - before
    spent = (time.perf_counter() - began, tokens, forward_flops(engine.model, tokens) + read)
    return {"answers": [[asdict(a) for a in row] for row in answers], "trouble": trouble, **dict(zip(COST, spent, strict=True))}


def _answer(tokenizer: Tokenizer, prompt: str, output: Output, verdict: Verdict, stops: list[str]) -> Answer:
    said, thought = output.text, output.reasoning
    answer = Answer(thought, said, verdict.value, len(output.token_ids), output.finish_reason == "length", closed(output))
    if isinstance(output, Episode):
        answer.prompt, answer.turns = output.prompt, output.messages
    if verdict is Verdict.RIGHT:
        opened = answer.prompt or [{"role": "user", "content": prompt}]
        again, _ = episode_ids(tokenizer, opened, answer.messages, stops)
        answer.exact = again == episode.whole(tokenizer.prompt_ids(opened), output)
        answer.refused = "unreadable" if any(UNREADABLE in part for part in answer.normal) else ""
    return answer


def _score(answer: Answer) -> float:
    return -math.inf if answer.score is None else answer.score


def _stands(answer: Answer) -> bool:
    return answer.verdict == Verdict.RIGHT and not answer.refused


def _check(check: str, items: list[tuple[Problem, Output, Answer]]) -> str:
    """Refuse the answers that a verifier does not call right; why it could not judge the first such ("" if it could)."""
    found, trouble = scores(check, [p for p, _, _ in items], [o for _, o, _ in items])
    for (_, _, answer), value in zip(items, found, strict=True):
        if value is None:
            answer.verdict = Verdict.UNJUDGED.value
        elif value < RIGHT:
            answer.refused = check
    return trouble


def _distinct(answers: Iterable[Answer]) -> list[Answer]:
    """The first of those that are equal up to white space."""
    first: dict[tuple[str, ...], Answer] = {}
    for answer in answers:
        first.setdefault(answer.normal, answer)
    return list(first.values())


def _pairs(groups: list[Group], accepted: list[list[Answer]]) -> list[dict[str, Any]]:
    """A right and a wrong answer of the same problem, each answer once; what was cut off is no answer, and who gives up claims nothing."""
    return [
        {"prompt": _opened(group, right), "chosen": right.messages, "rejected": wrong.messages}
        for group, answers in zip(groups, accepted, strict=True)
        for right, wrong in zip(
            answers, _distinct(a for a in group.answers if a.verdict == Verdict.WRONG and a.closed and not a.cut), strict=False
        )
        if right.prompt == wrong.prompt  # an environment may have opened two episodes differently
    ]


def _opened(group: Group, answer: Answer) -> list[dict[str, Any]]:
    return answer.prompt or [{"role": "user", "content": group.problem.prompt}]


def _chat(group: Group, answer: Answer) -> dict[str, Any]:
    """The columns of a chat; where an environment's prompt has answers of its own, it is told apart from what was said."""
    prompt = _opened(group, answer)
    if any(m["role"] == "assistant" for m in prompt):
        return {"prompt": prompt, "completion": answer.messages}
    return {"messages": [*prompt, *answer.messages]}


def _nothing(name: str, stage: Reject, facts: dict[str, Any]) -> str:
    """Why nothing is left, and what to change."""
    counts = facts["answers"]
    told = ", ".join(f"{counts[key]} {word}" for key, word in reject_card.TOLD.items() if counts[key])
    if counts["unjudged"] > counts["wrong"]:
        advice = f"mend the verifier ({facts['trouble']})"
    elif counts["right"]:
        advice = f"{name}.checks asks for more than this model gives"
    elif 2 * counts["truncated"] > counts["sampled"]:
        advice = f"raise {name}.max_tokens ({stage.max_tokens})"
    else:
        advice = f"train {facts['model']} longer, start {name} from a better stage, raise {name}.samples, or turn the puzzles' dials down"
    return f"{name}: none of the {counts['sampled']} answers of {facts['model']} was accepted ({told}); {advice}."
