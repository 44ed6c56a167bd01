"""Plugins of others: what an entry point or a `module:function` path names."""

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from pascaline.errors import BadInput, nearest


def load(kind: str, name: str, group: str, built_in: Mapping[str, Any], make: Callable[[Any], Any] = lambda found: found) -> Any:
    """What `make` makes of the object of this name: at the path that built_in has for it, of the entry-point group, or at
    `module:function`. BadInput for an unknown name, and for what cannot be loaded or made; kind: what it is called there."""
    points = {point.name: point for point in entry_points(group=group)}
    path = built_in.get(name, name)
    if ":" not in path and name not in points:
        known = [*built_in, *points]
        raise BadInput(f"no {kind} '{name}'{nearest(name, known)} (there are {', '.join(known)}; or module:function)")
    module, _, attribute = path.partition(":")
    try:
        return make(points[name].load() if path == name in points else getattr(importlib.import_module(module), attribute))
    except Exception as error:  # a plugin is the user's code: whatever it raises is told in one sentence
        raise BadInput(f"{kind} '{name}' cannot be loaded: {type(error).__name__}: {error}") from error
