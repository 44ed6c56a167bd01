"""What a recipe asks for that cannot work, said before anything starts. Imports no torch, so that it is said at once."""

import importlib.util
import inspect
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pascaline.data import puzzles
from pascaline.data.build import FILTERS
from pascaline.data.puzzles.families import Family
from pascaline.data.quality import script
from pascaline.data.sources import documents
from pascaline.errors import BadInput, nearest
from pascaline.model.config import ModelConfig
from pascaline.model.presets import from_recipe
from pascaline.post import verifiers
from pascaline.post.check_chain import check_chain
from pascaline.post.confession import turn
from pascaline.recipe import Recipe
from pascaline.tables import KINDS, Distil, Extend, Pretrain, Puzzle, Rl, Sft, kind
from pascaline.tokenizer import BYTES, SPECIALS, Tokenizer


def check(recipe: Recipe) -> None:
    """Refuse impossible shapes, unknown names, and a chain that would find nothing to learn from or to be asked (BadInput)."""
    least = BYTES + len(SPECIALS)
    if recipe.start:
        _check_start(recipe)
    elif recipe.pretrain is None:
        raise BadInput("a chain starts with [pretrain], or with the weights of a folder (model.folder).")
    elif recipe.tokenizer.vocab_size < least:
        raise BadInput(f"tokenizer.vocab_size = {recipe.tokenizer.vocab_size} is smaller than the byte alphabet and the special tokens; "
                       f"take at least {least}.")  # fmt: skip
    _check_positions(recipe)
    for name in recipe.stages:
        if kind(name) == "distil":
            _check_distil(recipe, name)
        if _samples(recipe, name) and getattr(recipe, name).compile:
            raise BadInput(f"{name}.compile: the engine samples with the layers that are trained, in ever other shapes; compile the other "
                           "stages.")  # fmt: skip
    _check_puzzles(recipe)
    if "corpus" not in recipe.stages:
        return
    _check_filters(recipe)
    _check_mixture(recipe)
    if recipe.corpus.sources and recipe.corpus.max_bytes:
        next(documents(recipe.corpus.sources, recipe.corpus.max_bytes, lambda _: None), None)  # says what is missing or empty
    elif not any(t.traces for t in recipe.puzzles.values()):
        raise BadInput("the corpus would be empty: name corpus.sources or give a puzzle some traces.")


def _check_positions(recipe: Recipe) -> None:
    """Each stage's rows must fit into the positions of the model that it gets; who replays routers must have some."""
    shapes: dict[str | None, ModelConfig] = {None: model_config(recipe, recipe.tokenizer.vocab_size)}
    positions: dict[str | None, int] = {None: shapes[None].max_position_embeddings}
    for name in (stage for stage in recipe.stages if kind(stage) in KINDS):
        stage = getattr(recipe, name)
        there, shape = positions[recipe.before(name)], shapes[recipe.before(name)]
        if name == "extend" and recipe.extend:
            _check_extend(recipe, there)
            there = recipe.extend.length
        elif getattr(stage, "model", None):
            shape = model_config(recipe, recipe.tokenizer.vocab_size, stage.model, f"{name}.model")
            there = shape.max_position_embeddings
        positions[name], shapes[name] = there, shape
        dense = not shape.n_routed_experts or shape.first_k_dense_replace >= shape.num_hidden_layers
        if dense and isinstance(stage, Rl) and (stage.replay or stage.watch_routing):
            raise BadInput(f"{name}.replay and {name}.watch_routing are about the routers of a mixture of experts; this model has none.")
        asked = getattr(stage, "confession", None)
        if asked and stage.max_tokens + asked.max_tokens >= there:
            raise BadInput(f"{name}.confession: an answer ({name}.max_tokens = {stage.max_tokens}) and a report on it ({asked.max_tokens}) "
                           f"leave no room in the model's {there} positions; lower {name}.max_tokens.")  # fmt: skip
        if getattr(stage, "sequence_length", 0) > there:
            raise BadInput(f"{name}.sequence_length = {stage.sequence_length} is more than the model's {there} positions.")


def check_sinks(recipe: Recipe) -> None:
    """Each sink must be installed; looked up without importing it. A folder of the same name in the current one is no package."""
    for name in recipe.sinks:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise BadInput(f"sinks: {name} is not installed; pip install {name} (or pascaline[watch] for all of them), or leave it out.")


def check_ranks(recipe: Recipe, size: int) -> None:
    """Refuse a mesh that does not fit `size` processes, the model, or a step's rows, with the sizes that would fit (BadInput)."""
    table, config = recipe.parallel, model_config(recipe, recipe.tokenizer.vocab_size)
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    experts = config.n_routed_experts if config.first_k_dense_replace < depth else 0
    if table.ranks and table.ranks != size:
        raise BadInput(f"parallel.ranks = {table.ranks}, but here {_are(size)}: start it with torchrun --nproc-per-node={table.ranks} -m "
                       f"pascaline run ..., or set parallel.ranks = {size} (0 for any number).")  # fmt: skip
    if table.experts > 1 and not experts:
        raise BadInput(f"parallel.experts = {table.experts}, but no layer of the model has experts; leave it at 1.")
    if experts % table.experts:
        fits = _listed(n for n in range(1, experts + 1) if experts % n == 0)
        raise BadInput(f"parallel.experts = {table.experts} does not divide the {experts} experts of a layer; {fits} do.")
    most, least = experts or config.hidden_size, table.replicas * table.experts  # ranks of a replica, of all
    if size % table.replicas:
        fits = _listed(_replicas(size, most, table.experts) or [1])
        raise BadInput(f"parallel.replicas = {table.replicas} needs as many ranks or a multiple of it, and here {_are(size)}: start it "
                       f"with torchrun --nproc-per-node={least} -m pascaline run ..., or set it to {fits}.")  # fmt: skip
    own, of = size // table.replicas, f" in each of {table.replicas} replicas" if table.replicas > 1 else ""
    if own % table.experts:
        fits = _listed(n for n in range(1, own + 1) if own % n == 0 and not experts % n)
        raise BadInput(f"parallel.experts = {table.experts} needs as many ranks or a multiple of it{of}, and here {_are(own)}: start it "
                       f"with torchrun --nproc-per-node={least} -m pascaline run ..., or set it to {fits}.")  # fmt: skip
    if own > most:
        what = "experts of a layer" if experts else "rows of a layer's weights (model.hidden_size)"
        more = next(iter(_replicas(size, most, table.experts)), 0)
        instead = f", or set parallel.replicas = {more} (groups of {size // more} that hold the whole model each)" if more else ""
        raise BadInput(f"{own} ranks{of} are more than the {most} {what}: some would hold nothing of it; start {most * table.replicas} "
                       f"ranks at most{instead}.")  # fmt: skip
    for name in recipe.stages:
        if kind(name) in ("pretrain", "extend", "sft"):
            _check_rows(name, getattr(recipe, name), size)


def _replicas(size: int, most: int, experts: int) -> list[int]:
    """Into how many replicas `size` ranks can be divided, of `most` ranks at most and a multiple of `experts`."""
    return [n for n in range(1, size + 1) if size % n == 0 and size // n <= most and not size // n % experts]


def _check_rows(name: str, stage: Pretrain | Extend | Sft, size: int) -> None:
    """Each rank must get a row of a step."""
    row = stage.length if isinstance(stage, Extend) and not stage.sequence_length else stage.sequence_length
    rows = max(stage.tokens_per_step // row, 1)
    if rows < size:
        raise BadInput(f"{name}.tokens_per_step = {stage.tokens_per_step} is {rows} row{'s' * (rows > 1)} of {row} tokens: of {size} ranks "
                       f"{size - rows} would have none; start {rows} at most, or raise it to {size * row}.")  # fmt: skip


def _are(size: int) -> str:
    return "is one process" if size == 1 else f"are {size}"


def _listed(sizes: Iterable[int]) -> str:
    *most, last = map(str, sizes)
    return f"{', '.join(most)} or {last}" if most else last


def _check_extend(recipe: Recipe, positions: int) -> None:
    assert recipe.extend is not None
    if recipe.extend.length <= positions:
        raise BadInput(f"extend.length = {recipe.extend.length} must be more than the model's {positions} positions "
                       "(model.max_position_embeddings).")  # fmt: skip
    if recipe.pretrain and recipe.pretrain.sequence_length < positions:
        raise BadInput(f"extend stretches the model's {positions} positions, of which pretrain.sequence_length = "
                       f"{recipe.pretrain.sequence_length} trains no more; set model.max_position_embeddings to that.")  # fmt: skip
    if not recipe.corpus.held_out:
        raise BadInput("extend is judged on documents that no stage trains on: corpus.held_out must be more than 0 (0.02).")


def _check_start(recipe: Recipe) -> None:
    """The folder that a chain starts from must be a model with a tokenizer and a chat template."""
    assert recipe.start is not None
    if recipe.tokenizer != Recipe().tokenizer:
        raise BadInput("model.folder brings its own tokenizer; leave out the [tokenizer] table.")
    own, config = Tokenizer.load(recipe.start), model_config(recipe, 0)
    if own.vocab_size > config.vocab_size:
        raise BadInput(f"{recipe.start}: the tokenizer has {own.vocab_size} tokens, the model only {config.vocab_size}.")
    own.prompt_ids("?")  # says what is wrong with the template
    if any(getattr(getattr(recipe, name), "confession", None) for name in recipe.chain):
        turn(own)  # whether it takes a second question
    _ = own.end, own.end_of_turn


def _samples(recipe: Recipe, name: str) -> bool:
    """Whether a stage trains on what its model says."""
    return kind(name) == "rl" or (kind(name) == "distil" and getattr(recipe, name).method == "policy")


def _check_distil(recipe: Recipe, name: str) -> None:
    """The teacher must be there by then, and speak the student's vocabulary."""
    stage: Distil = getattr(recipe, name)
    earlier = [model for model in recipe.models if recipe.stages.index(model) < recipe.stages.index(name)]
    if stage.teacher in earlier:
        if stage.teacher == recipe.before(name):
            raise BadInput(f"{name}.teacher = '{stage.teacher}' is what the student starts from: there is nothing to learn; name another.")
    elif stage.teacher in recipe.stages or not (Path(stage.teacher) / "config.json").is_file():
        listed = ", ".join(earlier) or "none"
        raise BadInput(f"{name}.teacher = '{stage.teacher}' is neither an earlier stage with a model ({listed}) nor a model folder"
                       f"{nearest(stage.teacher, earlier) or '.'}")  # fmt: skip
    elif recipe.start:  # else the vocabulary is still to be learnt
        check_shared(Tokenizer.load(recipe.start), Path(stage.teacher), name)
    if stage.method == "logits" and not stage.data and not any(table.examples for table in recipe.puzzles.values()):
        raise BadInput(f"{name} has no chats to ask the teacher about: name some in {name}.data, or give a puzzle some examples.")


def check_shared(own: Tokenizer, teacher: Path, name: str) -> None:
    """Refuse a teacher with another vocabulary: its ids mean other words."""
    other = Tokenizer.load(teacher)
    if own.vocabulary != other.vocabulary:
        shared = len(own.vocabulary.items() & other.vocabulary.items())
        raise BadInput(f"{name}: {teacher} has another vocabulary than the student ({other.vocab_size} tokens, {own.vocab_size} here, "
                       f"{shared} the same), so the two cannot be compared token by token; let it write answers in a chain of its own "
                       "(reject), and teach their text with sft (its `data` takes the chats.jsonl).")  # fmt: skip


def model_config(recipe: Recipe, vocab_size: int, shape: dict[str, Any] | None = None, where: str = "model") -> ModelConfig:
    """The recipe's model, or that of a stage with a `shape` of its own, over a vocabulary; impossible shapes and unknown names are
    BadInput."""
    if recipe.start and not shape:
        from pascaline.model.hf import read_config

        return read_config(recipe.start)
    shape = shape or recipe.model
    if "vocab_size" in shape:
        raise BadInput(f"{where}.vocab_size follows from the tokenizer; set tokenizer.vocab_size instead.")
    return from_recipe({**shape, "vocab_size": vocab_size}, where)


def _check_puzzles(recipe: Recipe) -> None:
    for name, table in recipe.puzzles.items():
        _check_family(name, table)
    asked = {f"{name}.puzzles": getattr(recipe, name).puzzles for name in recipe.stages if hasattr(getattr(recipe, name), "puzzles")
             and getattr(getattr(recipe, name), "method", "") != "logits"}  # fmt: skip
    for where, names in asked.items():
        unknown = [name for name in names if name not in recipe.puzzles]
        if unknown or not (names or kind(where.partition(".")[0]) == "sft"):
            near = nearest(unknown[0], recipe.puzzles) if unknown else ""
            raise BadInput(f"{where} = {names} must name puzzles of the recipe ({', '.join(recipe.puzzles) or 'it has none'}){near or '.'}")
    for name in (*recipe.eval.puzzles, *recipe.attempts):  # a space too small for the evaluation must not be found after the training
        Family(name, recipe.puzzles[name]).problems(recipe.eval.problems, 0, held_out=True)
    check_chain(recipe)


def _check_family(name: str, table: Puzzle) -> None:
    if table.file is None:
        if table.test is not None:
            raise BadInput(f"puzzles.{name}.test is the held-out side of a file: give puzzles.{name}.file the other one.")
        _check_keywords(f"puzzles.{name}.quality", puzzles.get(name).trace, table.quality)
    elif table.dials or table.quality:
        given = "dials" if table.dials else "quality"
        raise BadInput(f"puzzles.{name}.{given} is of problems that are made up; those of a file are as they are: leave it out.")
    elif not table.verifier:
        raise BadInput(f"puzzles.{name}.verifier is missing: who judges the answers to the problems of {table.file}?")
    if table.verifier:
        verifiers.get(table.verifier)
    family = Family(name, table)
    try:
        problem = family.problems(1, 0, held_out=False)[0]
    except TypeError as e:  # a plugin's generate without that dial
        raise BadInput(f"puzzles.{name}.dials: {e}.") from None
    if table.traces or table.examples or table.file is None:
        family.trace(problem, random.Random(0))


def _check_filters(recipe: Recipe) -> None:
    samples = [recipe.corpus.decontaminate]
    for name, table in recipe.corpus.filters.items():
        if name not in FILTERS:
            raise BadInput(f"corpus.filters.{name} is not a filter{nearest(name, FILTERS)} (there are {', '.join(FILTERS)}).")
        _check_keywords(f"corpus.filters.{name}", FILTERS[name], table)
        if name == "script":
            script("", **table)  # says which script no letter has
        if name == "quality":
            if not (table.get("good") and table.get("bad")):
                raise BadInput("corpus.filters.quality learns from examples: name files or folders in both good and bad.")
            samples += [table["good"], table["bad"]]
    for sources in filter(None, samples):
        next(documents(sources, None, lambda _: None), None)


def _check_mixture(recipe: Recipe) -> None:
    corpus = recipe.corpus
    if not corpus.mixture:
        if corpus.max_repeats != 1:
            raise BadInput(f"corpus.max_repeats = {corpus.max_repeats:g} is of a mixture's sources: give corpus.mixture their weights.")
        return
    for name in corpus.mixture:
        if name.startswith("puzzle:"):
            raise BadInput(f"corpus.mixture is of corpus.sources; how much there is of '{name}', puzzles.{name[7:]}.traces says.")
        if name not in corpus.sources:
            listed = f"corpus.sources ({', '.join(corpus.sources) or 'there are none'})"
            raise BadInput(f"corpus.mixture: '{name}' is not one of {listed}{nearest(name, corpus.sources) or '.'}")
    for source in corpus.sources:
        if corpus.sources.count(source) > 1:
            raise BadInput(f"corpus.sources names '{source}' twice; in a mixture, give it a larger weight in corpus.mixture instead.")
        next(documents([source], None, lambda _: None), None)  # each has a share to fill


def _check_keywords(where: str, function: Any, values: dict[str, Any]) -> None:
    """Each key must be an optional argument of the function, each value shaped like its default."""
    optional = {k: p.default for k, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    for key, value in values.items():
        if key not in optional:
            raise BadInput(f"{where}.{key} is not a known key{nearest(key, optional) or '.'}")
        if not _alike(value, optional[key]):
            raise BadInput(f"{where}.{key} = {value!r} is wrong: it must look like {_example(optional[key])!r}.")


def _example(default: Any) -> Any:
    if isinstance(default, Mapping):
        return {str(key): value for key, value in default.items()}
    return sorted(default) if isinstance(default, frozenset) else list(default) if isinstance(default, tuple) else default


def _alike(value: Any, example: Any) -> bool:
    if isinstance(example, Mapping):  # of n-grams: {"3": 0.2}
        limits = isinstance(value, dict) and all(map(_alike, value.values(), example.values()))
        return limits and all(key.isdecimal() and int(key) > 1 for key in value)
    if isinstance(example, tuple | frozenset):
        return isinstance(value, list | tuple) and all(_alike(item, next(iter(example))) for item in value)
    if isinstance(example, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return example is None or type(value) is type(example)
