"""Commands about what was written: is it whole, can training mend it, and the same for other programs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from secateur.cli.options import (
    MAIN,
    MODEL,
    RUN,
    Fields,
    Given,
    Loading,
    Quiet,
    Run,
    Trust,
    changed,
    main,
    model_and_out,
)
from secateur.cli.output import COMMAND, check_files, finish, progress_bars
from secateur.cli.reading import count
from secateur.cli.training import train_and_show
from secateur.data.calibration import CalibrationOptions
from secateur.data.options import DataOptions
from secateur.errors import CheckpointError, ExportError
from secateur.export.options import ExportRecipe, GgufOptions, Int8Options, MergeOptions, QuantizeOptions
from secateur.pipeline.recipe import read_whole_recipe
from secateur.recovery.options import RecoverOptions


def verify_command(
    folder: Annotated[Path, Parameter(help="Folder that `prune` wrote.")], /, *, loading: Trust, output: Quiet
) -> None:
    """Check that a folder is as it was written, byte by byte.

    Hashes every file, looks at every tensor, and compares the plan, the config and the weights with each other.
    """
    from secateur.checkpoint.verification import verify
    from secateur.report.tables.files import verify_tables

    check_files(output.json)
    with progress_bars(quiet=output.quiet)(f"verify {folder}"):
        found = verify(folder, trust_remote_code=loading.trust_remote_code)
    finish(found.to_json(), output, verify_tables(found))
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise CheckpointError(f"{folder}: {found.problems[0]}{more}; copy it again, or prune again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """What `export` can write."""

    quantizing: QuantizeOptions
    gguf: GgufOptions
    int8: bool = False
    """A folder with int8 weights, packed by torchao."""
    packing: Int8Options
    merge_lora: bool = False
    """An ordinary folder with a LoRA adapter merged in: MODEL's own, or that of --adapter."""
    merging: MergeOptions
    recipe: Path | None = None
    """Write what this recipe says, with OUT alone as an argument; no other options."""


FORMATS = Fields(
    Formats,
    main="quantizing.quantize quantizing.calibration.text quantizing.calibration.samples gguf.gguf gguf.pad int8 "
    "packing.dynamic merge_lora merging.adapter recipe",
    names={"quantizing.calibration.text": "--calibration"},
    omit=" ".join(
        f"quantizing.calibration.{name}"
        for name in ("tokens_per_column", "held_out", "score_samples", "varied", "copied", "start_tokens")
    ),
)


def export_command(
    model: Annotated[str, MODEL],
    out: Annotated[Path | None, Parameter(help="File to write, FILE.gguf; else a folder.")] = None,
    /,
    *,
    formats: Annotated[Given, FORMATS],
    run: Annotated[Given, replace(RUN, main="folder overwrite", omit="resume command bars")],
    loading: Loading,
    output: Quiet,
) -> None:
    """Write a model for other programs, or packed.

    OUT.gguf is a file that llama.cpp and what is built on it run; layers of different sizes go into it too.
    --quantize writes a folder with small weights that vLLM computes with. --int8 writes one that transformers holds in
    less memory, where torchao is installed. --merge-lora writes an ordinary folder with a LoRA adapter merged in.
    """
    from secateur.export.formats import ExportOptions, choose_format, export_model
    from secateur.report.tables.files import export_tables

    name, out = model_and_out(model, out, formats.get("recipe"), "export")
    if "recipe" in formats:
        if name is not None or formats.keys() != {"recipe"} or changed(loading):
            raise ExportError(
                f"--recipe {formats['recipe']} says all about the export: leave out MODEL and all options but OUT: "
                f"secateur export --recipe {formats['recipe']} OUT"
            )
        recipe = read_whole_recipe(formats["recipe"], "export", ExportRecipe)
        name, loading = recipe.model, recipe.loading
        options: ExportOptions = recipe.int8 or recipe.quantize or recipe.merge or MergeOptions()
    else:
        gguf, packing, merging = (formats.get(name, {}) for name in ("gguf", "packing", "merging"))
        quantizing = dict(formats.get("quantizing", {}))
        if "calibration" in quantizing:
            quantizing["calibration"] = CalibrationOptions(**quantizing["calibration"])
        options = choose_format(
            out,
            gguf=GgufOptions(**gguf) if gguf else None,
            int8=Int8Options(**packing) if "int8" in formats or packing else None,
            quantize=QuantizeOptions(**quantizing) if quantizing else None,
            merge=MergeOptions(**merging) if "merge_lora" in formats or merging else None,
        )
    name, folder = name or model, run.get("folder")
    check_files(output.json, made=None if isinstance(options, GgufOptions) else out, run=folder)
    overwrite, command = run.get("overwrite", False), COMMAND.get()
    with progress_bars(quiet=output.quiet)("export") as progress:
        written = export_model(
            name, out, options, loading=loading, overwrite=overwrite, progress=progress, command=command
        )
    finish(written.to_json(), output, export_tables(written), run=folder, kind="export", models=[name, str(out)])


def push_command(
    folder: Annotated[Path, Parameter(help="Folder that `prune`, `recover` or `export` wrote.")],
    name: Annotated[str, Parameter(help="Name on the hub: OWNER/MODEL, or MODEL under your own name.")],
    /,
    *,
    private: Annotated[bool, main("Only you, or your organisation, can see it.", negative=())] = False,
    loading: Trust,
    output: Quiet,
) -> None:
    """Share a folder on the Hugging Face hub, with its model card.

    Every file is compared with its hash, then all are uploaded in one commit. The token is that of `hf auth login` or
    HF_TOKEN. The record, the recipe and the card name the command line and the files of text that were used.
    """
    from secateur.export.push import push
    from secateur.report.tables.files import push_lines

    check_files(output.json)
    with progress_bars(quiet=output.quiet)(f"push {folder}"):
        pushed = push(folder, name, private=private, trust_remote_code=loading.trust_remote_code)
    finish(pushed.to_json(), output, push_lines(pushed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What `recover` takes besides the options of data and training."""

    preset: Literal["default", "llm-pruner"] | None = None
    """default, or llm-pruner: the paper's settings."""
    recipe: Path | None = None
    """Take options from this YAML file; options on the command line win."""
    teacher: str | None = None
    """Teacher for distillation. Default: the dense model that the folder's record names."""
    eval_texts: tuple[str, ...] = ()
    """Held-out text NAME=FILE that picks the best checkpoint; may be repeated."""


DATA = Fields(DataOptions, main="sources samples", names={"sources": "--data"}, omit="seed")
TRAINING = Fields(
    RecoverOptions,
    main="method minutes tokens",
    read={"tokens": count},
    expected={"tokens": "a number such as 400k, 1.5M or 400000"},
)
RECOVERY = Fields(Recovery, group=MAIN, names={"eval_texts": "--eval"})


def recover_command(
    pruned: Annotated[str, MODEL],
    out: Annotated[Path | None, Parameter(help="Folder to write. With --recipe, OUT alone is enough.")] = None,
    /,
    *,
    data: Annotated[Given, DATA],
    training: Annotated[Given, TRAINING],
    how: Annotated[Given, RECOVERY],
    run: Run,
    loading: Loading,
    output: Quiet,
) -> None:
    """Train a pruned model, with the dense one as its teacher.

    Writes one ordinary folder; LoRA is merged into the weights. A run that was killed continues with --resume. A dense
    model is cut and trained by one command with `secateur prune MODEL OUT --recover minutes=20`.
    """
    from secateur.recovery.recipe import recover_recipe

    name, made = model_and_out(pruned, out, how.get("recipe"), "recover")
    check_files(output.json, made=made, run=run.get("folder"))
    changes: dict[str, Any] = {"data": data, "options": training, "loading": changed(loading)}
    if "seed" in training:
        changes["data"] = {**data, "seed": training["seed"]}
    changes |= {option: how[option] for option in ("eval_texts", "teacher") if option in how}
    recipe = recover_recipe(name, preset=how.get("preset"), file=how.get("recipe"), **changes)
    train_and_show(recipe, made, run, output)
