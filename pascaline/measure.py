"""The verbs that measure: `pascaline eval`, and `pascaline verify` with its own. Heavy imports wait until a verb needs them."""

import json
from pathlib import Path
from typing import Annotated

import typer

verify = typer.Typer(help="Check verifiers and puzzles before a model learns from them.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object, last on stdout")]


@verify.command("check")
def check(
    name: Annotated[str, typer.Argument(help="a verifier (with --data) or a puzzle: a name, or module:function")],
    data: Annotated[Path | None, typer.Option(help="problems for a verifier: JSON lines with a prompt and its columns")] = None,
    test: Annotated[Path | None, typer.Option(help="the other side of the split, which must share no problem with --data")] = None,
    problems: Annotated[int, typer.Option(help="that are asked about; 0: all of the file", min=0)] = 200,
    draws: Annotated[int, typer.Option(help="of a puzzle, among which equal ones are counted", min=1)] = 10_000,
    columns: Annotated[list[str] | None, typer.Option(help="the verifier's column = the file's: answer=solution (repeatable)")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="a puzzle's dial: largest=9 (repeatable)")] = None,
    oracle: Annotated[str | None, typer.Option(help="the column with the right answers (default: answer, gold, solution, ...)")] = None,
    form: Annotated[bool, typer.Option("--form", help="the verifier judges how an answer is written, not what it says")] = False,
    max_constant: Annotated[float, typer.Option(help="share that one answer to every problem may earn", min=0, max=1)] = 0.2,
    max_near: Annotated[float, typer.Option(help="share of test problems that may have a near-duplicate", min=0, max=1)] = 0.01,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
) -> None:
    """Try to fool a verifier: right answers, constants, silence, echoes, hostile texts, a leaking split. Exit code 1 if a check fails."""
    from pascaline.eval import hygiene
    from pascaline.recipe import read_setting

    found = hygiene.check(
        name, data, test, count=problems, draws=draws, seed=seed, columns=dict(map(read_setting, columns or [])),
        dials=dict(map(read_setting, set or [])), oracle=oracle, quiet=as_json,
        limits=hygiene.Limits(constant=max_constant, near=max_near, form=form),
    )  # fmt: skip
    print(json.dumps(found) if as_json else hygiene.table(found))
    raise typer.Exit(0 if found["passed"] else 1)


@verify.command("list")
def list_(as_json: Json = False) -> None:
    """The verifiers and puzzles that have a name, built in or of plugins."""
    from pascaline.eval.hygiene import known

    found = known()
    print(json.dumps(found) if as_json else "\n".join("{name:14} {kind:9} {path:50} {about}".format(**one) for one in found))


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="model folders, run folders, or results (.json) to compare with")],
    tasks: Annotated[str | None, typer.Option(help="countdown,arithmetic,gsm8k:FILE,gym:chain_sum,ppl:FILE,...")] = None,
    suite: Annotated[Path | None, typer.Option(help="a suite (suites/*.toml), or a result's .json to do it again")] = None,
    k: Annotated[int | None, typer.Option("--k", help="answers to each problem")] = None,
    problems: Annotated[int | None, typer.Option(help="of each task, at most")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: 0.6)")] = None,
    top_p: Annotated[float | None, typer.Option(help="(default: 0.95)")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="of thought and answer together (default: 512)")] = None,
    seed: Annotated[int | None, typer.Option(help="of the problems and of the answers")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="ask in plain text: for base models, which know no chat")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="every stage's model of a run, each against the one before")] = False,
    out: Annotated[Path | None, typer.Option(help="the result's file (.json); the same command goes on with it")] = None,
    html: Annotated[Path | None, typer.Option(help="a page with the tables, heat maps and some answers")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    as_json: Json = False,
) -> None:
    """Measure models on tasks, with intervals; several are compared problem by problem: what was gained, and what was lost."""
    from pascaline.eval import harness, tables
    from pascaline.eval.compare import compare
    from pascaline.runs import write_atomic

    given = {"samples": k, "problems": problems, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    settings = {key: value for key, value in (given | {"plain": plain or None}).items() if value is not None}
    subjects = harness.subjects(models, stages)
    chosen = harness.choose(tasks, suite, models, settings)
    result = harness.run(chosen, subjects, out, device, dtype, quiet=as_json)
    found = compare(result["models"], stages) if len(result["models"]) > 1 else None
    if html is not None:
        write_atomic(html, tables.page_html(result, found))
    print(json.dumps(result | {"comparison": found}) if as_json else tables.text(result, found))
