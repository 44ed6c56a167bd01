"""Whether the two sides of a split share problems, and how many different ones a side has."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from pascaline.data.dedup import words
from pascaline.data.puzzles import Problem
from pascaline.eval.hygiene.checks import Check, checked, short, skipped
from pascaline.eval.hygiene.subject import Subject, same

GRAM = 5  # words of an n-gram, as in data.dedup.minhash
SIMILAR = 0.6  # Jaccard, of the sets of n-grams, from which two problems are near-duplicates
_FACT = re.compile(r"\d+(?:[.,]\d+)*|[+*/^%=<>×÷−]|(?<!\w)-|-(?=\d)")


def checks(subject: Subject, near: float, unique: float) -> list[Check]:
    """Equal problems on both sides, near-duplicates, and different prompts per 10,000."""
    prompts = [same(problem.prompt) for problem in subject.train]
    share = len(set(prompts)) / len(prompts)
    ok = share >= unique if subject.drawn else None
    of = f"{len(prompts):,} {'draws' if subject.drawn else 'rows'}"
    limit = round(10_000 * unique) if subject.drawn else None
    row = checked("different prompts per 10,000", ok, round(10_000 * share), limit, of)
    if not subject.test:
        why = "one side of the split only; name the other with --test FILE"
        return [skipped("leak", why), skipped("near leak", why), row]
    return [_equal(subject.train, subject.test), _near(subject, near), row]


def _equal(train: Sequence[Problem], test: Sequence[Problem]) -> Check:
    """By prompt, and by key: a key that is finer than the problem puts one problem on both sides."""
    prompts, keys = {same(problem.prompt) for problem in train}, {problem.key for problem in train}
    shared = [problem.prompt for problem in test if same(problem.prompt) in prompts or problem.key in keys]
    note = f"{short(shared[0])} is on both sides" if shared else f"{len(train):,} against {len(test):,}"
    return checked("leak", not shared, len(shared), 0, note)


def _near(subject: Subject, limit: float) -> Check:
    if subject.drawn:
        return skipped("near leak", "the problems of a puzzle are all of one template")
    pairs = near((problem.prompt for problem in subject.train), [problem.prompt for problem in subject.test])
    value = len(pairs) / len(subject.test)
    note = ""
    if pairs:
        prompt, other, similarity = max(pairs, key=lambda pair: pair[2])
        note = f"{short(prompt)} and {short(other)} share {similarity:.0%} of their {GRAM}-grams and all their numbers"
    return checked("near leak", value <= limit, value, limit, note)


def near(train: Iterable[str], test: Sequence[str]) -> list[tuple[str, str, float]]:
    """(test text, the most similar training text, similarity) of each test text that has one of SIMILAR or more, but none that is equal.

    Only texts with the same numbers and signs, in any order, are compared: a template with other numbers is another problem. Exact, by
    an index of n-grams; data.dedup.minhash would name the first of a cluster, and templates are one cluster.
    """
    index: dict[tuple[str, ...], dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    texts, sizes = list[str](), list[int]()
    for text in dict.fromkeys(train):
        grams = _grams(text)
        for gram in grams:
            index[_facts(text)][gram].append(len(texts))
        texts.append(text)
        sizes.append(len(grams))
    found = []
    for text in test:
        grams, bucket = _grams(text), index.get(_facts(text), {})
        shared = Counter(other for gram in grams for other in bucket.get(gram, ()) if same(texts[other]) != same(text))
        likeness = {other: count / (sizes[other] + len(grams) - count) for other, count in shared.items()}
        best = max(likeness, key=lambda other: likeness[other], default=None)
        if best is not None and likeness[best] >= SIMILAR:
            found.append((text, texts[best], likeness[best]))
    return found


def _facts(text: str) -> tuple[str, ...]:
    return tuple(sorted(_FACT.findall(text)))


def _grams(text: str) -> set[tuple[str, ...]]:
    """A text of fewer words is one n-gram, one without a word has none."""
    found = words(text)
    return {tuple(found[i : i + GRAM]) for i in range(max(1, len(found) - GRAM + 1))} if found else set()
