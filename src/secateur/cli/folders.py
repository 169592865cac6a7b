"""Commands about what was written: is it whole, and the same for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.checkpoint.verification import verify
from secateur.cli.options import Common, Journal, ModelArgument, argument, option
from secateur.cli.output import check_files, finish, show
from secateur.errors import CheckpointError, ExportError
from secateur.export.gguf_file import DEFAULT_TYPE, SUFFIX, TYPES, check_gguf, export_gguf
from secateur.export.int8 import export_int8_of
from secateur.export.merge import merge_adapter
from secateur.models.config import load_config
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from secateur.report.tables.files import export_tables, int8_tables, merge_lines, verify_tables


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
        option("--gguf", f"A GGUF file for llama.cpp: {', '.join(TYPES)}. [default: {DEFAULT_TYPE}]", metavar="TYPE"),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill layers up with zeros where llama.cpp wants all alike.")
    ] = False,
    pre: Annotated[str | None, option("--pre", "llama.cpp's way to split words.", metavar="NAME")] = None,
    check: Annotated[
        bool | None,
        option(
            "--check/--no-check",
            "Compare the file with torch in llama.cpp. [default: where llama-cpp-python is installed]",
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="A folder with int8 weights, packed by torchao.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="With --int8: products in int8, activations too.")] = False,
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
    merging = merge_lora or adapter is not None
    of_gguf = gguf is not None or pad or pre is not None or check is not None or out.suffix == SUFFIX
    check_files(common.json_file, made=out if int8 or merging else None, run=run_folder)
    if merging:
        if int8 or of_gguf:
            raise ExportError("--merge-lora writes an ordinary folder: merge first, then export that folder")
        with common.bars("merge"):
            merged = merge_adapter(
                model, out, adapter=adapter, loading=common.loading, overwrite=overwrite, command=context.obj
            )
        result, tables = merged.to_json(), merge_lines(merged)
    elif int8:
        if of_gguf:
            raise ExportError(
                f"--int8 writes a folder, and {SUFFIX} files are something else: export twice, to two OUTs"
            )
        with common.bars("pack"):
            packed = export_int8_of(model, out, dynamic=dynamic, loading=common.loading, overwrite=overwrite)
        result, tables = packed.to_json(), int8_tables(packed)
    else:
        if dynamic:
            raise ExportError("--dynamic is how int8 products are computed: use it with --int8")
        if gguf is None and out.suffix != SUFFIX:
            raise ExportError(f"{out}: say what to write, --gguf TYPE or --int8, or name the file {out}{SUFFIX}")
        trust, wanted = common.trust_remote_code, gguf or DEFAULT_TYPE
        config = load_config(model, trust_remote_code=trust)
        check_gguf(config, out, dtype=wanted, check=check, overwrite=overwrite)
        with common.bars("load"):
            loaded = load(model, dtype=common.dtype, device=common.device, trust_remote_code=trust)
            tokenizer = load_tokenizer(model, trust_remote_code=trust)
        with common.bars("write") as progress:
            written = export_gguf(
                loaded,
                tokenizer,
                out,
                dtype=wanted,
                pad=pad,
                pre=pre,
                check=check,
                overwrite=overwrite,
                progress=progress,
            )
        result, tables = written.to_json(), export_tables(written)
    finish(result, common.json_file, context, [model, str(out)])
    if not common.quiet:
        show(tables)
