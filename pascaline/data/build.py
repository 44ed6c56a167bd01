"""The real text of a corpus: read, filtered, deduplicated, and rid of what it will be evaluated on, in this order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pascaline.data.dedup import Contamination, Kept, decontaminate, exact, minhash
from pascaline.data.filters import Filter, c4, fineweb, gopher_quality, gopher_repetition
from pascaline.data.mixture import Share, Spool, mixed
from pascaline.data.parallel import Workers
from pascaline.data.quality import QualityScore, identity, runs, script
from pascaline.data.sources import Document, Excluded, documents
from pascaline.tables import Corpus


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


def cleaned(
    corpus: Corpus,
    excluded: Excluded,
    scratch: Path,
    *,
    seed: int = 0,
    watch: Callable[[int], None] = lambda read: None,
    shares: dict[str, Share] | None = None,
) -> Iterator[Document]:
    """Documents of corpus.sources that pass everything, in the shares of corpus.mixture if there is one; the others go to `excluded`.

    scratch: near-deduplication and a mixture keep their files there. watch: called often, with the number of documents just
    read; what it raises ends the work. shares: filled for a mixture. corpus.processes does not change the result.
    """
    kept, exams = Kept(), _contamination(corpus)

    def passing(workers: Workers, sources: list[str], max_bytes: int | None) -> Generator[Document, None, None]:
        def read(excluded: Excluded) -> Iterator[Document]:
            for document in documents(sources, max_bytes, excluded):
                watch(1)
                yield document

        found: Iterable[Document] = workers.apply(read, excluded) if workers.filters else read(excluded)
        if exams and corpus.mixture:  # reads ahead: `exact` must know nothing of what there is no room for
            found = decontaminate(found, exams, excluded)
        if corpus.dedup != "none":
            found = exact(found, excluded, kept)
        if exams and not corpus.mixture:
            found = decontaminate(found, exams, excluded)
        yield from found

    with Workers(chosen(corpus.filters), corpus.processes) as workers:
        if corpus.mixture:
            streams = {source: passing(workers, [source], None) for source in corpus.sources}
            yield from mixed(corpus, streams, scratch, excluded, seed=seed, watch=watch, shares={} if shares is None else shares)
        elif corpus.dedup == "minhash":
            yield from _without_near_copies(passing(workers, corpus.sources, corpus.max_bytes), excluded, scratch, watch)
        else:
            yield from passing(workers, corpus.sources, corpus.max_bytes)


def _contamination(corpus: Corpus) -> Contamination | None:
    if not corpus.decontaminate:
        return None
    texts = documents(corpus.decontaminate, None, lambda _: None)
    return Contamination((f"{d.source}:{d.id}", d.text) for d in texts)


def _without_near_copies(found: Iterable[Document], excluded: Excluded, scratch: Path, watch: Callable[[int], None]) -> Iterator[Document]:
    """`minhash` reads twice, so what came so far is written down: neither filters nor `excluded` run again."""
    with Spool(scratch / "documents.jsonl", watch) as spool:
        for document in found:
            spool.add(document)
        yield from minhash(spool.read, scratch, excluded)
