"""A model and an adapter (LoRA) that was trained for it -> one ordinary folder that computes what both do together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from secateur import __version__
from secateur.checkpoint.record import make_record, read_record
from secateur.checkpoint.stock import save_again
from secateur.errors import ExportError, ModelError
from secateur.files import check_apart, check_vacant
from secateur.models.config import check_not_quantised, load_config
from secateur.models.loading import LoadOptions, load
from secateur.models.sources import resolve
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer, text_files
from secateur.recovery.lora import check_peft, loaded_adapter, merged

SETTINGS_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KIND = "LORA"  # of adapter, as peft names it; others add something else than a product of two matrices to a weight


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged: the folder, the model and the adapter it is made of, and the weights that are other now."""

    out: Path
    base: str
    adapter: str
    rank: int
    changed: tuple[str, ...]  # names of weights
    largest: float  # of the changes, as a share of its weight's norm

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur export --json` writes it."""
        return {**asdict(self), "out": str(self.out)}


def merge_adapter(
    model: str,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    loading: LoadOptions | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> Merged:
    """Write the model with the adapter merged into its weights; plan, record and tokenizer of the model go along.

    `model` is a folder of an adapter, which names the model that it belongs to, or that model, with the folder as
    `adapter`. Shapes may be free. The weights keep their dtype. Raises `ExportError` for a folder that is no adapter,
    is another than LoRA, or was trained for other weights, and for one whose weights lie in a pickle; and
    `SecateurError` as loading and saving do.

    >>> merge_adapter("organisation/model", "out")
    Traceback (most recent call last):
    secateur.errors.ExportError: 'organisation/model' is no folder with an adapter_config.json. ...
    """
    out, loading = Path(out), loading or LoadOptions()
    folder = Path(model if adapter is None else adapter)
    settings = _settings(folder, named=model if adapter is None else str(adapter))
    base = _base_of(folder, settings) if adapter is None else model
    check_apart(resolve(base).path, out)
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ExportError(f"{out} holds the adapter itself, which would be deleted; name another folder")
    check_vacant(out, overwrite=overwrite)
    check_peft()
    weights = _weights(folder)
    check_not_quantised(load_config(base, trust_remote_code=loading.trust_remote_code), name=base)
    whole = load(base, dtype=loading.dtype, device="cpu", trust_remote_code=loading.trust_remote_code)
    path = resolve(base).path
    source = path if path is not None and path.is_dir() else None
    record = (read_record(source) if source is not None else None) or make_record(whole, name=base)
    before = {name: parameter.data for name, parameter in whole.named_parameters()}  # not written to, but replaced
    adapted, unplaced = loaded_adapter(whole, folder, weights)
    if unplaced:
        raise ExportError(
            f"the adapter {folder} and {base!r} do not have {unplaced[0]}{' and others' if unplaced[1:] else ''} in "
            f"common: it was trained for another model. Name that: secateur export MODEL OUT --adapter {folder}"
        )
    result = merged(adapted)
    for name, parameter in result.named_parameters():
        parameter.data = parameter.data.to(before[name].dtype)
    check_finite(result)
    changes = {
        name: _distance(parameter.data, before[name])
        for name, parameter in result.named_parameters()
        if not torch.equal(parameter.data, before[name])
    }
    about = {
        "method": "lora",
        "options": {"adapter": {name: settings.get(name) for name in ("r", "lora_alpha", "lora_dropout")}},
        "adapter": str(folder),
        "adapter_weights": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
        "command": command,
        "secateur": __version__,
        "before": record.recovery,
    }
    tokenizer = load_tokenizer(base, trust_remote_code=loading.trust_remote_code)
    with save_again(
        result,
        out,
        source=source,
        tokenizer=tokenizer,
        record=replace(record, recovery=about),
        files=text_files(base, tokenizer),
        overwrite=overwrite,
    ):
        pass
    return Merged(
        out, base, str(folder), int(settings.get("r") or 0), tuple(changes), max(changes.values(), default=0.0)
    )


def _distance(weight: Tensor, before: Tensor) -> float:
    """As a share of the norm that the weight had."""
    return float((weight.float() - before.float()).norm() / before.float().norm().clamp(min=1e-30))


def _settings(folder: Path, *, named: str) -> Mapping[str, Any]:
    """What peft has written about an adapter. Raises `ExportError` for a folder without one that can be merged."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        inside = folder / "adapter" / SETTINGS_FILE
        hint = f" There is one in {inside.parent}, which is merged into {folder} already." if inside.is_file() else ""
        raise ExportError(
            f"{named!r} is no folder with an {SETTINGS_FILE}.{hint} Expected the folder of an adapter, as peft writes "
            "it, or a model with one beside it: secateur export MODEL OUT --adapter FOLDER"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ExportError(f"{file} cannot be read ({error}); copy the adapter again") from error
    if kind != KIND:
        raise ExportError(f"{file}: an adapter of type {kind} is not merged here. Expected LoRA ({KIND})")
    return dict(settings)


def _base_of(folder: Path, settings: Mapping[str, Any]) -> str:
    """The model that an adapter says it belongs to: a path of the folder it was trained in, or a name on the hub."""
    base = settings.get("base_model_name_or_path")
    remedy = f"Name it: secateur export MODEL OUT --adapter {folder}"
    if not isinstance(base, str) or not base:
        raise ExportError(f"{folder / SETTINGS_FILE} does not say which model the adapter belongs to. {remedy}")
    try:
        resolve(base)
    except ModelError as error:
        raise ExportError(f"the adapter {folder} belongs to {base!r}, which is not here ({error}). {remedy}") from error
    return base


def _weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
        raise ExportError(
            f"{folder} has no {WEIGHTS_FILE}{found}. Expected safetensors: in peft, "
            "save_pretrained(folder, safe_serialization=True)"
        )
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} cannot be read ({error}); copy the adapter again") from error
