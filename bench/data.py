"""Cleaning a corpus (four published filter families and exact deduplication) against datatrove's local executor, bytes of text per
second and core; and writing token shards against calling `tokenizers` in batches. Needs pip install 'pascaline[bench-data]'."""

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from _common import alternate, arguments, best, finish
from tokenizers import Tokenizer as Peer

from pascaline import tokenizer as tokenizers
from pascaline.data.build import cleaned
from pascaline.data.shards import ShardWriter
from pascaline.errors import BadInput
from pascaline.tables import Corpus

PIECE = 3000
BATCH = 1000
FAMILIES = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


def texts() -> list[str]:
    """Python's own documentation (pydoc's topics) in pieces of about 3 kB, one in ten of them twice: prose that every machine has."""
    draw = random.Random(0)
    found: list[str] = []
    for _, topic in sorted(topics.items()):
        found += [topic[i : i + PIECE] for i in range(0, len(topic), PIECE)]
    found += draw.sample(found, len(found) // 10)
    draw.shuffle(found)
    return found


def ours(source: Path, folder: Path, size: int) -> Callable[[], int]:
    def work() -> int:
        corpus = Corpus(sources=[str(source)], max_bytes=10**12, filters={name: {} for name in FAMILIES}, dedup="exact")
        with open(folder / "ours.jsonl", "w") as kept, open(folder / "excluded.jsonl", "w") as excluded:
            for document in cleaned(corpus, lambda entry: excluded.write(json.dumps(entry) + "\n"), folder):
                kept.write(json.dumps(document._asdict()) + "\n")
        return size

    return work


def theirs(source: Path, folder: Path, size: int) -> Callable[[], int]:
    try:
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline import dedup, filters
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.writers import JsonlWriter
        from datatrove.utils.logging import logger
    except ImportError as error:
        raise BadInput(f"bench data compares with datatrove ({error}); install it: pip install 'pascaline[bench-data]'.") from error
    logger.remove()
    config = dedup.ExactDedupConfig(content_getter=lambda document: document.text)
    families = [filters.GopherRepetitionFilter, filters.GopherQualityFilter, filters.C4QualityFilter, filters.FineWebQualityFilter]
    runs = iter(range(10**6))

    def work() -> int:
        place = folder / f"peer-{next(runs)}"

        def run(*steps: Any) -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                LocalPipelineExecutor(list(steps), tasks=1, workers=1, logging_dir=str(place / "log" / str(next(runs)))).run()

        passed, signatures, doubles = (str(place / name) for name in ("passed", "signatures", "doubles"))
        run(JsonlReader(str(source.parent)), *(family() for family in families), JsonlWriter(passed, compression=None))
        run(JsonlReader(passed), dedup.ExactDedupSignature(signatures, config))
        run(dedup.ExactFindDedups(signatures, doubles, config))
        run(JsonlReader(passed), dedup.ExactDedupFilter(doubles, config), JsonlWriter(str(place / "kept"), compression=None))
        return size

    return work


def tokenizing(found: list[str], folder: Path, size: int) -> dict[str, Callable[[], int]]:
    own = tokenizers.train(iter(found), 1024)
    own.save(folder / "tokenizer")
    peer = Peer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def batches() -> Iterator[list[str]]:
        return (found[i : i + BATCH] for i in range(0, len(found), BATCH))

    def shards() -> int:
        with ShardWriter(folder / "shards", own.vocab_size) as writer:
            for batch in batches():
                for ids in own.encode_batch(batch):
                    writer.add([own.begin, *ids, own.end], "bench")
        return size

    def plain() -> int:
        for batch in batches():
            [encoding.ids for encoding in peer.encode_batch(batch)]
        return size

    return {"pascaline shards": shards, "tokenizers plain": plain}


def main() -> None:
    options = arguments(__doc__ or "", rounds=3)
    found = texts()
    size = sum(len(text.encode()) for text in found)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in" / "texts.jsonl"
        source.parent.mkdir()
        source.write_text("".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(found)))
        clean = alternate({"pascaline": ours(source, folder, size), "datatrove": theirs(source, folder, size)}, options.rounds)
        tokens = alternate(tokenizing(found, folder, size), options.rounds, seconds=2.0)
    (_, fast), (_, slow) = best(clean, "pascaline"), best(clean, "datatrove")
    (_, shards), (_, plain) = best(tokens, "pascaline"), best(tokens, "tokenizers")
    finish(
        {
            "ratio": {"clean": fast / slow, "tokenize": shards / plain},
            "bytes_per_s": {"pascaline": fast, "datatrove": slow, "pascaline shards": shards, "tokenizers": plain},
            "documents": len(found),
            "bytes": size,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
