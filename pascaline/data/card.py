"""card.md: what a corpus is made of, for people. In bytes when it is gathered, in tokens when they are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from pascaline.data.mixture import Share, missing, wanted
from pascaline.tables import Corpus


def corpus_card(corpus: Corpus, kept: Counter[str], size: Counter[str], left: Counter[tuple[str, str]], shares: Mapping[str, Share]) -> str:
    """kept: documents, and size: bytes, of each source; left: how many files or documents of a (source, filter) were left out;
    shares: of a mixture."""
    seen = {s: kept[s] + sum(n for (source, _), n in left.items() if source == s) for s in {*kept, *(s for s, _ in left)}}
    lines = ["# Corpus", "", "| source | documents | bytes | share of bytes |", "|---|---|---|---|"]
    lines += [f"| {s} | {n:,} | {size[s]:,} | {size[s] / max(size.total(), 1):.1%} |" for s, n in kept.items()]
    if shares:
        lines += _mixture(corpus, size, shares)
    lines += ["", "Left out (excluded.jsonl):", "", "| source | filter | files or documents | share of the source's |", "|---|---|---|---|"]
    lines += [f"| {s} | {why} | {n:,} | {n / seen[s]:.1%} |" for (s, why), n in sorted(left.items())]
    return "\n".join([*lines, ""])


def _mixture(corpus: Corpus, size: Counter[str], shares: Mapping[str, Share]) -> list[str]:
    whole, total = wanted(corpus), max(sum(size[s] for s in shares), 1)
    lines = ["", "Mixture (tokens are in 02-tokenizer/shards/card.md):", ""]
    lines += ["| source | wanted | share of its bytes | bytes without repeats | each is there |", "|---|---|---|---|---|"]
    for s, share in shares.items():
        lines.append(f"| {s} | {whole[s]:.1%} | {size[s] / total:.1%} | {share.found:,} | {size[s] / max(share.found, 1):.2f} times |")
    lines += ["", *(f"- {line}" for line in missing(corpus, shares))]
    return lines


def token_card(corpus: Corpus, documents: Counter[str], tokens: Counter[str]) -> str:
    """documents and tokens of each source. Beside a mixture's wanted shares stand those of its tokens, puzzles not counted."""
    lines = ["# Tokens", "", "| source | documents | tokens | share of tokens |", "|---|---|---|---|"]
    lines += [f"| {s} | {n:,} | {tokens[s]:,} | {tokens[s] / tokens.total():.1%} |" for s, n in documents.items()]
    if corpus.mixture:
        total = max(sum(tokens[s] for s in corpus.sources), 1)
        lines += ["", "Mixture:", "", "| source | wanted | share of its tokens |", "|---|---|---|"]
        lines += [f"| {s} | {share:.1%} | {tokens[s] / total:.1%} |" for s, share in wanted(corpus).items()]
    return "\n".join([*lines, ""])
