"""Commands about what was written: is it whole, and the same for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from secateur.checkpoint.verification import verify
from secateur.cli.options import Common, Journal, ModelArgument, argument, option
from secateur.cli.output import check_files, finish, show
from secateur.errors import CheckpointError
from secateur.export.formats import choose_format, export_model
from secateur.export.options import GGUF_TYPES, GgufOptions, GgufType, Int8Options, MergeOptions
from secateur.report.tables.files import export_tables, verify_tables


def verify_command(
    folder: Annotated[Path, argument("FOLDER", "One that `prune` wrote.")],
    common: Common,
) -> None:
    """Check that a folder is as it was written, byte by byte.

    Hashes every file, looks at every tensor, and compares the plan, the config and the weights with each other.
    """
    check_files(common.json_file)
    with common.bars(f"verify {folder}"):
        found = verify(folder, trust_remote_code=common.trust_remote_code)
    finish(found.to_json(), common.json_file)
    if not common.quiet:
        show(verify_tables(found))
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise CheckpointError(f"{folder}: {found.problems[0]}{more}; copy it again, or prune again")


def export_command(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, argument("OUT", "The file to write, FILE.gguf; else a folder.")],
    *,
    gguf: Annotated[
        str | None,
        option("--gguf", f"A GGUF file for llama.cpp: {', '.join(GGUF_TYPES)}. [default: f16]", metavar="TYPE"),
    ] = None,
    pad: Annotated[bool, typer.Option("--pad", help="Pad layers with zeros where llama.cpp wants all alike.")] = False,
    pre: Annotated[
        str | None, option("--pre", "llama.cpp's pre-tokenizer, where it is not recognised.", metavar="NAME")
    ] = None,
    check: Annotated[
        bool | None,
        option(
            "--check/--no-check",
            "Compare the file with torch in llama.cpp. [default: where llama.cpp is installed]",
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="A folder with int8 weights, packed by torchao.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="--int8 with int8 products, activations too.")] = False,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="A folder; MODEL is a LoRA adapter, or has one by --adapter.")
    ] = False,
    adapter: Annotated[Path | None, option("--adapter", "The adapter to merge into MODEL.", metavar="FOLDER")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    run_folder: Journal = None,
    common: Common,
) -> None:
    """Write a model for other programs, or packed.

    OUT.gguf is a file that llama.cpp and what is built on it run; layers of different sizes go into it too.
    --int8 writes a folder that transformers reads where torchao is installed. --merge-lora writes an ordinary folder
    with a LoRA adapter merged into the weights.
    """
    asked_gguf = gguf is not None or pad or pre is not None or check is not None
    options = choose_format(
        out,
        gguf=GgufOptions(cast(GgufType, gguf or "f16"), pad, pre, check) if asked_gguf else None,
        int8=Int8Options(dynamic) if int8 or dynamic else None,
        merge=MergeOptions(adapter) if merge_lora or adapter is not None else None,
    )
    check_files(common.json_file, made=None if isinstance(options, GgufOptions) else out, run=run_folder)
    with common.bars("export") as progress:
        written = export_model(
            model,
            out,
            options,
            loading=common.loading,
            overwrite=overwrite,
            progress=progress,
            command=context.obj,
        )
    finish(written.to_json(), common.json_file, context, [model, str(out)])
    if not common.quiet:
        show(export_tables(written))
