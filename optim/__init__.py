"""Sharpness-aware gradient rules over any model; see optim/README.md."""

from optim.base import base
from optim.methods import METHODS, method
from optim.rule import Objective, Rule, objective

__all__ = ["METHODS", "Objective", "Rule", "base", "method", "objective"]
