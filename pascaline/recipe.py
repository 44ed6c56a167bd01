"""A recipe: one TOML file that says what a run does. Every key has a type and a default; an unknown key is an error.

`pascaline run recipes/laptop.toml --set rl.steps=50` overrides a key from the command line.
"""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, create_model, model_validator

from pascaline.errors import BadInput, describe_validation, nearest
from pascaline.tables import GRADE, KINDS, Corpus, Eval, Extend, Ledger, Parallel, Pretrain, Puzzle, Rl, Sft, Table, Tokenizer, kind


class Recipe(Table):
    """The whole chain. `model` is a preset name plus overrides (pascaline.model.presets), or `folder`, a Hugging Face folder to start from:
    then there is a pretrain stage only if its table is written. chain: the stages after those that read the corpus, by the names of their
    tables, in their order; a table [KIND-NAME] is a stage of a kind that there is already ([rl-all], [sft-restart]). sinks: tools that are
    given the rows of metrics.jsonl too. `sinks`, `ledger` and `parallel` are no part of what a run is: it goes on with others."""

    seed: int = Field(1, ge=0)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = []
    chain: list[str] = ["sft", "rl"]
    corpus: Corpus = Corpus()
    puzzles: dict[str, Puzzle] = {}
    tokenizer: Tokenizer = Tokenizer()
    model: dict[str, Any] = {"preset": "nano"}
    pretrain: Pretrain | None = Pretrain()
    extend: Extend | None = None
    sft: Sft = Sft()
    rl: Rl = Rl()
    eval: Eval = Eval()
    ledger: Ledger = Ledger()
    parallel: Parallel = Parallel()

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages in their order."""
        read = [name for name in ("pretrain", "extend") if getattr(self, name) is not None]
        corpus = ["corpus"] if read or any(kind(name) == "pretrain" for name in self.chain) else []
        return (*corpus, "tokenizer", *read, *self.chain, "eval")

    @property
    def models(self) -> tuple[str, ...]:
        """The stages whose model others can start from."""
        return tuple(name for name in self.stages if kind(name) in KINDS and kind(name) != "reject" and not self.judges(name))

    @property
    def talkers(self) -> tuple[str, ...]:
        """The stages of the chain whose model answers chats; graders stand apart."""
        return tuple(name for name in self.models if kind(name) not in ("pretrain", "extend") and name not in self.graders)

    @property
    def graders(self) -> tuple[str, ...]:
        """The stages whose model only grades attempts: all puzzles that they name are grade:PUZZLE. None where that is all there is, or
        what the evaluation asks first."""
        if self.eval.puzzles[:1] and self.eval.puzzles[0].startswith(GRADE):
            return ()
        named = {name: getattr(getattr(self, name), "puzzles", []) for name in self.models if kind(name) not in ("pretrain", "extend")}
        found = tuple(name for name, puzzles in named.items() if puzzles and all(puzzle.startswith(GRADE) for puzzle in puzzles))
        return found if len(found) < len(named) else ()

    @property
    def graded(self) -> tuple[str, ...]:
        """The evaluation's puzzles at which attempts can be graded: those whose grade:PUZZLE is in the recipe."""
        return tuple(name for name in self.eval.puzzles if GRADE + name in self.puzzles)

    @property
    def attempts(self) -> tuple[str, ...]:
        """The puzzles grade:PUZZLE that graders are measured on."""
        return tuple(GRADE + name for name in self.graded) if self.graders else ()

    def judges(self, stage: str) -> bool:
        """Whether its model gives scores instead of words."""
        return kind(stage) == "prefer" and getattr(self, stage).method == "reward"

    def plain(self, stage: str) -> bool:
        """Whether its model knows problems as plain text only, as a base model does."""
        return kind(stage) in ("pretrain", "extend") or getattr(getattr(self, stage), "plain", False)

    def before(self, stage: str) -> str | None:
        """The stage whose model this one starts from; None: the folder that the chain starts from, or new weights."""
        if getattr(getattr(self, stage), "model", None):
            return None
        if own := getattr(getattr(self, stage), "start", ""):
            return str(own)
        place = self.stages.index(stage)
        return next((name for name in reversed(self.models) if self.stages.index(name) < place), None)

    def environment(self, stage: str) -> str:
        """What a stage's model acts in: the stage's own, or else that of a stage whose chats it learns, or whose model it starts from."""
        table = getattr(self, stage)
        if own := getattr(table, "environment", ""):
            return "" if own == "none" else str(own)
        sources = [*getattr(table, "data", []), self.before(stage)]
        return next((found for source in sources if source in self.stages and (found := self.environment(source))), "")

    def taught(self, stage: str) -> dict[str, Puzzle]:
        """The puzzles whose examples an sft stage teaches: those that it names, or all."""
        named = getattr(self, stage).puzzles
        return {name: table for name, table in self.puzzles.items() if not named or name in named}

    @property
    def start(self) -> str | None:
        """The folder whose weights, tokenizer and shape the chain starts from, if it does not start from nothing."""
        return self.model.get("folder")

    @model_validator(mode="before")
    @classmethod
    def _started(cls, raw: Any) -> Any:
        """Weights that come from elsewhere are trained already."""
        model = raw.get("model") if isinstance(raw, dict) else None
        if not isinstance(model, dict) or "folder" not in model:
            return raw
        if not isinstance(model["folder"], str):
            raise ValueError("model.folder must be the path of a model folder")
        if set(model) != {"folder"}:
            raise ValueError(f"model.folder brings its own shape; leave out model.{min(set(model) - {'folder'})}")
        return {"pretrain": None, **raw}

    @model_validator(mode="after")
    def _chained(self) -> "Recipe":
        """Every stage has a table, every table a place, and starts from what is there by then."""
        tables = [name for name in type(self).model_fields if kind(name) in KINDS]
        for at, name in enumerate(self.chain):
            if name not in tables or name in ("pretrain", "extend"):
                raise ValueError(f"chain names '{name}', and there is no table [{name}]{nearest(name, tables)}")
            if name in self.chain[:at]:
                raise ValueError(f"chain has '{name}' twice: give the second a table of its own, like [{kind(name)}-again]")
        for name in tables:
            if name not in (*Recipe.model_fields, *self.chain):
                raise ValueError(f"[{name}] has no place in the chain: add it to `chain` ({', '.join(self.chain)})")
        for name in self.chain:
            start = getattr(getattr(self, name), "start", "")
            known = [model for model in self.models if self.stages.index(model) < self.stages.index(name)]
            if start and getattr(getattr(self, name), "model", None):
                raise ValueError(f"{name} has both a start and a model of its own, whose weights are new: leave one of them out")
            if start and start not in known:
                listed = ", ".join(known) or "none"
                raise ValueError(f"{name}.start = '{start}' is no earlier stage with a model ({listed}){nearest(start, known)}")
        if not self.talkers:
            raise ValueError("chain has no stage that teaches the model to answer, like sft")
        return self

    @model_validator(mode="before")
    @classmethod
    def _held_out(cls, raw: Any) -> Any:
        """What extend is judged on: a fiftieth of the documents, unless the recipe says how many."""
        if not isinstance(raw, dict) or raw.get("extend") is None or not isinstance(raw.get("corpus", {}), dict):
            return raw
        return {**raw, "corpus": {"held_out": 0.02, **raw.get("corpus", {})}}


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file and apply overrides ("rl.steps": 50). Any mistake is BadInput naming file, key and what would be right."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"there is no recipe {path}{_siblings(path)}") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise BadInput(f"{path} is not a recipe: it must be a TOML text file.") from None
    except tomllib.TOMLDecodeError as e:
        raise BadInput(f"{path} is not valid TOML: {e}.") from None
    for key, value in (overrides or {}).items():
        _put(raw, key, value)
    return parse(raw, str(path))


def parse(raw: dict[str, Any], where: str) -> Recipe:
    """A recipe from what a TOML or JSON file holds; a mistake is BadInput that begins with `where`."""
    shape = _with(tuple(sorted(name for name in raw if name not in Recipe.model_fields and kind(name) in KINDS)))
    try:
        return shape.model_validate(raw)
    except ValidationError as e:
        raise BadInput(describe_validation(e, where, shape.model_fields)) from None


@cache
def _with(tables: tuple[str, ...]) -> type[Recipe]:
    """A recipe that has these tables too; each is of the kind that its name begins with."""
    fields: dict[str, Any] = {name: (KINDS[kind(name)], ...) for name in tables}
    return create_model("Recipe", __base__=Recipe, **fields) if fields else Recipe


def read_setting(text: str) -> tuple[str, Any]:
    """`rl.steps=50` -> ("rl.steps", 50). The value is TOML; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"--set {text!r} must look like rl.steps=50.")
    try:
        read = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
    return key.strip(), read["value"] if len(read) == 1 else value.strip()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two resolved recipes differ."""
    out = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}")
    return out


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every key written out."""
    lines: list[str] = []

    def table(values: dict[str, Any], name: str) -> None:
        plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
        if name and (plain or not values):
            lines.append(f"\n[{name}]")
        lines.extend(f"{_toml_key(k)} = {_toml(v)}" for k, v in plain.items() if v is not None)
        for key, value in values.items():
            if isinstance(value, dict):
                table(value, f"{name}.{_toml_key(key)}" if name else _toml_key(key))

    table(recipe.model_dump(), "")
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    return key if key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key) else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        import json

        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's surrogate pairs are not TOML
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise BadInput(f"--set {key}: {part} is not a table.")
    raw[last] = value


def _siblings(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    return nearest(path.name, names) or "."
