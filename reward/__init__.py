"""Rewards: functions that judge responses, and the scorer that calls them."""

from rlhf.reward.functions import FUNCTIONS, resolve
from rlhf.reward.score import RewardError, Scorer

__all__ = ["FUNCTIONS", "RewardError", "Scorer", "resolve"]
