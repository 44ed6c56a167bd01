"""The R1 chain over several seeds: what each step of it gained, with intervals. Recipe seeds differ, the held-out problems are the same.

    pascaline bench chain [--seeds 1 2 3] [--gain rl-last:sft distil:rl-student] [--best rl-last sft]

--gain AFTER:BEFORE: accuracy on each puzzle, paired by problem. --best: for these models the majority of all votes and, at equal tokens,
the best by the grader, over pass@1. A line each: per seed [points, low, high] over problems (the majority of all without an interval), and
over the seeds the mean with the 95 % interval of Student's t. A seed whose folder is finished is read, not run again."""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pascaline
from pascaline.eval.passk import paired_difference
from pascaline.recipe import load
from pascaline.runs import machine, read_json

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, of so many seeds


def over_seeds(points: list[float]) -> dict[str, float]:
    """The mean, and its interval where there are seeds enough for one."""
    mean = statistics.fmean(points)
    half = T[len(points)] * statistics.stdev(points) / math.sqrt(len(points)) if len(points) in T else math.nan
    return {"mean": round(mean, 2), "low": round(mean - half, 2), "high": round(mean + half, 2)}


def line(what: str, seeds: list[list[float]], **more: Any) -> dict[str, Any]:
    return {"what": what, **more, "seeds": [[round(x, 2) for x in own] for own in seeds], **over_seeds([own[0] for own in seeds])}


def gained(runs: list[Path], puzzles: list[str], temperature: float, after: str, before: str) -> list[dict[str, Any]]:
    """Points of accuracy on each puzzle."""
    lines = []
    for i, puzzle in enumerate(puzzles):
        part = puzzle if i else f"t{temperature:g}"
        pairs = [[read_json(_eval(run) / f"{model}.{part}.json") or {} for model in (after, before)] for run in runs]
        gains = [[100 * x for x in paired_difference(a["by_problem"], b["by_problem"])] for a, b in pairs]
        shown = [[round(100 * part["accuracy"], 1) for part in pair] for pair in pairs]
        lines.append(line(f"{after} over {before}", gains, puzzle=puzzle, accuracies=shown))
    return lines


def chosen(runs: list[Path], puzzles: list[str], model: str) -> list[dict[str, Any]]:
    """What a vote and a grader add to one answer, on the same problems."""
    lines = []
    for i, puzzle in enumerate(puzzles):
        parts = [read_json(_eval(run) / f"{model}.{f'{puzzle}-votes' if i else 'votes'}.json") or {} for run in runs]
        votes = [[100 * (part["majority"][-1] - part["best_of"][0])] for part in parts]  # the best of 1 is pass@1
        lines.append(line(f"majority of {parts[0]['k'][-1]} over pass@1", votes, model=model, puzzle=puzzle))
        graded = [part["grader"] for part in parts if "grader" in part]
        for key, what in (("over_once", "pass@1"), ("over_majority", "majority of m")):
            found = [[100 * row[key][name] for name in ("gain", "low", "high")] for row in graded if row.get(key)]
            if found:
                sizes = [[row["k"], row["m"]] for row in graded if row.get(key)]
                lines.append(line(f"best of k by the grader over {what}", found, model=model, puzzle=puzzle, k_and_m=sizes))
    return lines


def _eval(run: Path) -> Path:
    return next(run.glob("*-eval")) / "parts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default=str(Path(__file__).parent.parent / "recipes" / "r1.toml"))
    parser.add_argument("--out", default="runs/bench-chain", help="one folder a seed below this")
    parser.add_argument("--gain", nargs="*", default=["rl-last:sft", "distil:rl-student"], metavar="AFTER:BEFORE")
    parser.add_argument("--best", nargs="*", default=["sft", "rl-last"], metavar="MODEL")
    options = parser.parse_args()
    runs = [Path(options.out) / f"seed-{seed}" for seed in options.seeds]
    reports = [pascaline.run(options.recipe, run, {"seed": seed}) for seed, run in zip(options.seeds, runs, strict=True)]
    plan = load(options.recipe).eval
    lines = [row for gain in options.gain for row in gained(runs, plan.puzzles, plan.temperature, *gain.split(":"))]
    lines += [row for model in options.best for row in chosen(runs, plan.puzzles, model)]
    for found in lines:
        print(json.dumps(found))
    spent = [{s["name"]: s["flops"] for s in report["stages"]} for report in reports]
    print(json.dumps({"flops": spent, "problems": plan.problems, "vote_problems": plan.vote_problems, "machine": machine(None)}))


if __name__ == "__main__":
    main()
