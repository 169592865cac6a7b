"""Commands about what was written: is it whole, and the same for other programs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from secateur.checkpoint.verification import verify
from secateur.cli.options import MAIN, MODEL, RUN, Fields, Given, Loading, Quiet, Trust, model_and_out
from secateur.cli.output import COMMAND, check_files, finish, progress_bars
from secateur.errors import CheckpointError
from secateur.export.formats import ExportOptions, choose_format, export_model
from secateur.export.options import ExportRecipe, GgufOptions, Int8Options, MergeOptions
from secateur.pipeline.recipe import read_whole_recipe
from secateur.report.tables.files import export_tables, verify_tables


def verify_command(
    folder: Annotated[Path, Parameter(help="Folder that `prune` wrote.")], /, *, loading: Trust, output: Quiet
) -> None:
    """Check that a folder is as it was written, byte by byte.

    Hashes every file, looks at every tensor, and compares the plan, the config and the weights with each other.
    """
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

    gguf: GgufOptions
    int8: bool = False
    """A folder with int8 weights, packed by torchao."""
    packing: Int8Options
    merge_lora: bool = False
    """An ordinary folder with a LoRA adapter merged in: MODEL's own, or that of --adapter."""
    merging: MergeOptions
    recipe: Path | None = None
    """Write what this recipe says, with OUT alone as an argument; no other options."""


def export_command(
    model: Annotated[str, MODEL],
    out: Annotated[Path | None, Parameter(help="File to write, FILE.gguf; else a folder.")] = None,
    /,
    *,
    formats: Annotated[Given, Fields(Formats, group=MAIN)],
    run: Annotated[Given, replace(RUN, main="folder overwrite", omit="resume command bars")],
    loading: Loading,
    output: Quiet,
) -> None:
    """Write a model for other programs, or packed.

    OUT.gguf is a file that llama.cpp and what is built on it run; layers of different sizes go into it too.
    --int8 writes a folder that transformers reads where torchao is installed. --merge-lora writes an ordinary folder
    with a LoRA adapter merged into the weights.
    """
    name, out = model_and_out(model, out, formats.get("recipe"), "export")
    if "recipe" in formats:
        recipe = read_whole_recipe(formats["recipe"], "export", ExportRecipe)
        name, loading = recipe.model, recipe.loading
        options: ExportOptions = recipe.int8 or recipe.merge or MergeOptions()
    else:
        gguf, packing, merging = (formats.get(name, {}) for name in ("gguf", "packing", "merging"))
        options = choose_format(
            out,
            gguf=GgufOptions(**gguf) if gguf else None,
            int8=Int8Options(**packing) if "int8" in formats or packing else None,
            merge=MergeOptions(**merging) if "merge_lora" in formats or merging else None,
        )
    name, folder = name or model, run.get("folder")
    check_files(output.json, made=None if isinstance(options, GgufOptions) else out, run=folder)
    with progress_bars(quiet=output.quiet)("export") as progress:
        written = export_model(
            name,
            out,
            options,
            loading=loading,
            overwrite=run.get("overwrite", False),
            progress=progress,
            command=COMMAND.get(),
        )
    finish(written.to_json(), output, export_tables(written), run=folder, kind="export", models=[name, str(out)])
