"""The soft penalty on responses that come near the length limit. Not here: leaving cut-off responses out of the loss
(`rlhf.batching.why_masked`).
"""

from __future__ import annotations


def overlong_penalty(num_tokens: int, *, max_tokens: int, overlong_buffer: int) -> float:
    """0 up to max_tokens - overlong_buffer, from there linearly down to -1 at max_tokens (DAPO, arXiv 2503.14476 eq.
    13). To be scaled and added to the response's reward.

    num_tokens is the response's length, max_tokens the longest allowed. DAPO: max_tokens 20480, overlong_buffer 4096.
    Raises ValueError if the buffer is not within 1 to max_tokens.
    """
    if not 1 <= overlong_buffer <= max_tokens:
        raise ValueError(
            f"overlong_buffer={overlong_buffer} with max_tokens={max_tokens}: the penalty grows over the last tokens "
            "before the limit; use 1 to max_tokens, or no penalty at all"
        )
    free = max_tokens - overlong_buffer
    return max(-1.0, min(0.0, (free - num_tokens) / overlong_buffer))
