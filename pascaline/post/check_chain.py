"""What the stages of a chain ask for that cannot work, said before anything starts. Imports no torch."""

from collections import deque
from pathlib import Path

from pascaline.data import chats, pairs
from pascaline.errors import BadInput, nearest
from pascaline.post import environments, verifiers
from pascaline.recipe import Recipe
from pascaline.tables import Prefer, Sft, kind


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
        if getattr(stage, "plain", False) and (stage.environment or stage.confession):
            raise BadInput(
                f"{name}.plain is text without chat tokens, and environments and confessions need a chat's turns; leave one out."
            )
        if environment := getattr(stage, "environment", ""):
            environments.get(environment)


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
