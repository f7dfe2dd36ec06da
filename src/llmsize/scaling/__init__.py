"""Scaling laws: loss from parameters, tokens and compute, how to split a budget, and back."""

from llmsize.scaling.allocation import Allocation, allocate
from llmsize.scaling.laws import ScalingLaw, loss, losses, solve

__all__ = ["Allocation", "ScalingLaw", "allocate", "loss", "losses", "solve"]
