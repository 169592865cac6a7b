"""Pruned folder and data -> trained folder; or dense model -> a folder that is cut and trained in turns."""

from __future__ import annotations

from secateur.recover.once import recover
from secateur.recover.options import METHODS, PRESETS, RecoverOptions, options_for
from secateur.recover.result import Recovered
from secateur.recover.rounds import prune_and_recover

__all__ = ["METHODS", "PRESETS", "RecoverOptions", "Recovered", "options_for", "prune_and_recover", "recover"]
