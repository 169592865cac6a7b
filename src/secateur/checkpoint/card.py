"""A folder that is being written -> its model card, README.md: what it was made from, how, and what that cost.

The card is a function of the other files in the folder and of what the dense model's card says of its licence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from secateur.checkpoint.record import Record, read_record, versions
from secateur.errors import SecateurError
from secateur.files import PLAN_FILE, RECIPE_FILE, RECORD_FILE, read_json
from secateur.models.card import TAG, origin
from secateur.models.manifest import CARD_FILE, WEIGHTS
from secateur.models.modeling_per_layer import PER_LAYER
from secateur.planning.plan import Plan, read_plan


def write_card(folder: Path, model: str | None) -> None:
    """Write the card of a folder, from its other files; `model` is the MODEL argument that it was made from.

    >>> import json, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "config.json").write_text(json.dumps({"model_type": "opt"}))
    ...     write_card(Path(folder), "demo")
    ...     (Path(folder) / "README.md").read_text().splitlines()[1]
    'base_model: HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    from huggingface_hub import ModelCardData

    config = read_json(folder / "config.json")
    plan, record = None, None
    with suppress(SecateurError):  # one that an earlier version wrote is carried along, and not described
        plan = read_plan(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
        record = read_record(folder)
    about = {} if model is None else origin(model)
    fields = ModelCardData(**about | _fields(config, plan, record, based="base_model" in about))
    sections = (
        _title(config, plan, record, about.get("base_model")),
        _sizes(folder, plan),
        _cut(plan, record),
        _damage(plan, record),
        _loading(config),
        _limits(plan, record, about),
        _origin(folder, record),
    )
    text = f"---\n{fields.to_yaml()}\n---\n\n" + "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)
    (folder / CARD_FILE).write_bytes(f"{text}\n".encode(errors="backslashreplace"))


def _fields(config: Mapping[str, Any], plan: Plan | None, record: Record | None, *, based: bool) -> dict[str, Any]:
    packed = _packed(config)
    tags = {
        TAG: True,
        "pruned": plan is not None,
        "structured-pruning": plan is not None,
        "distillation": record is not None and bool((record.recovery or {}).get("teacher")),
        "custom_code": "auto_map" in config,
        str(packed): packed is not None,
    }
    relation = {"base_model_relation": "quantized" if packed else "finetune"} if based else {}
    tagged = [tag for tag, holds in tags.items() if holds]
    return {**relation, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tagged}


def _packed(config: Mapping[str, Any]) -> str | None:
    """How the weights are packed; None where they are not."""
    return (config.get("quantization_config") or {}).get("quant_method")


def _title(config: Mapping[str, Any], plan: Plan | None, record: Record | None, base: Any) -> Iterator[str]:
    steps = ["pruned"] * (plan is not None) + ["trained"] * (record is not None and record.recovery is not None)
    steps += ["quantized"] * (_packed(config) is not None)
    name = base if isinstance(base, str) else record.model if record is not None else config.get("model_type")
    short = str(name).rstrip("/").rpartition("/")[2]
    yield f"# {_plain(short)}, {', '.join(steps) or 'copied'}"
    yield ""
    yield f"Made from {_code(name)} with Secateur {versions()['secateur']}."


def _sizes(folder: Path, plan: Plan | None) -> Iterator[str]:
    size = sum(path.stat().st_size for path in folder.glob(f"*{WEIGHTS}"))
    yield from ("## Size", "")
    if plan is not None and plan.parameters:
        counts, macs = plan.parameters, plan.macs
        yield from ("| | dense | this model | change |", "|---|---|---|---|")
        yield _compared("parameters", counts["dense"], counts["pruned"])
        yield _compared(
            "parameters outside the embeddings", counts["dense_non_embedding"], counts["pruned_non_embedding"]
        )
        if macs:
            yield _compared("multiply-accumulates of 64 tokens", macs["dense"], macs["pruned"])
        yield ""
    yield f"The files of the weights have {size:,} bytes."


def _cut(plan: Plan | None, record: Record | None) -> Iterator[str]:
    if plan is not None:
        yield from ("## What was cut", "", "| kind of unit | groups | units before | units left |", "|---|---|---|---|")
        for kind, groups in plan.groups_by_kind.items():
            before, left = sum(group.units for group in groups), sum(group.kept for group in groups)
            yield f"| {kind} | {len(groups)} | {before:,} | {left:,} |"
        options = plan.options
        goal = f"ratio {options.ratio}" if options.target is None else f"{options.target:,}"
        yield ""
        yield f"Budget: {goal} of {options.of}; score {options.score}; repair {options.repair}; shape {options.shape}."
        yield f"`{PLAN_FILE}` has the units that stay and all options."
    if record is not None and (text := record.calibration_options) is not None:
        names = text.get("text") or ()
        chosen = ", ".join(map(_code, [names] if isinstance(names, str) else names))
        samples, length, seed = (text.get(name) for name in ("samples", "length", "seed"))
        yield f"Calibration: {samples} windows of {length} tokens of {chosen}, seed {seed}."
    for training in _trainings(record):
        yield f"Then: {_training(training)}."


def _trainings(record: Record | None) -> list[Mapping[str, Any]]:
    """What the record says of every training, the first one first."""
    found: list[Mapping[str, Any]] = []
    last = record.recovery if record is not None else None
    while last:
        found.insert(0, last)
        last = last.get("before")
    return found


def _training(about: Mapping[str, Any]) -> str:
    if "adapter" in about:
        return f"a LoRA adapter was merged in ({_code(about['adapter'])})"
    teacher = f", with {_code(about['teacher'])} as teacher" if about.get("teacher") else ""
    sources = ", ".join(map(_code, (about.get("data") or {}).get("sources") or ()))
    return (
        f"trained by `{about.get('method')}` for {about.get('steps')} steps, {about.get('tokens', 0):,} tokens of "
        f"{sources or 'the calibration text'}{teacher}"
    )


def _damage(plan: Plan | None, record: Record | None) -> Iterator[str]:
    """What the cut and the training measured themselves; other texts are for `secateur evaluate`."""
    losses = (plan.scored if plan is not None else {}).get("held_out_loss")
    rows = [row for training in _trainings(record) for row in _trained_rows(training)]
    yield from ("## Damage", "")
    if losses or rows:
        yield from ("| nats per token | before | after |", "|---|---|---|")
    if losses:
        labels = {"cut": "cut alone", "repaired": "cut and repaired", "reconstructed": "layers trained as well"}
        for name, label in labels.items():
            if name in losses:
                yield f"| {label}, on held-out windows | {_number(losses['before'])} | {_number(losses[name])} |"
    yield from rows
    yield from [""] * bool(losses or rows)
    if losses and "repaired" in losses:
        yield "Held-out windows are of the calibration text; what loses less on them, with repair or without, was kept."
    other = "On other texts" if losses or rows else "Nothing was measured when this folder was written"
    yield f"{other}: `secateur evaluate DENSE THIS --ppl NAME=FILE` compares it with the dense model, window by window."


def _trained_rows(training: Mapping[str, Any]) -> Iterator[str]:
    entries = training.get("evaluation") or ()
    first = next(iter(entries), None)
    best = next((entry for entry in entries if entry["step"] == training.get("best_step")), None)
    if first is None or best is None or best is first:
        return
    if first.get("validation") is not None:
        yield f"| training, on its validation rows | {_number(first['validation'])} | {_number(best['validation'])} |"
    for name, value in (first.get("perplexity") or {}).items():
        yield f"| training, perplexity on {_plain(name)} | {_number(value)} | {_number(best['perplexity'].get(name))} |"


def _loading(config: Mapping[str, Any]) -> Iterator[str]:
    per_layer, packed = PER_LAYER in config, _packed(config)
    custom = "auto_map" in config
    trust = ", trust_remote_code=True" if custom else ""
    yield from ("## Load", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "")
    yield f'model = AutoModelForCausalLM.from_pretrained("THIS"{trust})'
    yield 'tokenizer = AutoTokenizer.from_pretrained("THIS")'
    yield from ("```", "")
    if per_layer:
        yield "Layers differ in size: `modeling_per_layer.py`, one small file that lies here, builds them. Where"
        yield 'Secateur is installed, `secateur.load("THIS")` and `vllm serve THIS` need no remote code.'
    elif custom:
        yield "The code of the model lies here, as its author wrote it."
    else:
        yield "A stock folder: every program that loads the dense model loads this one."
    if packed is not None:
        yield f"The weights are packed; reading them needs the package {packed}."


def _limits(plan: Plan | None, record: Record | None, about: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Limits", "")
    if plan is not None:
        yield "- Pruning loses most on what is unlike the calibration text (other languages, code, long contexts):"
        yield "  measure on your own text before use. Biases of the dense model stay, and its refusals may weaken."
    if record is not None and record.recovery is None and plan is not None:
        yield "- It was not trained after the cut: `secateur recover` gives a part of the damage back."
    if "license" not in about:
        yield "- The licence is not known here: that of the model it was made from holds."
    else:
        yield f"- The licence is that of the model it was made from: {_plain(about['license'])}."


def _origin(folder: Path, record: Record | None) -> Iterator[str]:
    yield from ("## How it was made", "")
    commands = [record.command, *(each.get("command") for each in _trainings(record))] if record is not None else []
    typed = list(dict.fromkeys(filter(None, commands)))
    if typed:
        yield from ("```bash", *(" ".join(line.split()) for line in typed), "```", "")
    if (folder / RECIPE_FILE).is_file():
        recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        yield f"`secateur {recipe['command']} --recipe {RECIPE_FILE} AGAIN` makes it again."
    if record is not None:
        made = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        yield f"Versions: {made}. Weights of the dense model: sha256 `{record.weights}`."
        yield f"`{RECORD_FILE}` says of every dense tensor what became of it."
    yield "`secateur verify THIS` compares every file with its hash."


def _compared(name: str, before: int, after: int) -> str:
    change = f"{100 * (after / before - 1):+.1f} %" if before else ""
    return f"| {name} | {before:,} | {after:,} | {change} |"


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.3f}"


def _code(name: Any) -> str:
    """A name as Markdown shows it unchanged, on one line."""
    text = " ".join(str(name).split()).replace("`", "'")
    return f"`{text}`"


def _plain(name: Any) -> str:
    """A name without what Markdown would read as marks."""
    return "".join(each if each.isalnum() or each in "-_. " else " " for each in str(name)).strip()
