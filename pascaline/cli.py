"""The command line. Each verb is a few lines that call a room; heavy imports wait until a verb needs them."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pascaline import measure
from pascaline.device import place
from pascaline.errors import BadInput
from pascaline.stopping import Stopped

app = typer.Typer(
    help="From raw text to a language model that reasons out loud: train, evaluate, chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Build corpora.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(measure.verify, name="verify")
app.command("eval")(measure.evaluate)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object, last on stdout")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="a recipe file, e.g. recipes/laptop.toml")],
    out: Annotated[Path | None, typer.Option(help="the run's folder (default: runs/NAME-OF-RECIPE)")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="override a key: --set rl.steps=50 (repeatable)")] = None,
    stage: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over; what is there is kept in OUT.old-N")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe's chain of stages. Stopped anywhere, the same command goes on where it was."""
    from pascaline.post.chain import finished
    from pascaline.post.chain import run as run_chain
    from pascaline.recipe import read_setting

    out = out or Path("runs") / recipe.stem
    done = finished(out) and not fresh
    report = run_chain(recipe, out, dict(read_setting(s) for s in set or []), stage, fresh, quiet=as_json)
    if as_json:
        print(json.dumps(report))
    elif not report and place()[0]:
        return  # the first rank speaks
    elif not report:
        print(f"{out}: stage {stage} is done. Run the same command without --stage to go on.")
    else:
        _show(report, out, done)


def _show(report: dict[str, Any], out: Path, done: bool) -> None:
    from pascaline.chat import printable
    from pascaline.eval.report import table_text

    if done:
        print(f"{out} is done already (--fresh starts over). What it measured:\n")
    print(table_text(report))
    for i, example in enumerate(report.get("examples", [])):
        print(f"\nHeld-out problem {i + 1}: {example['prompt']}")
        for when in (when for when in ("before", "after") if when in example):
            said = example[when]
            print(f"  {report['gain'][when]} [{said['verdict']}]")
            thought = printable(said["thought"]).splitlines()
            print("".join(f"    | {line}\n" for line in thought) + f"    = {printable(said['answer']) or '(no answer)'}")
    program = "pascaline" if shutil.which("pascaline") else os.path.relpath(Path(sys.executable).with_name("pascaline"))
    again = f"{program} run {out / 'recipe.toml'} --out {out}-2 --set seed=2"
    print(f"\nGo on with:\n  {program} chat {out}/model\n  {program} report {out}\n  {again}")


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="a model folder, e.g. runs/demo/model")],
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.6,
    top_p: Annotated[float, typer.Option()] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="of thought and answer together")] = 512,
    seed: Annotated[int, typer.Option()] = 0,
    history: Annotated[bool, typer.Option("--history", help="let the model see the earlier turns")] = False,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Talk to a model: its thought is dimmed and streamed, then comes the answer. End with Ctrl-D."""
    from pascaline.chat import talk

    talk(model, temperature, top_p, max_tokens, seed, history, device)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="a model folder, e.g. runs/demo/model")],
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from other machines")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="the model's id (default: from its folder)")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="keys that clients need, one a line")] = None,
    max_rows: Annotated[int, typer.Option(help="answers computed at once", min=1)] = 256,
    max_batch_tokens: Annotated[int, typer.Option(help="tokens of one step", min=1)] = 2048,
    cache_memory: Annotated[str | None, typer.Option(help="of the cache, e.g. 2GiB (default: at most a quarter of what is free)")] = None,
    max_queue: Annotated[int, typer.Option(help="answers that may wait; more are refused (429)", min=1)] = 1024,
    max_queue_tokens: Annotated[int, typer.Option(help="prompt tokens that may wait", min=1)] = 1 << 20,
    max_prompt_tokens: Annotated[int, typer.Option(help="of a request; 0: what the context allows", min=0)] = 0,
    max_tokens: Annotated[int, typer.Option(help="of an answer; 0: what the context allows", min=0)] = 0,
    max_n: Annotated[int, typer.Option(help="answers of a prompt", min=1, max=128)] = 64,
    max_messages: Annotated[int, typer.Option(help="of a conversation", min=1)] = 1024,
    max_body: Annotated[str, typer.Option(help="of a request's body")] = "4MiB",
    rate: Annotated[float, typer.Option(help="requests a minute of a key; 0: no limit", min=0)] = 0.0,
    concurrency: Annotated[int, typer.Option(help="requests at once of a key; 0: no limit", min=0)] = 0,
    price_per_hour: Annotated[float, typer.Option(help="of the machine; the metrics then tell what tokens cost", min=0)] = 0.0,
    drain_seconds: Annotated[float, typer.Option(help="that running answers have when the server is stopped", min=0)] = 30.0,
    mirror_reasoning: Annotated[bool, typer.Option("--mirror-reasoning", help="tell thoughts as `reasoning` too")] = False,
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="the chat page at /, if gradio is installed")] = True,
) -> None:
    """Serve a model with the OpenAI API and a chat page. Stop it with Ctrl-C: running answers end first."""
    from pascaline.chat import refuse
    from pascaline.serve.options import Options, default_name, read_size

    refuse(model)
    if dtype not in ("float32", "bfloat16"):
        raise BadInput(f"--dtype {dtype} is not known, only float32 and bfloat16.")
    options = Options(
        name=name or default_name(model), host=host, port=port, api_key_file=api_key_file, max_queue=max_queue,
        max_queue_tokens=max_queue_tokens, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, max_n=max_n,
        max_messages=max_messages, max_body=read_size(max_body), rate=rate, concurrency=concurrency, price_per_hour=price_per_hour,
        drain_seconds=drain_seconds, mirror_reasoning=mirror_reasoning, ui=ui,
    )  # fmt: skip
    memory = None if cache_memory is None else read_size(cache_memory)
    from pascaline.serve.server import engine_of
    from pascaline.serve.server import serve as run_server

    run_server(engine_of(model, device, dtype, max_rows, memory, max_batch_tokens), options)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a run's folder")],
    price: Annotated[float | None, typer.Option(help="of a device-hour, instead of the recipe's", min=0)] = None,
    watts: Annotated[float | None, typer.Option(help="of a device, instead of the recipe's", min=0)] = None,
    as_json: Json = False,
) -> None:
    """Show what a run measured, or how far it is, what it has cost, and where its report.html is."""
    from pascaline import ledger
    from pascaline.runs import read_json

    found = read_json(folder / "report.json")
    if found is None and not folder.is_dir():
        raise BadInput(f"there is no folder {folder}.")
    given = {key: value for key, value in (("price", price), ("watts", watts)) if value is not None}
    cost = ledger.cost(folder, ledger.told(folder).model_copy(update=given))
    if found is None:
        _show_standing(folder, cost, as_json)
        return
    found |= {"ledger": cost}
    if as_json:
        print(json.dumps(found))
    else:
        _show(found, folder, done=False)
        print(f"\nWith plots: {folder / 'report.html'}")


def _show_standing(folder: Path, cost: dict[str, Any], as_json: bool) -> None:
    from pascaline.eval.forms import aligned
    from pascaline.eval.live import draw, extension, standing, standing_table
    from pascaline.eval.report import cost_text, extension_text

    stages, longer = standing(folder), extension(folder)
    if not stages and not cost:
        raise BadInput(f"{folder} holds no stage that has begun, so there is nothing to report yet.")
    page = draw(folder, cost)
    if as_json:
        print(json.dumps({"training": stages, "ledger": cost, **({"extension": longer} if longer else {})}))
        return
    tables = [aligned(standing_table(stages))] * bool(stages) + extension_text(longer) + [cost_text(cost)] * bool(cost)
    print("\n\n".join([*tables, f"So far, with plots: {page}"]))


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Option(help="say instead how much memory this recipe needs on each rank")] = None,
    ranks: Annotated[int | None, typer.Option(help="processes of the recipe (default: its parallel.ranks, or 1)", min=1)] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="override a key: --set pretrain.micro_tokens=4096 (repeatable)")] = None,
    per_host: Annotated[int | None, typer.Option(help="of them on a machine (default: at most 8; without CUDA all)", min=1)] = None,
    memory: Annotated[float | None, typer.Option(help="GiB that a device has (default: one of this machine)", min=0)] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has and what training will use on it; or, with --recipe, what a recipe needs."""
    if recipe is not None:
        from pascaline.post import doctor as post_doctor
        from pascaline.recipe import load, read_setting

        parsed = load(recipe, dict(read_setting(s) for s in set or []))
        needed = post_doctor.needs(parsed, ranks or parsed.parallel.ranks or 1, per_host, memory)
        print(json.dumps(needed) if as_json else post_doctor.text(needed))
        return
    from pascaline import device, runs
    from pascaline.model import native

    chosen = device.choose()
    facts = {
        "machine": runs.machine(device.device_name(chosen)),
        "versions": runs.versions(),
        "device": str(chosen),
        "dtype": str(device.best_dtype(chosen)).removeprefix("torch."),
        "gemm_gflops": device.peak(chosen, again=True),
        "cpu_kernels": native.wait() or "built",
    }
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        inner = (
            ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
            if isinstance(value, dict)
            else value
        )
        print(f"{name:12} {inner}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="a Hugging Face folder, e.g. a snapshot that the hub's client has downloaded")],
    to: Annotated[Path | None, typer.Option(help="the new folder (default: models/NAME-OF-FOLDER)")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored; fp8 becomes bfloat16), float32, bfloat16 or float16")] = "auto",
    as_json: Json = False,
) -> None:
    """Take in open weights: check every tensor, dequantise fp8, and write a model folder that every verb takes."""
    from pascaline.model import exchange

    _show_exchange(exchange.import_folder(folder, to or Path("models") / exchange.name_of(folder), dtype, quiet=as_json), as_json)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="a model folder, or a run's folder, e.g. runs/demo")],
    to: Annotated[Path | None, typer.Option(help="a new Hugging Face folder, for transformers, vLLM or SGLang")] = None,
    dtype: Annotated[str, typer.Option(help="of --to: auto (as stored), float32, bfloat16, float16, or fp8 in V3's layout")] = "auto",
    gguf: Annotated[Path | None, typer.Option("--gguf", help="a GGUF file, for llama.cpp and Ollama")] = None,
    type: Annotated[str, typer.Option("--type", help="of --gguf's matrices: f32, bf16 or q8_0")] = "bf16",
    text: Annotated[Path | None, typer.Option(help="to measure what a rounded type costs (default: Python's own library)")] = None,
    measure: Annotated[bool, typer.Option(help="that cost; it needs the model in memory")] = True,
    as_json: Json = False,
) -> None:
    """Write a model as a Hugging Face folder (--to) or as one GGUF file, tokenizer and chat template included (--gguf)."""
    from pascaline.model import exchange

    if (to is None) == (gguf is None):
        raise BadInput("say where to: --to FOLDER for a Hugging Face folder, or --gguf FILE for one file.")
    if to is not None:
        _show_exchange(exchange.export_folder(model, to, dtype, quiet=as_json), as_json)
        return
    from pascaline.eval import rounding

    assert gguf is not None
    told = rounding.export(exchange.model_folder(model), gguf, type, text, measure, quiet=as_json)
    print(json.dumps(told) if as_json else rounding.describe(told))


def _show_exchange(told: dict[str, Any], as_json: bool) -> None:
    said = "{folder}: {tensors} tensors, {bytes:,} bytes in {files} files, {dtype}".format(**told)
    print(json.dumps(told) if as_json else said)


@data.command("build")
def data_build(
    recipe: Annotated[Path, typer.Argument(help="a recipe file; its corpus, puzzles and tokenizer tables count")],
    out: Annotated[Path | None, typer.Option(help="the run's folder (default: runs/NAME-OF-RECIPE)")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="override a key: --set corpus.dedup=minhash (repeatable)")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over; what is there is kept in OUT.old-N")] = False,
) -> None:
    """Gather, filter and deduplicate the corpus and write its token shards; `pascaline run` with the same folder goes on from there."""
    from pascaline.post.chain import run as run_chain
    from pascaline.recipe import read_setting

    out = out or Path("runs") / recipe.stem
    run_chain(recipe, out, dict(read_setting(s) for s in set or []), "tokenizer", fresh)
    print((out / "01-corpus" / "card.md").read_text(encoding="utf-8"))
    print(f"Texts: {out / '01-corpus' / 'documents.jsonl'}\nToken shards: {out / '02-tokenizer' / 'shards'}")


@data.command("trace")
def data_trace(
    model: Annotated[Path, typer.Argument(help="a run's folder, or a model folder in it, e.g. runs/demo/model")],
    text: Annotated[str, typer.Argument(help="what the model wrote; - reads standard input")],
    limit: Annotated[int, typer.Option(help="spans shown")] = 10,
    min_tokens: Annotated[int, typer.Option(help="a shorter span is not looked for")] = 8,
    as_json: Json = False,
) -> None:
    """Find the training documents that a text repeats: its longest verbatim spans, and the share of it that they cover."""
    from pascaline.data.trace import read_text, show, trace

    told = trace(model, read_text(text), limit, min_tokens, quiet=as_json)
    print(json.dumps(told)) if as_json else show(told)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="train, decode, serve, soak, data, demo, ... (a wrong name lists them)")],
) -> None:
    """Measure against a peer in one run (scripts in bench/ of the repository). Options follow the name: --json, ..."""
    from pascaline.errors import nearest

    folder = Path(__file__).parent.parent / "bench"
    known = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    if not known:
        raise BadInput("the benchmarks live in bench/ of the repository; run this from a clone installed with pip install -e.")
    if name not in known:
        raise BadInput(f"there is no benchmark '{name}', only {', '.join(known)}{nearest(name, known) or '.'}")
    sys.path.insert(0, str(folder))  # for bench/_common.py
    sys.argv = [f"pascaline bench {name}", *context.args]
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")


def main() -> NoReturn:
    """Entry point: a user's mistake is one sentence on stderr and exit code 2, Ctrl-C is 130; no traceback in either case. What ends one
    of several ranks is told with its number, before torchrun ends the others."""
    try:
        app(standalone_mode=True)
    except SystemExit as e:
        if e.code == 130:  # what typer makes of Ctrl-C
            _stop(130, "stopped; the same command goes on from what was saved.")
        raise
    except BadInput as e:
        _stop(2, str(e))
    except Stopped as e:
        _stop(0 if e.polite else 130, f"{e}; run the same command to go on." if e.resumable else f"{e}.")
    except Exception as e:
        from pascaline.runs import disk_full

        if disk_full(e):
            file = getattr(e, "filename", None) or "a file"
            _stop(2, f"no space left on the device while writing {file}; free some and run the same command again.")
        if isinstance(e, OSError):
            _stop(2, f"{e.filename}: {(e.strerror or str(e)).lower()}." if e.filename else f"{e.strerror or e}.")
        if _memory_full(e):
            _stop(1, "out of memory; a smaller micro_tokens, activation_checkpointing or more ranks need less (pascaline doctor --recipe "
                     "RECIPE --ranks N tells how much).")  # fmt: skip
        if place()[1] > 1 and _left_alone(e):
            _stop(1, "another rank is gone, and this one cannot go on without it; why, it says itself, or torchrun below.")
        if place()[1] > 1:
            _tell(f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}")
        raise
    sys.exit(0)


def _memory_full(error: Exception) -> bool:
    """A device's memory has a type of its own, the host's only its text."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _left_alone(error: Exception) -> bool:
    """Whether it is about the connection to another rank: of torch.distributed, or of gloo, whose errors have no type of their own."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or "gloo" in str(error).lower()


def _stop(code: int, message: str) -> NoReturn:
    _tell(message, leader=code not in (1, 2))
    sys.exit(code)


def _tell(message: str, leader: bool = False) -> None:
    """A sentence on stderr, with the rank if there are several. leader: what all of them would say, the first one says for all."""
    rank, size = place()
    if not (rank and leader):
        print(f"pascaline{f' (rank {rank})' if size > 1 and not leader else ''}: {message}", file=sys.stderr, flush=True)
