"""The rollout engine: prompts in, sampled tokens and log-probs out, on the very model that is trained."""

from rlhf.rollout.engine import Engine
from rlhf.rollout.handover import PagesError, PromptPages
from rlhf.rollout.request import Completion, Delta, EngineConfig, Grammar, Request, SamplingParams, Update

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "Grammar",
    "PagesError",
    "PromptPages",
    "Request",
    "SamplingParams",
    "Update",
]
