"""The last stage: every model of the chain on the same held-out problems, and the report of the whole run."""

import time
from collections.abc import Callable
from functools import cache, partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch

from pascaline.data.puzzles import Problem
from pascaline.data.puzzles import plain as written
from pascaline.engine import Engine, Sampling
from pascaline.eval import passk, tasks
from pascaline.eval.questions import read_plain
from pascaline.ledger import COST, Totals, cost
from pascaline.model import hf
from pascaline.post import environments, extension, grading, stagetable
from pascaline.post.environments import episode
from pascaline.post.reward import RewardModel
from pascaline.post.stage import Run
from pascaline.post.verifiers import judge
from pascaline.recipe import Recipe
from pascaline.runs import machine, read_json, versions, write_json
from pascaline.stopping import Interrupt
from pascaline.tables import kind
from pascaline.train.loop import forward_flops

VOTES = (1, 2, 4, 8, 16, 32)
EXAMPLES = 3
START = "start"
SEED = 1_000_003  # of the evaluation problems: one set for every run, so that runs can be compared


def evaluate(run: Run, name: str) -> dict[str, Any]:
    """Measure the base model and every one that answers chats under several protocols; each piece is kept in parts/, so that an
    interrupted evaluation goes on."""
    plan = run.recipe.eval
    problems = tasks.held_out(plan.puzzles, run.recipe.puzzles, plan.problems, SEED)
    main = problems[plan.puzzles[0]]
    # R1's protocol is the headline; temperature 1 and greedy stand beside it unless the recipe's own temperature is one of them.
    protocols = [(plan.temperature, plan.top_p, plan.samples)]
    protocols += [(t, 1.0, 1) for t in (1.0, 0.0) if t != plan.temperature]
    pieces: list[tuple[str, str, Callable[[Engine], dict[str, Any]]]] = []

    def piece(model: str, name: str, work: Callable[[Engine], dict[str, Any]]) -> None:
        pieces.append((model, f"{model}.{name}", work))  # a stage may be called rl-chain, and a puzzle chain

    def sampling(temperature: float, top_p: float, samples: int, seed: int = SEED) -> Sampling:
        return Sampling(temperature, top_p, plan.max_tokens, samples, seed=seed)

    base = _base(run.recipe)  # of our own, it reads plain text: it meets chat tokens only in sft
    asked_once = sampling(plan.temperature, plan.top_p, 1 if base != START else plan.samples)
    piece(base, "plain", partial(_protocol, problems=main, sampling=asked_once, how=How(plain=base != START)))
    judge = cache(partial(stagetable.judge, run))  # loaded once, when it is asked for
    grader = grading.Grader(lambda: _engine(run, plan.grader), plan.max_tokens) if plan.grader else None
    for model in run.recipe.talkers:
        how = How(run.recipe.plain(model), run.recipe.environment(model))
        for protocol in protocols:
            piece(model, f"t{protocol[0]:g}", partial(_protocol, problems=main, sampling=sampling(*protocol), how=how))
        for other in plan.puzzles[1:]:
            piece(model, other, partial(_protocol, problems=problems[other], sampling=sampling(plan.temperature, plan.top_p, 1), how=how))
        voting = sampling(plan.temperature, plan.top_p, plan.votes, SEED + 1)
        for i, puzzle in enumerate(plan.puzzles):
            own = grader if puzzle in run.recipe.graded and not how.acting else None  # an episode is no attempt that a grader has learnt
            votes = partial(_votes, judge=judge, problems=problems[puzzle][: plan.vote_problems], sampling=voting, grader=own, how=how)
            piece(model, f"{puzzle}-votes" if i else "votes", votes)
    attempts = tasks.held_out(run.recipe.attempts, run.recipe.puzzles, plan.problems, SEED)
    for model in run.recipe.graders:
        for puzzle, asked in attempts.items():
            piece(model, puzzle, partial(grading.measured, problems=asked, max_tokens=plan.max_tokens))
    return _work(run, pieces)


class How(NamedTuple):
    """In what way a model is asked: as a base model is, with plain text; or as episodes in the environment `acting`; else as chats."""

    plain: bool = False
    acting: str = ""


def _engine(run: Run, model: str) -> Engine:
    return Engine(hf.load(run.model(None if model == START else model), run.dtype, run.device), run.tokenizer())


def _base(recipe: Recipe) -> str:
    """The stage whose model the chain's first chats are taught to, START if that is the folder that the chain starts from."""
    return recipe.before(recipe.talkers[0]) or START


def compared(recipe: Recipe) -> tuple[str | None, str]:
    """The two models whose difference is the chain's gain: the first that answers, and the last that RL made of the same base, or else
    the last of all made of it. Where there is only one, the base before it, if that is asked in the same way."""
    first = recipe.talkers[0]
    line = [name for name in recipe.talkers if _root(recipe, name) == _root(recipe, first)]
    after = ([name for name in line if kind(name) == "rl"] or line)[-1]
    return (first if after != first else recipe.before(first) if recipe.plain(first) else None), after


def _root(recipe: Recipe, name: str) -> str:
    """The first model of the line that a stage's is made of; a student is of another line."""
    before = recipe.before(name)
    return _root(recipe, before) if before else name


def _work(run: Run, pieces: list[tuple[str, str, Callable[[Engine], dict[str, Any]]]]) -> dict[str, Any]:
    engine, loaded = None, ""
    spent, stands = Totals(), Totals()
    if run.attempt:
        run.attempt.follow(lambda: (spent, stands))
    with run.progress("eval", len(pieces), "part") as progress, Interrupt() as interrupt:
        for i, (model, name, work) in enumerate(pieces):
            path = run.folder("eval") / "parts" / f"{name}.json"
            found = read_json(path)
            if found is None:
                if loaded != model:
                    engine, loaded = _engine(run, model), model
                assert engine is not None
                before, began = computed(engine), time.perf_counter()
                found = work(engine)
                beside = found.pop("beside", {"tokens": 0, "flops": 0.0})  # what another engine had to do for it
                tokens = computed(engine) - before
                found["tokens"] = tokens + beside["tokens"]
                found["flops"] = forward_flops(engine.model, tokens) + beside["flops"] + found.pop("judge_flops", 0.0)
                found["seconds"] = time.perf_counter() - began
                spent.add(*(found[key] for key in COST))
                write_json(path, found)
            stands.add(*(found.get(key, 0) for key in COST))
            progress.update(i + 1, part=name, accuracy=found.get("accuracy"))
            if interrupt.requested:
                raise interrupt.stopped(f"stopped after part {i + 1} of {len(pieces)} of the evaluation")
    return {"tokens": stands.tokens}


def computed(engine: Engine) -> int:
    """Tokens so far, of prompts and of answers."""
    return engine.stats.generated + engine.stats.prefilled


def _asked(engine: Engine, problems: list[Problem], sampling: Sampling, how: How) -> tasks.Result:
    """The problems put to a model; of plain text counts what follows "Answer: "."""
    if how.acting:
        played = episode.play(engine, environments.get(how.acting), problems, sampling)
        found = episode.judge(problems, played)
        return tasks.Result(problems, played, found.verdicts, found.trouble)
    if not how.plain:
        return tasks.evaluate(engine, problems, sampling)
    own = engine.tokenizer
    assert own is not None
    outputs = engine.generate([written.prompt_ids(own, p.prompt) for p in problems], sampling)
    read = [[read_plain(output) for output in group] for group in outputs]
    judged = judge(problems, read)
    return tasks.Result(problems, read, judged.verdicts, judged.trouble)


def _protocol(engine: Engine, problems: list[Problem], sampling: Sampling, how: How) -> dict[str, Any]:
    result = _asked(engine, problems, sampling, how)
    examples = [
        {"prompt": p.prompt, "thought": episode.thoughts(o[0]), "answer": o[0].text, "verdict": v[0].value}
        for p, o, v in zip(problems[:EXAMPLES], result.outputs, result.verdicts, strict=False)
    ]
    asked = {"temperature": sampling.temperature, "top_p": sampling.top_p, "samples": sampling.n, "puzzle": problems[0].puzzle}
    called = {"calls": episode.calls(result.outputs)} if how.acting else {}
    return {**asked, **result.summary(), **called, "by_problem": result.means, "examples": examples}


def _votes(
    engine: Engine,
    judge: Callable[[], RewardModel | None],
    problems: list[Problem],
    sampling: Sampling,
    how: How,
    grader: grading.Grader | None,
) -> dict[str, Any]:
    result = _asked(engine, problems, sampling, how)
    counts = [k for k in VOTES if k <= sampling.n]
    majority, best = result.votes(counts)
    found = {
        "k": counts,
        "majority": majority,
        "best_of": best,
        "n": len(problems),
        **stagetable.measured(engine, result, judge()),
    }
    return {**found, **_graded(engine, result, how, grader, counts)} if grader else found


def _graded(engine: Engine, result: tasks.Result, how: How, grader: grading.Grader, counts: list[int]) -> dict[str, Any]:
    own = engine.tokenizer
    assert own is not None
    prompts = [len(written.prompt_ids(own, p.prompt) if how.plain else own.prompt_ids(p.prompt)) for p in result.problems]
    before = computed(grader.engine)
    found = grading.best_of(result, prompts, grader, counts)
    tokens = computed(grader.engine) - before
    return {"grader": found, "beside": {"tokens": tokens, "flops": forward_flops(grader.engine.model, tokens)}}


def report(run: Run) -> dict[str, Any]:
    """The content of report.json, read back from the stages' folders."""
    parts = {p.stem: read_json(p) or {} for p in sorted((run.folder("eval") / "parts").glob("*.json"))}
    recipe, main = run.recipe, f"t{run.recipe.eval.temperature:g}"
    base, (before, after) = _base(recipe), compared(recipe)
    measured = {base: parts[f"{base}.plain"], **{name: parts[f"{name}.{main}"] for name in recipe.talkers}}
    keys = ("accuracy", "accuracy_low", "accuracy_high", "n", "mean_tokens")
    rows = []
    spent = cost(run.out)
    final = {entry["name"]: entry["final"] for entry in spent.get("stages", [])}
    for name in [*[START] * (base == START), *recipe.stages]:
        facts, own = measured.get(name, {}), final.get(name, {})
        rows.append({"name": name, **{k: facts.get(k) for k in keys}, "seconds": own.get("seconds"), "flops": own.get("flops")})
    order = [START, *recipe.talkers]
    protocols = [
        {"model": name.partition(".")[0],
         **{k: v for k, v in part.items() if k not in ("by_problem", "examples", *COST)}}
        for name, part in parts.items()
        if "temperature" in part and (base == START or name != f"{base}.plain")
    ]  # fmt: skip
    protocols.sort(key=lambda p: (recipe.eval.puzzles.index(p["puzzle"]), order.index(p["model"]), -p["temperature"]))
    told: dict[str, Any] = {"before": before, "after": after}
    if before:
        told |= _gain(measured[after]["by_problem"], measured[before]["by_problem"])
    examples = []
    for i, example in enumerate(measured[after]["examples"]):
        earlier = {"before": _said(measured[before]["examples"][i])} if before else {}
        examples.append({"prompt": example["prompt"], **earlier, "after": _said(example)})
    votes, other = parts[f"{after}.votes"], parts.get(f"{before}.votes", {})

    def curve(which: str) -> list[dict[str, Any]]:
        return [{"k": k, "accuracy": a, "before": b} for k, a, b in zip_longest(votes["k"], votes[which], other.get(which, []))]

    extended = {"extension": read_json(run.folder("extend") / extension.FILE)} if run.recipe.extend else {}
    return {
        **extended, "stages": rows, "protocols": protocols, "gain": told,
        "table": stagetable.table(recipe, parts), "grading": stagetable.graded(recipe, parts),
        "majority": curve("majority"), "best_of": curve("best_of"), "votes_n": votes["n"], "examples": examples,
        "ledger": spent, "seed": run.recipe.seed, "versions": versions(),
        "machine": machine(None if run.device.type == "cpu" else str(run.device)) | {"dtype": str(run.dtype).removeprefix("torch."),
                                                                                     "threads": torch.get_num_threads()},
    }  # fmt: skip


def _gain(after: list[float | None], before: list[float | None]) -> dict[str, float]:
    """Points of accuracy, paired by problem, with the 95 % interval; over the problems where both could be judged."""
    known = np.array([pair for pair in zip(after, before, strict=True) if None not in pair], np.float64).reshape(-1, 2)
    gain, low, high = passk.paired_difference(known[:, 0], known[:, 1])
    return {"points": 100 * gain, "low": 100 * low, "high": 100 * high}


def _said(example: dict[str, Any]) -> dict[str, Any]:
    return {k: example[k] for k in ("thought", "answer", "verdict")}
