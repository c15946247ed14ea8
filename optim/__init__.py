"""Sharpness-aware gradient rules over any model; see optim/README.md."""

from steppe.optim.base import base as base_optimizer
from steppe.optim.methods import METHODS, method
from steppe.optim.rule import Objective, Rule, objective

__all__ = ["METHODS", "Objective", "Rule", "base_optimizer", "method", "objective"]
