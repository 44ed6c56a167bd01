"""The corpus stage: what it says of a mixture, that it stops when asked, and that it needs little memory for much text."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from pascaline.data.shards import Corpus as Shards
from pascaline.post import stages
from pascaline.recipe import parse

COIN = Path(__file__).parent.parent / "coin.toml"
WORDS = ["river", "engine", "garden", "letter", "winter", "market", "teacher", "bridge", "window", "captain", "library", "mountain"]


def write(path: Path, number: int, words: int) -> str:
    draw = random.Random(path.name)
    with open(path, "w") as file:
        for n in range(number):
            file.write(json.dumps({"text": f"{path.stem} {n} " + " ".join(draw.choices(WORDS, k=words))}) + "\n")
    return str(path)


def rows(card: Path) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.read_text().splitlines() if line.startswith("|")]


def staged(out: Path, corpus: dict[str, Any], quiet: bool = False) -> stages.Run:
    raw = {"corpus": corpus, "puzzles": {"countdown": {"traces": 20}}, "tokenizer": {"vocab_size": 300}}
    run = stages.Run(parse(raw, "here"), out, torch.device("cpu"), torch.float32, quiet)
    for stage in ("corpus", "tokenizer"):
        run.folder(stage).mkdir(parents=True)
    return run


def test_the_cards_tell_a_mixture_in_bytes_and_in_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, small = write(tmp_path / "large.jsonl", 200, 30), write(tmp_path / "small.jsonl", 10, 30)
    run = staged(
        tmp_path / "run", {"sources": [large, small], "max_bytes": 20_000, "mixture": {large: 3.0, small: 1.0}, "max_repeats": 2.0}
    )
    stages.corpus(run)
    card = run.folder("corpus") / "card.md"
    have = 2 * sum(len(json.loads(line)["text"]) for line in Path(small).read_text().splitlines())
    (of_large,), (of_small,) = ([row for row in rows(card) if row[0] == source and "times" in row[-1]] for source in (large, small))
    assert of_large[1:] == ["75.0%", f"{15_000 / (15_000 + have):.1%}", "15,000", "1.00 times"]
    assert of_small[1:] == ["25.0%", f"{have / (15_000 + have):.1%}", f"{have // 2:,}", "2.00 times"]
    sentence = f"'{small}' fills {have:,} of the 5,000 bytes that corpus.mixture asks for"
    assert sentence in card.read_text() and capsys.readouterr().err.count(f"corpus: {sentence}") == 1
    stages.tokenizer(run)
    shards = Shards(run.folder("tokenizer") / "shards")
    ends = [*map(int, shards.starts[1:]), shards.tokens]
    counted = dict.fromkeys(shards.sources, 0)
    for source, start, end in zip(shards.source_ids, shards.starts, ends, strict=True):
        counted[shards.sources[source]] += end - int(start)
    table = rows(shards.folder / "card.md")
    for source, tokens in counted.items():
        assert [source, f"{tokens:,}", f"{tokens / shards.tokens:.1%}"] in [[row[0], *row[2:]] for row in table if len(row) == 4]
    text = counted[large] + counted[small]
    assert [small, "25.0%", f"{counted[small] / text:.1%}"] in table and [large, "75.0%", f"{counted[large] / text:.1%}"] in table
    assert "puzzle:countdown" in counted and not (run.folder("corpus") / "scratch").exists()


def test_without_a_mixture_nothing_is_said_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = staged(tmp_path / "run", {"sources": [write(tmp_path / "a.jsonl", 300, 30)]})
    stages.corpus(run)
    assert "Mixture" not in (run.folder("corpus") / "card.md").read_text()
    said = r"corpus: 0 documents\ncorpus: done, 320 documents  .* s  kept 320  docs/s \d+(\.\d+)?k?\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_ctrl_c_while_others_filter_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "big.jsonl", 2000, 1500)
    settings = [f'corpus.sources=["{source}"]', "corpus.max_bytes=100_000_000", "corpus.processes=2", "corpus.filters.gopher_repetition={}"]
    out = tmp_path / "run"
    running = forked.start(tmp_path, "run", COIN, "--out", out, *(part for setting in settings for part in ("--set", setting)))
    children = Path(f"/proc/{running.process.pid}/task")
    workers: list[str] = []
    deadline = time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < deadline and running.process.is_alive():
        started = [pid for task in children.glob("*/children") for pid in task.read_text().split()]
        workers = [pid for pid in started if os.getsid(int(pid)) == int(pid)]  # a terminal's Ctrl-C does not reach them
        time.sleep(0.002)
    assert len(workers) == 2
    os.kill(running.process.pid or 0, signal.SIGINT)
    code, said, err = running.wait()
    assert (code, said) == (130, "") and "Traceback" not in err
    assert err.splitlines()[-1] == "pascaline: stopped while gathering the corpus; run the same command to go on."
    assert not list((out / "01-corpus").iterdir())
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


MEASURE = """
import re, resource, sys, threading
from pathlib import Path
threading.stack_size(1 << 18)  # it counts, and is not what this is about
import torch
from pascaline.data import parallel
from pascaline.data.sources import documents
from pascaline.post import stages
from pascaline.recipe import parse

source, out = sys.argv[1], Path(sys.argv[2])
parallel.CHUNK = 1 << 16
now = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + 8_000_000, now + 8_000_000))
for mixture in ({}, {source: 1.0}):
    corpus = {"sources": [source], "max_bytes": 100_000_000, "dedup": "exact", "filters": {"identity": {}}, "processes": 2}
    recipe = parse({"corpus": corpus | {"mixture": mixture}}, "here")
    print(stages.corpus(stages.Run(recipe, out, torch.device("cpu"), torch.float32, quiet=True))["bytes"])
try:
    list(documents([source], None, print))
except MemoryError:
    print("the limit holds")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_corpus_ten_times_the_memory_passes(tmp_path: Path) -> None:
    """8 MB beyond what the program itself takes, for 80 MB of text, plain and as a mixture."""
    block = " ".join(random.Random(1).choices(WORDS, k=5000))
    with open(tmp_path / "big.jsonl", "w") as file:
        for n in range(2300):
            file.write(json.dumps({"text": f"{n} {block[n:]}"}) + "\n")
    size = sum(len(f"{n} {block[n:]}") for n in range(2300))
    assert size > 80_000_000
    command = [sys.executable, "-c", MEASURE, tmp_path / "big.jsonl", tmp_path / "run"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.stdout.split("\n") == [str(size), str(size), "the limit holds", ""], done.stderr
