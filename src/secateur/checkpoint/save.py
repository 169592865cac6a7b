"""A pruned model -> a folder that the ordinary loader reads, with nothing of ours installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint.per_layer import as_per_layer, check_same, is_per_layer
from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE, Record
from secateur.discovery.groups import Discovery
from secateur.discovery.module_attributes import attributes_after
from secateur.errors import CheckpointError, DiscoveryError
from secateur.files import atomic_folder, check_vacant, copy_in, write_json
from secateur.models.config import per_layer_model_class
from secateur.models.manifest import WEIGHTS, tensors_in, write_manifest
from secateur.models.silence import quiet
from secateur.models.trust import runs_remote_code
from secateur.planning.plan import Plan

SHARD = "2GB"  # of a file of weights
DTYPE_CODES = {  # as files of weights name them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def check_saveable(
    plan: Plan,
    *,
    config: PreTrainedConfig | None = None,
    discovery: Discovery | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Raise `CheckpointError` when no folder can hold what the plan leaves, with the reason.

    What a stock config can say goes into a stock folder, and layers of different sizes into a folder with one file of
    code. With the config and the discovery of the dense model it is also checked that such a model can be made.
    """
    if plan.settings is not None:
        return
    reason = (plan.refusal or "it was planned without the model's config").rstrip(".")
    if plan.sizes.dropped_layers:
        raise CheckpointError(
            f"no folder can hold what the plan leaves: {reason}. Drop other layers, or cut other axes instead"
        )
    if config is None or discovery is None:
        return
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and per_layer_model_class(config) is None:
        raise CheckpointError(
            f"no folder can hold what the plan leaves: {reason}, and of a model with custom code only a cut that its "
            "config can say is saved. Cut all layers alike (leave out --layers), or use the pruned model in memory "
            "(secateur.pruning.prune, or `secateur evaluate MODEL --plan plan.json`)"
        )
    try:
        attributes_after(config, discovery, plan.sizes.without_emptied(), trust_remote_code=trust_remote_code)
    except DiscoveryError as error:
        raise CheckpointError(f"no model can be made of what the plan leaves: {reason}, and {error}") from error


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: Record | None = None,
    files: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a pruned model as a folder: safetensors, config, tokenizer, the plan, the record and the manifest.

    It is a stock folder where a stock config can say the cut. Else the config lists the shapes, and a file of code
    beside it builds the stock class in them (see `modeling_per_layer`). The folder appears whole or not at all. What
    was written is read back by name, shape and dtype and must be exactly what a model built from the config has.
    `files` are carried over as they are, by name: those of the dense model's tokenizer and processors (`text_files`).
    Raises `CheckpointError`.

    >>> import tempfile
    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.plan import CutOptions, plan
    >>> from secateur.pruning.prune import prune
    >>> from secateur.scoring.scores import score
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> discovery = discover(config)
    >>> scores = score(model, discovery=discovery, name="l2")
    >>> decided = plan(discovery, CutOptions(ratio=0.5, of="units", axes=("mlp",)), config=config, scores=scores)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(prune(model, decided), Path(folder) / "smaller", plan=decided)
    ...     AutoModelForCausalLM.from_pretrained(path).config.ffn_dim
    12
    """
    check_saveable(plan)
    out = Path(out)
    if plan.settings is None or is_per_layer(model):
        check_vacant(out, overwrite=overwrite)
        model = as_per_layer(model)
    with atomic_folder(out, overwrite=overwrite) as folder:
        _write(model, folder, tokenizer, files or {})
        write_json(folder / PLAN_FILE, plan.to_json())
        if record is not None:
            write_json(folder / RECORD_FILE, record.to_json())
        write_manifest(folder)
    return out


@contextmanager
def save_updated(
    model: PreTrainedModel,
    out: str | Path,
    *,
    source: Path | None = None,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: Record | None = None,
    files: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Write a model of which only the values of its weights have changed since it was loaded, as `save` does.

    The plan that lies in `source`, the folder that it was loaded from, goes along as it is; `plan` is one of a model
    that was cut since. Gives the folder before it appears, so that more can be put into it. Raises `CheckpointError`.

    >>> import tempfile
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with save_updated(AutoModelForCausalLM.from_config(config), Path(folder) / "out") as unfinished:
    ...         _ = (unfinished / "notes.txt").write_text("trained")
    ...     AutoModelForCausalLM.from_pretrained(Path(folder) / "out").config.ffn_dim
    24
    """
    check_vacant(Path(out), overwrite=overwrite)
    model = as_per_layer(model) if is_per_layer(model) or (plan is not None and plan.settings is None) else model
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        _write(model, folder, tokenizer, files or {})
        if source is not None and (source / PLAN_FILE).is_file():
            copy_in(folder, {PLAN_FILE: source / PLAN_FILE})
        if plan is not None:
            write_json(folder / PLAN_FILE, plan.to_json())
        if record is not None:
            write_json(folder / RECORD_FILE, record.to_json())
        yield folder
        write_manifest(folder)


def _write(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, files: Mapping[str, Path]
) -> None:
    """Weights, config, tokenizer and what is carried over; read back by name, shape and dtype."""
    with quiet():
        model.save_pretrained(folder, max_shard_size=SHARD)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    copy_in(folder, files)
    loaded = _check_accounts(folder, model)
    if is_per_layer(model):
        check_same(model, loaded)


def _check_accounts(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Load the folder as anyone would, but on `meta`: every weight is there, in its shape, and nothing else."""
    with quiet():
        loaded: Any = type(model).from_pretrained(
            folder,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            trust_remote_code=runs_remote_code(model),
        )
    report = loaded[1]
    for what, key in (
        ("lacks", "missing_keys"),
        ("has leftover", "unexpected_keys"),
        ("has the wrong shape for", "mismatched_keys"),
    ):
        names = sorted(name if isinstance(name, str) else name[0] for name in report[key])
        if names:
            raise CheckpointError(f"the folder {what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
    _check_dtypes(folder, model)
    model_read: PreTrainedModel = loaded[0]
    return model_read


def _check_dtypes(folder: Path, model: PreTrainedModel) -> None:
    """Raise `CheckpointError` unless every tensor lies there in its own dtype; stacked ones have names of their own."""
    written = {
        name: about.split()[0] for path in folder.glob(f"*{WEIGHTS}") for name, about in tensors_in(path).items()
    }
    for name, tensor in model.state_dict().items():
        code = DTYPE_CODES.get(tensor.dtype)
        if name in written and code is not None and written[name] != code:
            raise CheckpointError(f"the folder has {name} as {written[name]}, the model as {code}")
