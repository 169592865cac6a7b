"""Every exception that Secateur raises on purpose.

Each message names the thing, its value, what was expected and a call that works. The command line prints it on one
line and exits with status 2; code catches `SecateurError`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable

LEAST = {"torch": (2, 10), "transformers": (5, 14)}  # versions, as in pyproject.toml


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


class RecipeError(SecateurError):
    """A recipe file that cannot be read, or one with an unknown key or a value of the wrong type."""


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


class TrackingError(SecateurError):
    """An experiment tracker that is not installed."""


class PageError(SecateurError):
    """A page that cannot be shown: a package is missing, or its address is taken."""


def one_line(error: Exception) -> str:
    r"""Describe an error of another library in one line: its type and the first paragraph of its message.

    >>> one_line(ValueError("no such\n  layer.\n\nSee also ..."))
    'ValueError: no such layer'
    """
    paragraph = str(error).split("\n\n")[0]
    return f"{type(error).__name__}: {' '.join(paragraph.split())[:300].rstrip('.')}"


def did_you_mean(name: str, names: Iterable[str], *, most: int = 1) -> str:
    """The end of a sentence about an unknown name: up to `most` known names that are close to it, or nothing.

    >>> did_you_mean("mpl", ["mlp", "heads"]), did_you_mean("colour", ["mlp", "heads"])
    ('. Did you mean mlp?', '')
    """
    close = difflib.get_close_matches(name, list(names), n=most)
    return f". Did you mean {' or '.join(close)}?" if close else ""


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The sentence about a name that is none of those known; `what` is the option that has it.

    >>> unknown("axes", "mpl", ["attention", "mlp"])
    "axes='mpl' is unknown. Expected attention or mlp. Did you mean mlp?"
    """
    *others, last = names = list(known)
    expected = f"{', '.join(others)} or {last}" if others else last
    return f"{what}={name!r} is unknown. Expected {expected}{did_you_mean(str(name), names)}"


def check_known(error: type[SecateurError], what: str, name: str, known: Iterable[str]) -> None:
    """Raise an error for a name that is none of those known."""
    if name not in (names := list(known)):
        raise error(unknown(what, name, names))


def check_least(error: type[SecateurError], what: str, value: float | None, least: float, example: float) -> None:
    """Raise an error for a number that is too small; None is none.

    >>> check_least(DataError, "samples", 0, 1, 64)
    Traceback (most recent call last):
    secateur.errors.DataError: samples=0 is too small. Expected at least 1, for example samples=64
    """
    if value is not None and value < least:
        raise error(f"{what}={value} is too small. Expected at least {least}, for example {what}={example}")


def check_installed(error: type[SecateurError], package: str, *, extra: str, what: str) -> None:
    """Raise an error where a package is not installed: `what` needs it, and the `extra` of ours brings it.

    >>> check_installed(TrainingError, "no_such_package", extra="recover", what="LoRA")
    Traceback (most recent call last):
    secateur.errors.TrainingError: LoRA needs the package no_such_package. Run: pip install 'secateur[recover]'
    """
    if importlib.util.find_spec(package) is None:
        raise error(f"{what} needs the package {package}. Run: pip install 'secateur[{extra}]'")


def check_versions() -> None:
    """Raise `ImportError` where a package is too old for us, before its first import fails in an odd place.

    >>> check_versions()
    """
    for package, least in LEAST.items():
        check_version(ImportError, package, least, what="Secateur")


def check_version(error: type[Exception], package: str, least: tuple[int, int], *, what: str) -> None:
    """Raise an error where an older release of a package is installed than `what` needs.

    >>> check_version(ModelError, "torch", (99, 0), what="it")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    secateur.errors.ModelError: it needs torch 99.0 or newer, and ... is installed. Run: pip install -U 'torch>=99.0'
    """
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # its own import says so
        return
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < least:
        wanted = ".".join(map(str, least))
        raise error(
            f"{what} needs {package} {wanted} or newer, and {installed} is installed. Run: pip install -U "
            f"'{package}>={wanted}'"
        )
