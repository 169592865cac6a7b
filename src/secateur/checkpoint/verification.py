"""A folder that `save` wrote -> what of it is not as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from secateur.checkpoint.per_layer import is_per_layer, layer_settings
from secateur.checkpoint.record import read_record
from secateur.errors import CheckpointError, SecateurError, UntrustedCodeError
from secateur.files import PLAN_FILE
from secateur.models.config import load_config, quantization
from secateur.models.loading import load_on_meta
from secateur.models.manifest import MANIFEST_FILE, WEIGHTS, Entry, changes, files_in, read_manifest
from secateur.models.modeling_per_layer import PER_LAYER
from secateur.models.weight_files import is_read
from secateur.planning.plan import Plan, read_plan


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """One file of a folder."""

    name: str
    bytes: int
    """Its size as it was written; 0 where it was not written with the rest."""
    sha256: str | None
    """Its hash as it was written; None where it was not written with the rest."""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of `verify`: a folder without problems is as it was written."""

    folder: str
    files: tuple[VerifiedFile, ...]
    problems: tuple[str, ...]
    """One line each, which begins with the name of a file."""
    tensors: int
    """How many the manifest lists."""
    built: bool
    """Whether the shapes were also compared with a model built from the config."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur verify --json` writes it."""
        return asdict(self)


def verify(folder: str | Path, *, trust_remote_code: bool = False) -> Verified:
    """Compare a folder that `save` wrote with its manifest, byte by byte, and its parts with each other.

    Every file has its size and hash, and every tensor its dtype and shape; no file that a loader would read has been
    added. Then a model is built from the config, without memory: it has exactly the tensors that are there, and the
    sizes that the plan says. This last check is skipped for packed weights, whose tensors have other shapes, and for
    custom code, unless `trust_remote_code` lets it run. Raises `CheckpointError` when there is no such folder,
    or no manifest in it that can be read.

    >>> import tempfile
    >>> verify(tempfile.gettempdir())
    Traceback (most recent call last):
    secateur.errors.CheckpointError: ... has no secateur_manifest.json, so there is nothing to compare it with; ...
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name one that `secateur prune MODEL OUT` wrote")
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if manifest is None:
        raise CheckpointError(
            f"{folder} has no {MANIFEST_FILE}, so there is nothing to compare it with; `secateur prune` writes one "
            "with every folder"
        )
    files = tuple(_files(folder, manifest))
    problems = [f"{file.name} {file.problem}" for file in files if file.problem is not None]
    built = False
    if not problems:
        try:
            if quantization(load_config(str(folder), trust_remote_code=trust_remote_code)) is None:
                planned = PLAN_FILE in manifest  # not where a dense model was trained, or merged with an adapter
                problems += _disagreements(folder, planned=planned, trust_remote_code=trust_remote_code)
                built = True
        except UntrustedCodeError:
            pass  # the files are as they were written: no more can be checked before any of them runs
        except SecateurError as error:
            problems.append(str(error))
    tensors = sum(len(entry.tensors or ()) for entry in manifest.values())
    return Verified(str(folder), files, tuple(problems), tensors, built)


def _files(folder: Path, manifest: Mapping[str, Entry]) -> Iterator[VerifiedFile]:
    for name, written in manifest.items():
        yield VerifiedFile(name, written.bytes, written.sha256, changes(folder, name, written, hashed=True))
    for name in files_in(folder):
        if name not in manifest and is_read(name):
            yield VerifiedFile(name, 0, None, "was not written with the rest, and loaders would read it")
    if MANIFEST_FILE not in manifest and not any(name.endswith(WEIGHTS) for name in manifest):
        yield VerifiedFile(MANIFEST_FILE, 0, None, "lists no weights")


def _disagreements(folder: Path, *, planned: bool, trust_remote_code: bool) -> Iterator[str]:
    """Where the plan, if there is one, the config, the record and the tensors disagree."""
    model, leftover = load_on_meta(str(folder), trust_remote_code=trust_remote_code)
    for name in leftover:
        yield f"config.json describes a model without {name}, which lies in the weights"
    read_record(folder)
    config = load_config(str(folder), trust_remote_code=trust_remote_code).to_dict()
    if planned:
        yield from _off_plan(read_plan(folder / PLAN_FILE), config, model)
    if is_per_layer(model):
        yield from _other_layers(config.get("per_layer_config"), layer_settings(model))


def _off_plan(plan: Plan, config: Mapping[str, Any], model: PreTrainedModel) -> Iterator[str]:
    """What config and weights have that is not as the plan says."""
    for name, value in (plan.settings or {}).items():
        written: Any = config
        for key in name.split("."):
            written = written.get(key) if isinstance(written, dict) else None
        if written != value:
            yield f"{PLAN_FILE} says {name}={value!r:.60}, config.json {written!r:.60}"
    if plan.settings is None and PER_LAYER not in config:
        yield f"{PLAN_FILE} says that no stock config holds the cut ({plan.refusal}), config.json is one"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if plan.parameters.get("pruned", parameters) != parameters:
        yield f"{PLAN_FILE} says {plan.parameters['pruned']} parameters, the weights have {parameters}"


def _other_layers(written: Any, expected: Any) -> Iterator[str]:
    """Where `per_layer_config`, by which engines allocate caches, does not say the sizes of the weights."""
    written, expected = ({int(n): each for n, each in (layers or {}).items()} for layers in (written, expected))
    for number in sorted(written.keys() | expected.keys()):
        said, right = written.get(number), expected.get(number)
        if said != right:
            yield f"config.json says {said!r:.120} of layer {number} (per_layer_config), its weights {right!r:.120}"
            return
