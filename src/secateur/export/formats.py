"""A MODEL argument and the options of a format -> what that format writes.

A new format is a file with its options, its result and one entry function, and one `case` here.
"""

from __future__ import annotations

from pathlib import Path

from secateur.errors import ExportError
from secateur.export.gguf_file import SUFFIX, GgufResult, check_gguf, export_gguf
from secateur.export.int8 import check_torchao, export_int8
from secateur.export.linear_layers import PackedResult
from secateur.export.merge import MergeResult, merge_adapter
from secateur.export.options import ExportRecipe, GgufOptions, Int8Options, MergeOptions, QuantizeOptions
from secateur.export.quantize import check_llmcompressor, export_quantized
from secateur.export.source import load_source
from secateur.files import check_apart, check_vacant
from secateur.models.config import load_config
from secateur.models.options import LoadOptions
from secateur.models.sources import resolve
from secateur.progress import Progress

ExportOptions = GgufOptions | Int8Options | QuantizeOptions | MergeOptions
ExportResult = GgufResult | PackedResult | MergeResult


def choose_format(
    out: Path,
    *,
    gguf: GgufOptions | None = None,
    int8: Int8Options | None = None,
    quantize: QuantizeOptions | None = None,
    merge: MergeOptions | None = None,
) -> ExportOptions:
    """The options of the one format that was asked for; those of a GGUF file where OUT is named as one.

    Raises `ExportError` for two formats or none.

    >>> choose_format(Path("out.gguf"))
    GgufOptions(gguf='f16', pad=False, pre=None, check=None)
    """
    if out.suffix == SUFFIX:
        gguf = gguf or GgufOptions()
    chosen = [options for options in (gguf, int8, quantize, merge) if options is not None]
    if not chosen:
        expected = f"--quantize SCHEME, --gguf TYPE or --int8, or a file named {out}{SUFFIX}"
        raise ExportError(f"{out}: no format to write. Expected {expected}")
    if len(chosen) > 1 and merge is not None:
        raise ExportError("--merge-lora writes an ordinary folder: merge first, then export that folder")
    if len(chosen) > 1:
        kinds = f"--quantize and --int8 write a folder each, and --gguf a {SUFFIX} file"
        raise ExportError(f"{kinds}: export once for each, to OUTs of their own")
    return chosen[0]


def export_model(
    model: str,
    out: str | Path,
    options: ExportOptions,
    *,
    loading: LoadOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> ExportResult:
    """Load a MODEL argument and write it in the format that the options belong to.

    What can be refused without weights is refused before they are read. `command` is kept in the record of a merged
    folder. Raises `SecateurError`.

    >>> export_model("no/such/model", "out", Int8Options())
    Traceback (most recent call last):
    secateur.errors.ModelError: 'no/such/model': no such file or folder. ...
    """
    loading, out = loading or LoadOptions(), Path(out)
    match options:
        case GgufOptions():
            config = load_config(model, trust_remote_code=loading.trust_remote_code)
            check_gguf(config, out, options, overwrite=overwrite)
            source = load_source(model, loading)
            return export_gguf(source.model, source.tokenizer, out, options, overwrite=overwrite, progress=progress)
        case Int8Options():
            check_torchao()
            check_vacant(out, overwrite=overwrite)
            check_apart(resolve(model).path, out)
            source = load_source(model, loading)
            return export_int8(
                source.model,
                out,
                options,
                tokenizer=source.tokenizer,
                source=source.folder,
                files=source.files,
                overwrite=overwrite,
                recipe=ExportRecipe(model, int8=options, loading=loading),
            )
        case QuantizeOptions():
            check_llmcompressor()
            check_vacant(out, overwrite=overwrite)
            check_apart(resolve(model).path, out)
            recipe = ExportRecipe(model, quantize=options, loading=loading)
            source = load_source(model, loading)
            return export_quantized(source, out, options, overwrite=overwrite, recipe=recipe, progress=progress)
        case MergeOptions():
            return merge_adapter(model, out, options, loading=loading, overwrite=overwrite, command=command)
