"""The rollout engine: prompts in, sampled tokens and log-probs out, on the very model that is trained."""

from rlhf.rollout.engine import Engine
from rlhf.rollout.request import Completion, EngineConfig, Request, SamplingParams

__all__ = ["Completion", "Engine", "EngineConfig", "Request", "SamplingParams"]
