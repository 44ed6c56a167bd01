"""The section of report.html on a stage of reinforcement: what people misread first, each drawing with a word on how to read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pascaline.eval import plots
from pascaline.tables import kind

Rows = Sequence[Mapping[str, Any]]
LONGEST = 6000  # characters of a thought or an answer on the page; traces.jsonl has all


@dataclass
class Section:
    """A heading, a note, drawings with a caption each ("" for none; a drawing is None where its numbers are missing), and traces."""

    heading: str
    note: str
    drawings: list[tuple[str | None, str]]
    traces: list[dict[str, Any]] = field(default_factory=list)


def is_trial(name: str, rows: Rows) -> bool:
    """Whether a stage learns from what it samples itself."""
    return kind(name) == "rl" or any("reward" in row for row in rows)


def section(name: str, rows: Rows, traces: Rows) -> Section:
    """Of the stage `name`, from the rows of its metrics.jsonl and its traces.jsonl."""
    named = "" if name == "rl" else f" ({name})"  # no two drawings of a page have the same title
    drawings = [*_learning(rows, named), *_policy(rows, named), *_answers(rows, named), *_machine(rows, named)]
    loss = plots.curve(rows, {"loss": "loss"}, "loss", f"Loss{named}")
    drawings.append((loss, "Last, for it says nothing of progress: where each rollout is used once, its value is minus the mean advantage, "
                           "about 0 whatever is learnt. What teaches is its gradient (trl#2703)."))  # fmt: skip
    note = f"Measured on the rollouts of each step. Faint: each step. Strong: running mean.{_alarms(rows)}"
    return Section(f"Learning by trial: {name}", note, drawings, [_cut(trace) for trace in traces])


def _learning(rows: Rows, named: str) -> list[tuple[str | None, str]]:
    groups = [{**row, "varied": 1 - row["flat_groups"]} for row in rows if "all_right" in row]
    kinds = {"all_right": "all right", "none_right": "none right", "varied": "both"}
    return [
        (
            plots.curve(rows, {"reward": "reward", "accuracy": "accuracy"}, "mean per rollout", f"Reward and accuracy{named}"),
            "What the stage is for. A reward that rises without the accuracy pays for something else than right answers.",
        ),
        (
            plots.shares(groups, kinds, "share of groups", f"Groups by their answers{named}"),
            "Only groups with right and wrong answers teach. Many without a right one: too hard; many without a wrong one: too easy.",
        ),
    ]


def _policy(rows: Rows, named: str) -> list[tuple[str | None, str]]:
    ratio = {"ratio": "mean", "ratio_max": "largest"}
    return [
        (
            plots.curve(rows, {"entropy": "entropy"}, "entropy (nats per token)", f"Entropy of the policy{named}"),
            "How undecided the policy is. It falls as the policy learns; at 0 all samples are the same, and nothing new is tried.",
        ),
        (
            plots.curve(rows, {"reference_kl": "KL"}, "KL (nats per token)", f"KL to the reference{named}"),
            "How far the policy has gone from its reference; it steps down where the reference is renewed.",
        ),
        (
            plots.curve(rows, ratio, "probability now / when sampled", f"Importance ratio{named}"),
            "1 where each rollout is used once. Else the largest says how far the policy runs from its samples.",
        ),
        (
            plots.curve(rows, {"clipped": "clipped"}, "share of tokens", f"Tokens held back by the clip{named}"),
            "0 where each rollout is used once. Above a few percent most of a rollout's later steps teach nothing.",
        ),
        (
            plots.curve(
                rows, {"gap_max": "largest", "mismatch": "mean"}, "log-probability (nats)", f"Trainer minus engine{named}", log=True
            ),
            "The same tokens by the same weights, so rounding is all there may be: below 1e-4 in float32. A growing gap ends in collapse.",
        ),
    ]


def _answers(rows: Rows, named: str) -> list[tuple[str | None, str]]:
    lengths = {"tokens_right": "right", "tokens_wrong": "wrong"}
    verdicts = {"accuracy": "right", "wrong": "wrong", "abstain": "gives up", "unjudged": "no verdict"}
    return [
        (
            plots.curve(rows, lengths, "tokens per response", f"Response length{named}"),
            "Right answers that grow longer think more; wrong ones that do, alone, ramble.",
        ),
        (
            plots.curve(rows, {"truncated": "cut off"}, "share of rollouts", f"Cut off at the limit{named}"),
            "They earn nothing, however good they were. If the share rises with the length, the limit is too low or the length pays.",
        ),
        (
            plots.shares([row for row in rows if "wrong" in row], verdicts, "share of rollouts", f"Verdicts{named}"),
            "No verdict means that the verifier failed, not the model; such answers are left out.",
        ),
    ]


def _machine(rows: Rows, named: str) -> list[tuple[str | None, str]]:
    speeds = {"rollout_tokens_per_s": "rollout", "update_tokens_per_s": "update"}
    spent = {"rollout": "rollout", "verify": "verify", "update": "update", "other": "other"}
    return [
        (plots.curve(rows, speeds, "tokens per second", f"Speed{named}"), "Prompts count as tokens of the rollout too."),
        (
            plots.shares(_times(rows), spent, "share of the step", f"Where the time goes{named}"),
            "Other should stay under 5 %: making problems, packing batches, writing.",
        ),
    ]


def _times(rows: Rows) -> list[dict[str, Any]]:
    """For each row the shares of its step's time."""
    found = []
    for row in rows:
        seconds = {what: row.get(f"{what}_seconds") or 0.0 for what in ("rollout", "verify", "update")}
        whole = sum(value for value in seconds.values())
        if row.get("other") is not None and whole:
            shares = {what: (1 - row["other"]) * value / whole for what, value in seconds.items()}
            found.append({"step": row.get("step"), "other": row["other"], **shares})
    return found


def _alarms(rows: Rows) -> str:
    """Which alarms there were, and when first."""
    first: dict[str, int] = {}
    for row in rows:
        for name in row.get("alarms") or ():
            first.setdefault(name, row["step"])
    told = ", ".join(f"{name} from step {step}" for name, step in first.items())
    return f" Alarms (docs/post-training.md): {told}." if told else ""


def _cut(trace: Mapping[str, Any]) -> dict[str, Any]:
    """A line of traces.jsonl with its texts short enough for a page."""

    def short(text: str) -> str:
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST} more characters)"

    said = [{**one, "thought": short(one["thought"]), "answer": short(one["answer"])} for one in trace["answers"]]
    return {**trace, "answers": said}
