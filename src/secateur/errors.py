"""Every exception that Secateur raises on purpose.

Each message names the thing, its value, what was expected and a call that works. The command line prints it on one
line and exits with status 2; code catches `SecateurError`.
"""

from __future__ import annotations

from pathlib import Path


class SecateurError(Exception):
    """Base of all errors that tell the user what to change.

    >>> issubclass(PlanError, SecateurError)
    True
    """


class ModelError(SecateurError):
    """A MODEL argument that cannot be found, read, or used as a causal language model."""


class UntrustedCodeError(ModelError):
    """A model that comes with custom code, which may not run unless the user says so."""


class DataError(SecateurError):
    """Calibration or evaluation text that is missing, empty, too short or of an unknown format."""


class DiscoveryError(SecateurError):
    """A model whose graph cannot be traced, or weights that do not fit what was discovered."""


class ScoreError(SecateurError):
    """An unknown score or reduction, or weights and gradients that hold NaN or Inf."""


class PlanError(SecateurError):
    """A cut that cannot be done: a budget, a layer range, a width or a kind of group that does not exist."""


class TrainingError(SecateurError):
    """A training that cannot be done or has gone wrong: odd options, a package that is missing, a loss that is NaN."""


class TaskError(SecateurError):
    """A task that is unknown or cannot be had; a file of questions, or a package, that is missing."""


class CheckpointError(SecateurError):
    """A folder that cannot be written or read: it exists, it is incomplete, or nothing it could hold describes it."""


class DiskError(CheckpointError):
    """A file or folder that cannot be written as things are: the disk is full, or not ours to write to."""


class ExportError(SecateurError):
    """A model, a setting or a tokenizer that the format of a file cannot hold, or a file that computes otherwise."""


class PageError(SecateurError):
    """A page that cannot be shown: a package is missing, or its address is taken."""


def unwritable(path: Path, error: Exception) -> DiskError:
    """The error of a file or folder that cannot be written, for example because the disk is full.

    >>> print(unwritable(Path("out"), OSError(28, "No space left on device")))
    out cannot be written: No space left on device
    """
    return DiskError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")
