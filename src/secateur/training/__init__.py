"""A model, rows and settings -> trained weights, by transformers' Trainer; checkpoints from which it goes on.

Trainer runs the loop, the optimizer, the schedule, the processes and the trackers. What differs here: the order of the
rows is given, the loss may have a teacher, and a checkpoint is a folder of safetensors and JSON that appears whole or
not at all, with no pickle in it. Whatever is random in a step is seeded by the number of the step, so no state of a
generator has to be kept for a training to go on as if it had not been stopped.
"""

from __future__ import annotations

from secateur.training.checkpoints import last_checkpoint, put_weights_in_place, read_weights
from secateur.training.course import Course, Report, Settings, Trained
from secateur.training.loop import check_surroundings, train

__all__ = [
    "Course",
    "Report",
    "Settings",
    "Trained",
    "check_surroundings",
    "last_checkpoint",
    "put_weights_in_place",
    "read_weights",
    "train",
]
