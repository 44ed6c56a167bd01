"""The demo over several seeds: accuracy before and after RL under the three protocols, with intervals, and the seconds of every stage."""

import argparse
import json
from pathlib import Path
from typing import Any

import pascaline


def row(report: dict[str, Any]) -> dict[str, Any]:
    """One seed's line: protocol -> [before, after], the paired gain, the length, the minutes."""
    protocols = {(p["model"], p["temperature"]): p for p in report["protocols"] if p["puzzle"] == "countdown"}
    temperatures = sorted({t for _, t in protocols}, reverse=True)
    stages = {s["name"]: s for s in report["stages"]}
    keys = ("accuracy", "accuracy_low", "accuracy_high")
    return {
        "seed": report["seed"],
        "gain": report["gain"],
        "accuracy": {f"{t:g}": {m: [round(protocols[m, t][k], 4) for k in keys] for m in ("sft", "rl")} for t in temperatures},
        "false_claim": {m: protocols[m, 0.6]["false_claim"] for m in ("sft", "rl")},
        "mean_tokens": {m: stages[m]["mean_tokens"] for m in ("sft", "rl")},
        "n": stages["rl"]["n"],
        "seconds": {name: round(s["seconds"], 1) for name, s in stages.items()},
        "minutes": sum(s["seconds"] for s in stages.values()) / 60,
        "machine": report["machine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default=str(Path(__file__).parent.parent / "recipes" / "laptop.toml"))
    parser.add_argument("--out", default="runs/bench-demo", help="one folder a seed below this; finished ones are read, not run again")
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        report = pascaline.run(options.recipe, Path(options.out) / f"seed-{seed}", {"seed": seed}, quiet=options.json)
        rows.append(row(report))
    if options.json:
        print(json.dumps({"seeds": rows}))
        return
    for line in rows:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
