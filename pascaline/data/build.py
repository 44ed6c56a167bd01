"""The real text of a corpus: read, filtered, deduplicated, and rid of what it will be evaluated on, in this order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pascaline.data.dedup import Contamination, decontaminate, exact, minhash
from pascaline.data.filters import Filter, apply, c4, fineweb, gopher_quality, gopher_repetition
from pascaline.data.quality import QualityScore, identity, runs, script
from pascaline.data.sources import Document, Excluded, documents
from pascaline.recipe import Corpus


def quality(*, good: Sequence[str] = ("FILE",), bad: Sequence[str] = ("FILE",), min_score: float = 0.5) -> Filter:
    """A filter that learns from two samples of texts (files or folders), and passes what resembles the good ones."""
    samples = ([document.text for document in documents(list(kind), None, lambda _: None)] for kind in (good, bad))
    return partial(QualityScore.fit(*samples).keep, min_score=min_score)


FILTERS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (gopher_quality, gopher_repetition, c4, fineweb, runs, identity, script, quality)
}


def chosen(tables: dict[str, dict[str, Any]]) -> list[tuple[str, Filter]]:
    """The filters of [corpus.filters.NAME] tables, in their order, with the keywords given there."""
    found: list[tuple[str, Filter]] = []
    for name, table in tables.items():
        # TOML has text for keys: top_ngrams = {3 = 0.2} is of 3-grams
        keywords: dict[str, Any] = {
            key: {int(n): limit for n, limit in v.items()} if isinstance(v, dict) else v for key, v in table.items()
        }
        found.append((name, quality(**keywords) if name == "quality" else partial(FILTERS[name], **keywords)))
    return found


def cleaned(corpus: Corpus, excluded: Excluded, scratch: Path) -> Iterator[Document]:
    """Documents of corpus.sources that pass everything; the others go to `excluded`. Near-deduplication keeps its files in `scratch`."""
    found: Iterable[Document] = documents(corpus.sources, corpus.max_bytes, excluded)
    if corpus.filters:
        found = apply(found, chosen(corpus.filters), excluded)
    if corpus.dedup != "none":
        found = exact(found, excluded)
    if corpus.decontaminate:
        texts = documents(corpus.decontaminate, None, lambda _: None)
        found = decontaminate(found, Contamination((f"{d.source}:{d.id}", d.text) for d in texts), excluded)
    if corpus.dedup == "minhash":
        found = _without_near_copies(found, excluded, scratch)
    yield from found


def _without_near_copies(found: Iterable[Document], excluded: Excluded, scratch: Path) -> Iterator[Document]:
    """`minhash` reads twice, so what came so far is written down: neither filters nor `excluded` run again."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "documents.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for document in found:
            file.write(json.dumps(document) + "\n")

    def written() -> Iterator[Document]:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield Document(*json.loads(line))

    try:
        yield from minhash(written, scratch, excluded)
    finally:
        path.unlink()
