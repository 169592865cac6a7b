"""A pruned model -> a folder that the ordinary loader of its family reads, with nothing of ours installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint.folder import atomic_folder, write_json
from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE, Record
from secateur.errors import CheckpointError
from secateur.models import quiet, runs_remote_code
from secateur.plan import Plan

SHARD = "2GB"  # of a file of weights


def check_stock(plan: Plan) -> None:
    """Raise `CheckpointError` when no stock folder can hold what the plan leaves, with the reason."""
    if plan.settings is not None:
        return
    reason = (plan.refusal or "it was planned without the model's config").rstrip(".")
    uneven = "differs between layers" in reason  # else the one size of all layers was refused
    raise CheckpointError(
        f"no stock folder can hold what the plan leaves: {reason}. "
        + ("Cut all layers alike (leave out --layers), or" if uneven else "Cut to another size, or")
        + " use the pruned model in memory (secateur.prune, or `secateur evaluate MODEL --plan plan.json`)"
    )


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: Record | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a pruned model as a stock folder: safetensors, config, tokenizer, the plan and the record.

    The folder appears whole or not at all. What was written is read back by name and shape and must be exactly what
    a model built from the written config has. Raises `CheckpointError`.

    >>> import tempfile
    >>> from secateur.axes import discover
    >>> from secateur.plan import CutOptions, plan
    >>> from secateur.prune import prune
    >>> from secateur.scores import score
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
    check_stock(plan)
    out = Path(out)
    with atomic_folder(out, overwrite=overwrite) as folder:
        with quiet():
            model.save_pretrained(folder, max_shard_size=SHARD)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        _check_accounts(folder, model)
        write_json(folder / PLAN_FILE, plan.to_json())
        if record is not None:
            write_json(folder / RECORD_FILE, record.to_json())
    return out


def _check_accounts(folder: Path, model: PreTrainedModel) -> None:
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
