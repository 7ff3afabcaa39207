"""Statistics of several responses to one prompt: pass@k and the majority's answer.

Not here: when a response passes (`rlhf.trainers.evaluate`), and how an answer is read out of it (`rlhf.reward.functions`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_k(num_passed: Sequence[int], num_samples: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), mean over prompts: the chance that of k responses, drawn without replacement from
    the n = `num_samples` of a prompt, at least one passes.

    `num_passed` is c of each prompt. Unbiased for k responses of the policy itself; 1 - (1 - c / n)^k is not (arXiv
    2107.03374, section 2.1). Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} responses; k must be between 1 and their number")
    failed = num_samples - np.asarray(num_passed, dtype=np.float64)[:, None]
    factors = (failed - np.arange(k)) / (num_samples - np.arange(k))  # of C(n - c, k) / C(n, k), one a draw
    return float(np.mean(1.0 - factors.prod(axis=1)))  # with fewer than k failures one of them is 0


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Place of the first response that gives the most frequent answer; of equally frequent ones the earliest wins.

    None stands for no answer and has no vote; None is returned where nobody votes (self-consistency, arXiv 2203.11171).
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else None
