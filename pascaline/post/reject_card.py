"""What rejection sampling sampled and kept, in numbers and as a card for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pascaline.data.puzzles import Verdict

if TYPE_CHECKING:
    from pascaline.post.reject import Answer, Group

BANDS = ("never solved", "up to 25 %", "25 to 50 %", "50 to 75 %", "over 75 %")
TOLD = {
    "wrong": "wrong",
    "truncated": "of these cut off at max_tokens",
    "unclosed": "of these without an answer behind the thought",
    "abstain": "gave up",
    "unjudged": "could not be judged",
    "right": "right",
    "refused": "right but refused",
}


def facts(groups: list[Group], distinct: list[list[Answer]], accepted: list[list[Answer]], kept: list[list[Answer]]) -> dict[str, Any]:
    """Counts of answers, from all that were sampled down to those kept; the same by puzzle and by band of solve rates; tokens."""
    answers = [a for g in groups for a in g.answers]
    right = [a for a in answers if a.verdict == Verdict.RIGHT]
    wrong = [a for a in answers if a.verdict == Verdict.WRONG]
    refused = Counter(a.refused for a in right if a.refused)
    sizes = [sum(map(len, some)) for some in (distinct, accepted, kept)]
    last = [a for row in kept for a in row]
    counts = {
        "sampled": len(answers), "wrong": len(wrong), "truncated": sum(a.cut for a in wrong), "unclosed": sum(not a.closed for a in wrong),
        **{v.value: sum(a.verdict == v for a in answers) for v in (Verdict.ABSTAIN, Verdict.UNJUDGED)},
        "right": len(right), "refused": refused.total(), "duplicates": len(right) - refused.total() - sizes[0],
        "surplus": sizes[0] - sizes[1], "unbalanced": sizes[1] - sizes[2],
    }  # fmt: skip
    rows = list(zip(groups, accepted, kept, strict=True))
    puzzles = sorted({g.problem.puzzle for g in groups})
    bands = [_row([row for row in rows if row[0].band == band]) for band in range(len(BANDS))]
    return {
        "answers": counts, "refused": dict(sorted(refused.items())), "kept": len(last),
        "puzzles": {name: _row([row for row in rows if row[0].problem.puzzle == name]) for name in puzzles},
        "bands": dict(zip(BANDS, bands, strict=True)),
        "tokens": {"right": _mean(right), "wrong": _mean(wrong), "kept": _mean(last), "kept_total": sum(a.tokens for a in last)},
        "exact": sum(a.exact for a in last),
    }  # fmt: skip


def _row(rows: list[tuple[Group, list[Answer], list[Answer]]]) -> dict[str, int]:
    return {
        "problems": len(rows),
        "solved": sum(g.count(Verdict.RIGHT) > 0 for g, _, _ in rows),
        "right": sum(g.count(Verdict.RIGHT) for g, _, _ in rows),
        "accepted": sum(len(answers) for _, answers, _ in rows),
        "kept": sum(len(answers) for _, _, answers in rows),
    }


def _mean(answers: list[Answer]) -> float | None:
    return sum(a.tokens for a in answers) / len(answers) if answers else None


def card(name: str, told: dict[str, Any]) -> str:
    """card.md, from the content of reject.json."""
    counts, of = told["answers"], max(told["answers"]["sampled"], 1)
    problems = sum(row["problems"] for row in told["puzzles"].values())
    asked = f" ({told['asked']:,} were asked for, there are no more)" if told["asked"] != problems else ""
    how = f"temperature {told['temperature']:g}, top-p {told['top_p']:g}, at most {told['max_tokens']} tokens, seed {told['seed']}"
    lines = [f"# {name}: {told['kept']:,} chats", "",
             f"Sampled from `{told['model']}`: {told['samples']} answers to each of {problems:,} problems{asked}; {how}.", "",
             "| answers | | of all |", "|---|---|---|", f"| sampled | {counts['sampled']:,} | |"]  # fmt: skip
    lines += [f"| {word} | {counts[key]:,} | {counts[key] / of:.1%} |" for key, word in TOLD.items() if key != "refused"]
    lines += [f"| right, but refused by {check} | {n:,} | {n / of:.1%} |" for check, n in told["refused"].items()]
    left = {
        "duplicates": "right, but said already",
        "surplus": f"more than {told['keep']} of a problem",
        "unbalanced": "left out for balance",
    }
    lines += [f"| {word} | {counts[key]:,} | {counts[key] / of:.1%} |" for key, word in left.items()]
    lines += [f"| **kept** | {told['kept']:,} | {told['kept'] / of:.1%} |"]
    for title, rows in (("puzzle", told["puzzles"]), ("solve rate", told["bands"])):
        lines += ["", f"| {title} | problems | solved | right answers | accepted | kept |", "|---|---|---|---|---|---|"]
        lines += [f"| {key} | {' | '.join(f'{n:,}' for n in row.values())} |" for key, row in rows.items()]
    tokens = told["tokens"]
    means = ", ".join(f"{key} {tokens[key]:.1f}" for key in ("right", "wrong", "kept") if tokens[key] is not None)
    best = f", those with the highest score of `{told['reward']}` first" if told["reward"] else ""
    lines += [
        "", f"- mean length in tokens: {means}; {tokens['kept_total']:,} tokens kept of {told['sampled_tokens']:,} computed",
        f"- at most {told['keep']} answers a problem{best}; {told['pairs']:,} pairs of a right and a wrong answer",
        f"- {told['exact']:,} of the {told['kept']:,} chats encode to the very tokens that were sampled",
    ]  # fmt: skip
    if told["trouble"]:
        lines.append(f"- the first answer without a verdict: {told['trouble']}")
    return "\n".join([*lines, ""])
