"""A model and a LoRA adapter that was trained for it -> one ordinary folder that computes what both do together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur import __version__
from secateur.checkpoint.record import make_record, read_record
from secateur.checkpoint.save import save_updated
from secateur.errors import ExportError, ModelError
from secateur.export.options import ExportRecipe, MergeOptions
from secateur.export.source import load_source
from secateur.files import check_apart, check_vacant, read_json
from secateur.models.manifest import file_digest
from secateur.models.options import LoadOptions
from secateur.models.sources import resolve
from secateur.models.tensor_files import read_tensors
from secateur.models.tensors import check_finite
from secateur.models.weight_files import ADAPTER_FILE
from secateur.pipeline.recipe import write_recipe
from secateur.recovery.lora import ADAPTER_FOLDER, check_peft, load_adapter, merge_lora

WEIGHTS_FILE = "adapter_model.safetensors"
KIND = "LORA"  # of adapter, as peft names it; others add something else than a product of two matrices to a weight


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was merged: the folder, the model and the adapter it is made of, and the weights that have changed."""

    out: Path
    base: str
    adapter: str
    rank: int
    changed: tuple[str, ...]  # names of weights
    largest: float  # change, relative to its weight's norm

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur export --json` writes it."""
        return {**asdict(self), "out": str(self.out)}


def merge_adapter(
    model: str,
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    loading: LoadOptions | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> MergeResult:
    """Write a model with a LoRA adapter merged into its weights, with the model's plan, record and tokenizer.

    `model` is the folder of an adapter, which names its base model, or that model, with the folder as
    `options.adapter`. The weights keep their dtype. Raises `ExportError` for a folder that is no adapter, is another
    kind than LoRA, was trained for other weights, or holds a pickle; and `SecateurError` as loading and saving do.

    >>> merge_adapter("organisation/model", "out")
    Traceback (most recent call last):
    secateur.errors.ExportError: 'organisation/model' is no folder with an adapter_config.json. ...
    """
    out, adapter = Path(out), (options or MergeOptions()).adapter
    folder = Path(model if adapter is None else adapter)
    settings = _read_settings(folder, argument=model if adapter is None else str(adapter))
    base = _base_of(folder, settings) if adapter is None else model
    check_apart(resolve(base).path, out)
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ExportError(f"{out} holds the adapter itself, which would be deleted; name another folder")
    check_vacant(out, overwrite=overwrite)
    check_peft()
    weights = _read_weights(folder)
    source = load_source(base, replace(loading or LoadOptions(), device="cpu"))
    record = read_record(source.folder) or make_record(source.model, name=base)
    result, changes = _merge(source.model, folder, weights, base=base)
    about = {
        "method": "lora",
        "options": {"adapter": {name: settings.get(name) for name in ("r", "lora_alpha", "lora_dropout")}},
        "adapter": str(folder),
        "adapter_weights": file_digest(folder / WEIGHTS_FILE),
        "command": command,
        "secateur": __version__,
        "before": record.recovery,
    }
    with save_updated(
        result,
        out,
        source=source.folder,
        tokenizer=source.tokenizer,
        record=replace(record, recovery=about),
        files=source.files,
        overwrite=overwrite,
    ) as unfinished:
        recipe = ExportRecipe(model, merge=options or MergeOptions(), loading=loading or LoadOptions())
        write_recipe(unfinished, "export", recipe)
    rank = int(settings.get("r") or 0)
    return MergeResult(out, base, str(folder), rank, tuple(changes), max(changes.values(), default=0.0))


def _merge(
    model: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor], *, base: str
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The merged model in the model's dtype, and how far each changed weight moved, relative to its norm."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}  # replaced, not written to
    adapted, unplaced = load_adapter(model, folder, weights)
    if unplaced:
        raise ExportError(
            f"the adapter {folder} and {base!r} do not have {unplaced[0]}{' and others' if unplaced[1:] else ''} in "
            f"common: it was trained for another model. Name that: secateur export MODEL OUT --adapter {folder}"
        )
    result = merge_lora(adapted)
    changes = {}
    for name, parameter in result.named_parameters():
        parameter.data = parameter.data.to(before[name].dtype)
        if not torch.equal(parameter.data, before[name]):
            dense = before[name].float()
            changes[name] = float((parameter.data.float() - dense).norm() / dense.norm().clamp(min=1e-30))
    check_finite(result)
    return result, changes


def _read_settings(folder: Path, *, argument: str) -> Mapping[str, Any]:
    """An adapter's settings, as peft writes them. Raises `ExportError` for a folder without a LoRA adapter."""
    file = folder / ADAPTER_FILE
    if not file.is_file():
        inside = folder / ADAPTER_FOLDER / ADAPTER_FILE
        hint = f" There is one in {inside.parent}, which is merged into {folder} already." if inside.is_file() else ""
        raise ExportError(
            f"{argument!r} is no folder with an {ADAPTER_FILE}.{hint} Expected the folder of an adapter, as peft "
            "writes it, or a model with one beside it: secateur export MODEL OUT --adapter FOLDER"
        )
    settings = read_json(file)
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != KIND:
        raise ExportError(f"{file}: an adapter of type {kind} is not merged here. Expected LoRA ({KIND})")
    return dict(settings)


def _base_of(folder: Path, settings: Mapping[str, Any]) -> str:
    """The base model that an adapter names: a path of the folder it was trained in, or a name on the hub."""
    base = settings.get("base_model_name_or_path")
    remedy = f"Name it: secateur export MODEL OUT --adapter {folder}"
    if not isinstance(base, str) or not base:
        raise ExportError(f"{folder / ADAPTER_FILE} does not name the model that the adapter belongs to. {remedy}")
    try:
        resolve(base)
    except ModelError as error:
        raise ExportError(f"the adapter {folder} belongs to {base!r}, which is not here ({error}). {remedy}") from error
    return base


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
        raise ExportError(
            f"{folder} has no {WEIGHTS_FILE}{hint}. Expected safetensors: in peft, "
            "save_pretrained(folder, safe_serialization=True)"
        )
    return read_tensors(file)[0]
