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


def advantages(reward_Gn: np.ndarray, right_Gn: np.ndarray, judged_Gn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(reward - mean) / std over the judged answers of each group (DeepSeekMath, arXiv 2402.03300), 0 for the others, and which groups
    [G] are flat.

    A group is flat when its judged answers are all right or none is: it carries no gradient. What counts is the verdict, not the shaped
    reward, or a group without any right answer would teach nothing but to give up (verl-recipe #125).
    """
    flat_G: np.ndarray = np.all(right_Gn | ~judged_Gn, axis=1) | ~np.any(right_Gn & judged_Gn, axis=1)
    known_Gn = np.ma.masked_array(reward_Gn, mask=~judged_Gn)
    advantage_Gn = (known_Gn - known_Gn.mean(1, keepdims=True)) / (known_Gn.std(1, keepdims=True) + 1e-6)
    return np.where(flat_G[:, None], 0.0, advantage_Gn.filled(0.0)), flat_G
