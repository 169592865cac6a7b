"""Instructions, chats and text -> rows of tokens to train on, and the order in which the steps take them.

A row of a file or data set is put into words (Alpaca's prompt, or the tokenizer's chat template), tokenised, and cut to
`length`. Of each token it is known whether it is to be learned: those of answers, or all. The order of a whole training
is fixed before it begins, so one that goes on after a stop, or is shared by several processes, reads the same.
"""

from __future__ import annotations

from secateur.tuning_data.options import DataOptions, weighted
from secateur.tuning_data.reading import TuningData, read_tuning_data
from secateur.tuning_data.rows import IGNORED, Rows, collate, packed, training_order, whole_steps

__all__ = [
    "IGNORED",
    "DataOptions",
    "Rows",
    "TuningData",
    "collate",
    "packed",
    "read_tuning_data",
    "training_order",
    "weighted",
    "whole_steps",
]
