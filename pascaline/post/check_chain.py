"""What the stages of a chain ask for that cannot work, said before anything starts. Imports no torch."""

from collections import deque
from pathlib import Path

from pascaline.data import chats, pairs
from pascaline.data.puzzles.families import Family
from pascaline.errors import BadInput, nearest
from pascaline.post import environments, verifiers
from pascaline.post.environments import worked
from pascaline.recipe import Recipe
from pascaline.tables import Prefer, Puzzle, Sft, kind


def check_chain(recipe: Recipe) -> None:
    """Every file, earlier stage, verifier and environment that a stage names must be there by then (BadInput)."""
    for name in recipe.chain:
        stage = getattr(recipe, name)
        if kind(name) == "sft":
            _check_chats(recipe, name)
        if isinstance(stage, Prefer):
            _check_pairs(recipe, name, stage)
        judges = [earlier for earlier in recipe.chain[: recipe.chain.index(name)] if recipe.judges(earlier)]
        for verifier in (*getattr(stage, "rewards", ()), *getattr(stage, "checks", ())):
            if verifier not in judges:
                verifiers.get(verifier)
        reward = getattr(stage, "reward", "")
        if reward and reward not in judges:
            listed = ", ".join(judges) or "none"
            raise BadInput(
                f"{name}.reward = '{reward}' is no earlier stage [prefer] with method = \"reward\" ({listed}){nearest(reward, judges)}"
            )
        environment = recipe.environment(name)
        if getattr(stage, "plain", False) and (environment or stage.confession):
            raise BadInput(f"{name}.plain is text without chat tokens, and environments and confessions need a chat's turns; leave one out "
                           f"({name}.environment = 'none' leaves that of the stage before).")  # fmt: skip
        if environment:
            environments.get(environment)
            _check_worked(recipe, name, environment)
    if recipe.eval.grader:
        _check_grader(recipe)


def _check_grader(recipe: Recipe) -> None:
    """The model that grades must answer chats, and there must be attempts that it can grade."""
    name, known = recipe.eval.grader, [*recipe.talkers, *recipe.graders]
    if name not in known:
        raise BadInput(f"eval.grader = '{name}' is no stage whose model answers chats ({', '.join(known)}){nearest(name, known) or '.'}")
    if recipe.plain(name):
        raise BadInput(f"eval.grader = '{name}' knows plain text only, and an attempt to be graded is a chat; name another stage.")
    if not recipe.graded:
        first = recipe.eval.puzzles[0]
        raise BadInput(f"eval.grader = '{name}' has nothing to grade: the recipe has grade:PUZZLE for none of eval.puzzles "
                       f"({', '.join(recipe.eval.puzzles)}); leave it out, or add a table [puzzles.\"grade:{first}\"].")  # fmt: skip


def _check_chats(recipe: Recipe, name: str) -> None:
    """There must be chats, and files whole: a bad line would come up only when the stages before are done."""
    stage: Sft = getattr(recipe, name)
    if not stage.data and not (stage.examples and any(t.examples for t in recipe.taught(name).values())):
        raise BadInput(f"{name} has nothing to learn from: give a puzzle some examples (puzzles.countdown.examples = 3000), or name files "
                       f"in {name}.data.")  # fmt: skip
    writers = [other for other in recipe.stages[: recipe.stages.index(name)] if kind(other) == "reject"]
    for source in stage.data:
        if source in recipe.stages and source not in writers:
            raise BadInput(f"{name}.data: '{source}' is no earlier stage that writes chats ({', '.join(writers) or 'there is none'}).")
        if source not in writers:
            if not Path(source).exists():
                near = nearest(source, writers)
                raise BadInput(f"{name}.data: there is no file '{source}', and no earlier stage of that name{near or '.'}")
            deque(chats.stream(source), maxlen=0)


def _check_worked(recipe: Recipe, name: str, environment: str) -> None:
    """What a stage learns from the puzzles' own examples must be what the environment is played with."""
    stage, tables = getattr(recipe, name), dict[str, Puzzle]()
    if kind(name) == "sft" and stage.examples:
        tables = recipe.taught(name)
    elif kind(name) == "distil" and stage.method == "logits" and not stage.data:
        tables = recipe.puzzles
    for puzzle, table in tables.items():
        if table.examples:
            worked.check(Family(puzzle, table), environment, recipe.seed)


def _check_pairs(recipe: Recipe, name: str, stage: Prefer) -> None:
    """The files must hold pairs; which stages write some is known by their kind."""
    writers = [s for s in recipe.chain[: recipe.chain.index(name)] if kind(s) == "reject"]
    if not stage.data:
        raise BadInput(f"{name} has nothing to learn from: name files of pairs, or earlier stages that write some, in {name}.data.")
    for source in stage.data:
        if source in recipe.stages and source not in writers:
            listed = ", ".join(writers) or "none; [reject] would be one"
            raise BadInput(f"{name}.data: '{source}' is no earlier stage that writes pairs (there are {listed}).")
        if source not in recipe.stages:
            pairs.read(source)
