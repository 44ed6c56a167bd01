"""The one exception that a user's mistake raises."""


class BadInput(ValueError):
    """What is wrong, where, and what would be right, in one sentence. The CLI prints it and exits with 2."""


def nearest(word: str, known: object) -> str:
    """`; did you mean 'x'?` for the closest of the known words, or nothing when none is close."""
    import difflib

    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)  # type: ignore[attr-defined]
    return f"; did you mean '{close[0]}'?" if close else ""


def describe_validation(error: object, where: str, known: object) -> str:
    """The first problem of a pydantic ValidationError as one sentence with the field's full name and the nearest known key.

    `known` maps a dotted prefix ("" at the root) to the keys allowed there, or is a plain list of keys.
    """
    first = error.errors()[0]  # type: ignore[attr-defined]
    path = [str(p) for p in first["loc"]]
    name = ".".join([where, *path] if where else path)
    if first["type"] == "extra_forbidden":
        keys = known.get(".".join(path[:-1]), ()) if isinstance(known, dict) and "" in known else known
        return f"{name} is not a known key{nearest(path[-1], keys)}."
    if first["type"] == "missing":
        return f"{name} is missing."
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}."
    return f"{name} = {first['input']!r} is wrong: {first['msg'][0].lower()}{first['msg'][1:]}."
