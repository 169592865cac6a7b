"""A pruned model -> a folder that the ordinary loader reads, with nothing of ours installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint.card import write_card
from secateur.checkpoint.formats import check_saveable, needs_per_layer
from secateur.checkpoint.per_layer import as_per_layer, check_same
from secateur.checkpoint.record import Record
from secateur.errors import CheckpointError
from secateur.files import PLAN_FILE, RECORD_FILE, atomic_folder, check_vacant, copy_in, write_json
from secateur.models.manifest import WEIGHTS, tensors_in, write_manifest
from secateur.models.silence import quiet
from secateur.models.trust import runs_remote_code
from secateur.planning.plan import Plan

SHARD = "2GB"  # of a file of weights, at most
DTYPE_CODES = {  # as files of weights name them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


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
    """Write a pruned model as a folder: safetensors, config, tokenizer, plan, record, model card and manifest.

    It is a stock folder where a stock config can say the cut, else a per-layer folder (see `formats`). The folder
    appears whole or not at all. What was written is read back by name, shape and dtype and must be exactly what a model
    built from the config has. `files` are copied as they are, by name: those of the dense model's tokenizer and
    processors (`models.tokenizer.text_files`). Raises `CheckpointError`.

    >>> import tempfile
    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import PlannedGroup
    >>> from secateur.pruning.prune import prune
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> half = PlannedGroup("layers.0.mlp", "mlp", 0, units=24, kept=12, keep=tuple(range(12)))
    >>> by_hand = Plan("opt", CutOptions(ratio=0.5), (half,), {}, {}, settings={"ffn_dim": 12})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     smaller = prune(AutoModelForCausalLM.from_config(config), by_hand)
    ...     path = save(smaller, Path(folder) / "smaller", plan=by_hand)
    ...     AutoModelForCausalLM.from_pretrained(path).config.ffn_dim
    12
    """
    check_saveable(plan)
    with save_updated(model, out, plan=plan, tokenizer=tokenizer, record=record, files=files, overwrite=overwrite):
        pass
    return Path(out)


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
    """Write a model as `save` does, and give the folder before it appears, so that more files can be put into it.

    A `plan` is that of a cut since the model was loaded. Without one, only the values of its weights have changed: the
    plan that lies in `source`, the folder that it was loaded from, is copied. Raises `CheckpointError`.

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
    per_layer = needs_per_layer(model, plan)
    if per_layer:
        model = as_per_layer(model)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        with quiet():
            model.save_pretrained(folder, max_shard_size=SHARD)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        copy_in(folder, files or {})
        again = loaded_again(folder, model, device_map={"": "meta"})
        if per_layer:
            check_same(model, again)
        if source is not None and (source / PLAN_FILE).is_file():
            copy_in(folder, {PLAN_FILE: source / PLAN_FILE})
        if plan is not None:
            write_json(folder / PLAN_FILE, plan.to_json())
        if record is not None:
            write_json(folder / RECORD_FILE, record.to_json())
        yield folder
        made_from = record.model if record is not None else None
        write_card(folder, made_from if source is None else str(source))
        write_manifest(folder)


def loaded_again(folder: Path, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """The model of the folder as anyone would load it, with these options.

    Raises `CheckpointError` unless it has every weight, in its shape and dtype, and nothing else.
    """
    with quiet():
        loaded: Any = type(model).from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            trust_remote_code=runs_remote_code(model),
            use_kernels=False,  # they refuse the meta device
            **options,
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
    return cast(PreTrainedModel, loaded[0])


def _check_dtypes(folder: Path, model: PreTrainedModel) -> None:
    """Raise `CheckpointError` unless every tensor lies there in its own dtype; stacked ones have names of their own."""
    written = {
        name: about.split()[0] for path in folder.glob(f"*{WEIGHTS}") for name, about in tensors_in(path).items()
    }
    for name, tensor in model.state_dict().items():
        code = DTYPE_CODES.get(tensor.dtype)
        if name in written and code is not None and written[name] != code:
            raise CheckpointError(f"the folder has {name} as {written[name]}, the model as {code}")
