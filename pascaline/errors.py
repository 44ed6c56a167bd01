"""The one exception that a user's mistake raises."""

from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, get_args, get_origin


class BadInput(ValueError):
    """What is wrong, where, and what would be right, in one sentence. The CLI prints it and exits with 2."""


def nearest(word: str, known: Iterable[object]) -> str:
    """`; did you mean 'x'?` for the closest of the known words, or nothing when none is close."""
    import difflib

    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def describe_validation(error: Any, where: str, fields: Mapping[str, Any]) -> str:
    """The first problem of a pydantic ValidationError as one sentence with the field's full name and the nearest known key.

    where: a file, or the name of a table in one; fields: `model_fields` of the class that was validated.
    """
    import reprlib

    first = error.errors()[0]
    path = [str(p) for p in first["loc"]]
    name = where + ("." if where.isidentifier() and path else ": " if path else "") + ".".join(path)
    if first["type"] == "extra_forbidden":
        close = nearest(path[-1], _inside(fields, path[:-1]))
        return f"{name} is not a known key{close}{'' if close else '.'}"
    if first["type"] == "missing":
        return f"{name} is missing."
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}."
    if first["type"] == "model_type":
        return f"{name} must be a table."
    return f"{name} = {reprlib.repr(first['input'])} is wrong: {first['msg'][0].lower()}{first['msg'][1:]}."


def _inside(fields: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The fields of the table at `path` below a class with these fields; none where keys are free."""
    kind: Any = None
    for part in path:
        if get_origin(kind) is dict and len(get_args(kind)) == 2:  # a table of tables: [puzzles.countdown]
            kind = get_args(kind)[1]
        elif part in fields:
            kind = fields[part].annotation
            kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind  # a table that may be absent: Extend | None
        else:
            return {}
        fields = getattr(kind, "model_fields", {})
    return fields
