"""A table [puzzles.NAME] of a recipe: where its problems come from, a generator or a file, and who judges their answers."""

import json
import random
from dataclasses import dataclass, replace

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Trace, collection
from pascaline.errors import BadInput
from pascaline.tables import Puzzle


@dataclass(frozen=True)
class Family:
    name: str
    table: Puzzle

    def problems(self, count: int, seed: int, held_out: bool) -> list[Problem]:
        """`count` problems of one side of the split, the same for the same arguments; a longer list begins like a shorter.

        A file without a `test` file beside it is split as generated problems are, by a hash of the problem; where there is one, it is the
        held-out side, and what occurs in it is never trained on. Held-out problems are all different; BadInput where there are too few.
        """
        table = self.table
        if table.file is None:
            found = puzzles.problems(self.name, count, seed, held_out, **table.dials)
            if not table.verifier:
                return found
            return [replace(p, verifier=table.verifier, data={**p.data, **table.columns}) for p in found]
        side = self.side(held_out)
        found = collection.drawn(side, count, seed, again=not held_out)
        if len(found) < count:
            which = "held-out" if held_out else "training"
            raise BadInput(f"puzzle '{self.name}': {table.file} has {len(found)} {which} problems, {count} were asked for; ask for fewer.")
        return found

    def side(self, held_out: bool) -> list[Problem]:
        """All problems of a file on one side of the split, in its order."""
        rows = self._read(self.table.file or "")
        if self.table.test is None:
            return [p for p in rows if puzzles.held_out(p.key) == held_out]
        tested = self._read(self.table.test)
        if held_out:
            return list(tested)
        keys = {p.key for p in tested}
        return [p for p in rows if p.key not in keys]

    def trace(self, problem: Problem, rng: random.Random) -> Trace:
        """A worked solution to learn from."""
        if self.table.file is not None:
            return collection.trace(problem)
        return puzzles.get(self.name).trace(problem, rng, **self.table.quality)

    def turns(self, problem: Problem, environment: str, rng: random.Random) -> list[Trace]:
        """A worked episode in an environment; BadInput for a puzzle that writes none."""
        write = None if self.table.file is not None else getattr(puzzles.get(self.name), "turns", None)
        if write is None:
            raise BadInput(f"puzzle '{self.name}' writes no worked episodes, from which environment '{environment}' could be learnt: set "
                           "its examples to 0, or give it `turns` (docs/post-training.md).")  # fmt: skip
        return list(write(problem, environment, rng))

    def _read(self, path: str) -> tuple[Problem, ...]:
        return collection.read(path, self.name, self.table.verifier, json.dumps(self.table.columns))
