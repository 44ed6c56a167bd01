"""The last stage: every model of the chain on the same held-out problems, and the report of the whole run."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pascaline.data.puzzles import Problem
from pascaline.engine import Engine, Output, Sampling
from pascaline.eval import passk, tasks
from pascaline.eval.questions import read_plain
from pascaline.ledger import COST, Totals, cost
from pascaline.model import hf
from pascaline.post import extension
from pascaline.post.stages import Run
from pascaline.post.verifiers import Judged, judge
from pascaline.runs import machine, read_json, versions, write_json
from pascaline.stopping import Interrupt
from pascaline.train.loop import active_parameters

VOTES = (1, 2, 4, 8, 16, 32)
EXAMPLES = 3
START = "start"
SEED = 1_000_003  # of the evaluation problems: one set for every run, so that runs can be compared


def evaluate(run: Run) -> dict[str, Any]:
    """Measure the base model, sft and rl under several protocols; each piece is kept in parts/, so an interrupted evaluation goes on."""
    plan = run.recipe.eval
    problems = tasks.held_out(plan.puzzles, run.recipe.puzzles, plan.problems, SEED)
    main = problems[plan.puzzles[0]]
    # R1's protocol is the headline; temperature 1 and greedy stand beside it unless the recipe's own temperature is one of them.
    protocols = [(plan.temperature, plan.top_p, plan.samples)]
    protocols += [(t, 1.0, 1) for t in (1.0, 0.0) if t != plan.temperature]
    pieces: list[tuple[str, str, Callable[[Engine], dict[str, Any]]]] = []

    def piece(model: str, name: str, work: Callable[[Engine], dict[str, Any]]) -> None:
        pieces.append((model, f"{model}-{name}", work))

    base = _base_stage(run)
    if base != START:  # a base model of our own reads plain text: it meets chat tokens only in sft
        piece(base, "plain", lambda engine: _base(engine, main, plan.temperature, plan.top_p, plan.max_tokens))
    else:
        sampling = Sampling(plan.temperature, plan.top_p, plan.max_tokens, plan.samples, seed=SEED)
        piece(base, "plain", lambda engine, s=sampling: _protocol(engine, main, s))  # type: ignore[misc]
    for model in ("sft", "rl"):
        for temperature, top_p, samples in protocols:
            sampling = Sampling(temperature, top_p, plan.max_tokens, samples, seed=SEED)
            piece(model, f"t{temperature:g}", lambda engine, s=sampling: _protocol(engine, main, s))  # type: ignore[misc]
        for other in plan.puzzles[1:]:
            sampling = Sampling(plan.temperature, plan.top_p, plan.max_tokens, 1, seed=SEED)
            piece(model, other, lambda engine, s=sampling, n=other: _protocol(engine, problems[n], s))  # type: ignore[misc]
        sampling = Sampling(plan.temperature, plan.top_p, plan.max_tokens, plan.votes, seed=SEED + 1)
        piece(model, "votes", lambda engine, s=sampling: _votes(engine, main[: plan.vote_problems], s))  # type: ignore[misc]
    return _work(run, pieces)


def _base_stage(run: Run) -> str:
    """The stage whose model sft starts from, START if that is the folder that the chain starts from."""
    before = run.recipe.stages[run.recipe.stages.index("sft") - 1]
    return START if before == "tokenizer" else before


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
                    folder = run.origin("sft") if model == START else run.folder(model) / "model"
                    weights = hf.load(folder, run.dtype, run.device)
                    engine, loaded = Engine(weights, run.tokenizer()), model
                assert engine is not None
                before, began = engine.stats.generated + engine.stats.prefilled, time.perf_counter()
                found = work(engine)
                found["tokens"] = engine.stats.generated + engine.stats.prefilled - before
                found |= {"flops": 2.0 * active_parameters(engine.model) * found["tokens"], "seconds": time.perf_counter() - began}
                spent.add(*(found[key] for key in COST))
                write_json(path, found)
            stands.add(*(found.get(key, 0) for key in COST))
            progress.update(i + 1, part=name, accuracy=found.get("accuracy"))
            if interrupt.requested:
                raise interrupt.stopped(f"stopped after part {i + 1} of {len(pieces)} of the evaluation")
    return {"tokens": stands.tokens}


def _protocol(engine: Engine, problems: list[Problem], sampling: Sampling) -> dict[str, Any]:
    result = tasks.evaluate(engine, problems, sampling)
    examples = [
        {"prompt": p.prompt, "thought": o[0].reasoning or "", "answer": o[0].text, "verdict": v[0].value}
        for p, o, v in zip(problems[:EXAMPLES], result.outputs, result.verdicts, strict=False)
    ]
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "samples": sampling.n, "puzzle": problems[0].puzzle}
    return {**how, **result.summary(), "by_problem": result.means, "examples": examples}


def _votes(engine: Engine, problems: list[Problem], sampling: Sampling) -> dict[str, Any]:
    result = tasks.evaluate(engine, problems, sampling)
    counts = [k for k in VOTES if k <= sampling.n]
    majority, best = result.votes(counts)
    return {"k": counts, "majority": majority, "best_of": best, "n": len(problems)}


def _base(engine: Engine, problems: list[Problem], temperature: float, top_p: float, max_tokens: int) -> dict[str, Any]:
    """The base model continues "problem, newline" as plain text; what follows "Answer: " on the last line counts."""
    own = engine.tokenizer
    assert own is not None

    def judged(problems: Sequence[Problem], outputs: Sequence[Sequence[Output]]) -> Judged:
        return judge(problems, [[read_plain(o) for o in group] for group in outputs])

    sampling = Sampling(temperature, top_p, max_tokens, 1, seed=SEED)
    result = tasks.evaluate(engine, problems, sampling, judged, lambda p: [*own.prefix, *own.encode(f"{p.prompt}\n")])
    return result.summary()


def report(run: Run) -> dict[str, Any]:
    """The content of report.json, read back from the stages' folders."""
    parts = {p.stem: read_json(p) or {} for p in sorted((run.folder("eval") / "parts").glob("*.json"))}
    main, plan = f"t{run.recipe.eval.temperature:g}", run.recipe.eval.puzzles
    base = _base_stage(run)
    measured = {base: parts[f"{base}-plain"], "sft": parts[f"sft-{main}"], "rl": parts[f"rl-{main}"]}
    keys = ("accuracy", "accuracy_low", "accuracy_high", "n", "mean_tokens")
    rows = []
    spent = cost(run.out)
    final = {entry["name"]: entry["final"] for entry in spent.get("stages", [])}
    for name in [*[START] * (base == START), *run.recipe.stages]:
        facts, own = measured.get(name, {}), final.get(name, {})
        rows.append({"name": name, **{k: facts.get(k) for k in keys}, "seconds": own.get("seconds"), "flops": own.get("flops")})
    protocols = [
        {"model": name.split("-")[0], **{k: v for k, v in part.items() if k not in ("by_problem", "examples", *COST)}}
        for name, part in parts.items()
        if "temperature" in part
    ]
    protocols.sort(key=lambda p: (plan.index(p["puzzle"]), (START, "sft", "rl").index(p["model"]), -p["temperature"]))
    before, after = parts["sft-votes"], parts["rl-votes"]
    pairs = zip(measured["rl"]["by_problem"], measured["sft"]["by_problem"], strict=True)
    known = np.array([pair for pair in pairs if None not in pair], np.float64).reshape(-1, 2)  # where both could be judged
    gain, low, high = passk.paired_difference(known[:, 0], known[:, 1])

    def said(example: dict[str, Any]) -> dict[str, Any]:
        return {k: example[k] for k in ("thought", "answer", "verdict")}

    told = zip(measured["sft"]["examples"], measured["rl"]["examples"], strict=True)
    examples = [{"prompt": a["prompt"], "before": said(b), "after": said(a)} for b, a in told]

    def curve(kind: str) -> list[dict[str, Any]]:
        return [{"k": k, "accuracy": a, "before": b} for k, a, b in zip(after["k"], after[kind], before[kind], strict=True)]

    extended = {"extension": read_json(run.folder("extend") / extension.FILE)} if run.recipe.extend else {}
    return {
        **extended, "stages": rows, "protocols": protocols, "gain": {"points": 100 * gain, "low": 100 * low, "high": 100 * high},
        "majority": curve("majority"), "best_of": curve("best_of"), "votes_n": after["n"], "examples": examples,
        "ledger": spent, "seed": run.recipe.seed, "versions": versions(),
        "machine": machine(None if run.device.type == "cpu" else str(run.device)) | {"dtype": str(run.dtype).removeprefix("torch."),
                                                                                     "threads": torch.get_num_threads()},
    }  # fmt: skip
