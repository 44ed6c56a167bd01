"""Group-relative policy optimisation: what a group of answers to one prompt says about each of them.

Shapes: G groups (prompts), n answers a group.
"""

import numpy as np

from pascaline.data.puzzles import Verdict


def rewards(verdicts: list[list[Verdict]], cut: np.ndarray, wrong: float) -> np.ndarray:
    """[G, n]: 1 for right, 0 for giving up, `wrong` (0 or less) for a false claim; 0 stands for what could not be judged.

    An answer cut off at the token limit (`cut` [G, n]) earns 0: charging for it teaches to give up early (docs/log.md).
    """
    value = {Verdict.RIGHT: 1.0, Verdict.ABSTAIN: 0.0, Verdict.WRONG: wrong, Verdict.UNJUDGED: 0.0}
    return np.where(cut, 0.0, np.array([[value[v] for v in group] for group in verdicts]))


def advantages(reward_Gn: np.ndarray, right_Gn: np.ndarray, judged_Gn: np.ndarray, kind: str = "std") -> tuple[np.ndarray, np.ndarray]:
    """Advantages [G, n] over the judged answers of each group, 0 for those that were not, and which groups [G] are flat.

    kind: "std", (reward - mean) / std (DeepSeekMath, arXiv 2402.03300); "mean", reward - mean (Dr. GRPO, arXiv 2503.20783); "others",
    reward less the mean of the group's other answers (RLOO, arXiv 2402.14740), which is n / (n - 1) times that.

    A group is flat when its judged answers are all right or none is: it carries no gradient. What counts is the verdict, not the shaped
    reward, or a group without any right answer would teach nothing but to give up (verl-recipe #125).
    """
    flat_G: np.ndarray = np.all(right_Gn | ~judged_Gn, axis=1) | ~np.any(right_Gn & judged_Gn, axis=1)
    known_Gn = np.ma.masked_array(reward_Gn, mask=~judged_Gn)
    advantage_Gn = known_Gn - known_Gn.mean(1, keepdims=True)
    if kind == "std":
        advantage_Gn = advantage_Gn / (known_Gn.std(1, keepdims=True) + 1e-6)
    elif kind == "others":
        count_G1 = judged_Gn.sum(1, keepdims=True)
        advantage_Gn = advantage_Gn * count_G1 / np.maximum(count_G1 - 1, 1)
    return np.where(flat_G[:, None], 0.0, advantage_Gn.filled(0.0)), flat_G


def overlong(lengths_Gn: np.ndarray, limit: int, share: float) -> np.ndarray:
    """DAPO's soft penalty [G, n] (arXiv 2503.14476 eq. 13): 0 up to (1 - share) limit tokens, then falling in a straight line to -1 at the
    limit."""
    return -np.clip((lengths_Gn - (1 - share) * limit) / (share * limit), 0.0, 1.0) if share else np.zeros(lengths_Gn.shape)


def averaged(lengths: np.ndarray, average: str, limit: int) -> tuple[np.ndarray, float]:
    """(weight of each token of an answer [k], scale of all advantages), for a step's answers of so many tokens; the loss is the weighted
    sum over tokens, divided by the sum of the weights.

    average: "token", over all tokens (DAPO, arXiv 2503.14476 eq. 8); "answer", over each answer's tokens first (GRPO, arXiv 2402.03300
    eq. 3); "limit", the sum over tokens divided by answers times `limit`, so that length has no say (Dr. GRPO, arXiv 2503.20783).
    """
    if average == "answer":
        return 1.0 / np.maximum(lengths, 1), 1.0
    scale = lengths.sum() / (len(lengths) * limit) if average == "limit" and len(lengths) else 1.0
    return np.ones(len(lengths)), float(scale)
