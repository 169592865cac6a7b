"""A model -> a folder of compressed-tensors, with small weights in its linear layers, which vLLM computes with.

llmcompressor quantizes: GPTQ on calibration text for integers, plain rounding for one-byte floats. vLLM multiplies in
the small type; transformers reads the folder and computes in the model's own dtype. Quantization is the last step.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint.save import SHARD
from secateur.data.calibration import CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.data.windows import calibration_windows
from secateur.errors import CheckpointError, ExportError, ModelError, check_installed, one_line
from secateur.evaluation.memory import weight_bytes
from secateur.export.linear_layers import (
    PackedResult,
    check_holdable,
    choose_layers,
    file_bytes,
    first_logits,
    packed_folder,
)
from secateur.export.options import ExportRecipe, QuantizeOptions
from secateur.export.source import Source
from secateur.files import RECIPE_FILE, check_vacant, copy_in
from secateur.models.config import check_positions, per_layer_model_class, register_classes
from secateur.models.silence import quiet, silence_logger
from secateur.models.trust import runs_remote_code
from secateur.progress import Progress

GROUP_SIZES = (128, 64, 32)  # columns that share a scale, best first: those of vLLM's kernels for int4 on GPUs
PASSES = 2  # of GPTQ over each layer: one to collect, one with the rounded weights
CLOSE = 1e-2  # of the logits' norm: what the folder may compute beside what was in memory, in bfloat16


def check_llmcompressor() -> None:
    """Raise `ExportError` where llmcompressor is not installed."""
    check_installed(ExportError, "llmcompressor", extra="quantize", what="quantizing by GPTQ")


def export_quantized(
    source: Source,
    out: str | Path,
    options: QuantizeOptions | None = None,
    *,
    overwrite: bool = False,
    recipe: ExportRecipe | None = None,
    progress: Progress | None = None,
) -> PackedResult:
    """Quantize the model of a source in place, and write it with its tokenizer, plan and record.

    The output head and the embedding keep their dtype, as does every weight that anything but a linear product uses.
    Before the folder gets its name it is loaded, and must give the logits of the model in memory. Raises `ExportError`
    where llmcompressor is missing, cannot take the model, or widths are no multiples that int4 needs, and `ModelError`
    and `CheckpointError` as `export_int8` does.
    """
    out, options = Path(out), options or QuantizeOptions()
    check_llmcompressor()
    check_vacant(out, overwrite=overwrite)
    model = source.model
    check_holdable(model)
    layers, left = choose_layers(model)
    group_size = common_group_size(model, layers) if options.quantize == "w4a16" else None
    before = weight_bytes(model)
    with TemporaryDirectory() as about:
        _let_be_read(model, Path(about), source)
        windows = None if options.quantize == "fp8" else _windows(source, options.calibration)
        quantize_in_place(model, source.tokenizer, layers, options.quantize, windows, group_size, progress)
        expected = first_logits(model)
        with packed_folder(out, source=source.folder, files=source.files, recipe=recipe, overwrite=overwrite) as folder:
            with _silent():
                model.save_pretrained(folder, max_shard_size=SHARD)
                source.tokenizer.save_pretrained(folder)
            (folder / RECIPE_FILE).unlink(missing_ok=True)  # llmcompressor's own
            _check_computes(folder, model, expected)
    return PackedResult(
        out=out,
        scheme=options.quantize,
        layers=tuple(layers),
        left=left,
        weight_bytes={"before": before, "after": file_bytes(out)},
        file_bytes=file_bytes(out),
        group_size=group_size,
    )


def common_group_size(model: nn.Module, layers: Sequence[str]) -> int:
    """The most columns of these linear layers that may share a scale, so that whole groups fill every row.

    Raises `ExportError` where none of `GROUP_SIZES` divides all widths.

    >>> common_group_size(nn.ModuleDict({"a": nn.Linear(192, 8), "b": nn.Linear(256, 8)}), ["a", "b"])
    64
    """
    widths = {path: model.get_parameter(f"{path}.weight").shape[1] for path in layers}
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths.values()):
            return size
    path, width = next((path, width) for path, width in widths.items() if width % GROUP_SIZES[-1])
    raise ExportError(
        f"w4a16 gives {GROUP_SIZES[-1]} columns or more a scale, and {path} has {width}: prune with --round-to 64, or "
        "use --quantize w8a8"
    )


def quantize_in_place(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[str],
    scheme: str,
    windows: Tensor | None,
    group_size: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Round the weights of these layers; those of integers by GPTQ on the windows (int64 ids, samples x length).

    Raises `ExportError` where llmcompressor cannot take the model.
    """
    with _silent():
        from llmcompressor.entrypoints.oneshot import oneshot

    chosen = set(layers)
    ignore = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in chosen]
    text: dict[str, Any] = {}
    if windows is not None:
        rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
        text = {"dataset": DataLoader(rows, batch_size=None), "num_calibration_samples": len(rows)}  # type: ignore[arg-type]  # a list will do
        text["max_seq_length"] = windows.shape[1]
    trust = runs_remote_code(model)
    total = PASSES * len(layers) * (0 if windows is None else len(windows))
    try:
        with _counted(model, layers, total, progress), _silent():
            recipe = _modifier(scheme, ignore, group_size)
            oneshot(model=model, recipe=recipe, tokenizer=tokenizer, trust_remote_code_model=trust, **text)
    except Exception as error:  # the code of models and of llmcompressor raises anything
        hint = "" if scheme == "fp8" else "; --quantize fp8 runs no text through the model"
        raise ExportError(
            f"{type(model).__name__}: llmcompressor cannot quantize it to {scheme}; {one_line(error)}{hint}"
        ) from error


def _windows(source: Source, options: CalibrationOptions) -> Tensor:
    """The windows of calibration text (int64 ids, samples x length), or those that the model writes."""
    check_positions(source.model.config, options.length)
    if options.generated:
        return generate_windows(source.model, options)
    return calibration_windows(source.tokenizer, options)


def _modifier(scheme: str, ignore: list[str], group_size: int | None) -> Any:
    """What llmcompressor calls a recipe: how linear layers are rounded, but for those that it is to ignore."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    if scheme == "fp8":
        return QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=ignore)
    if scheme == "w8a8":
        return GPTQModifier(targets=["Linear"], scheme="W8A8", ignore=ignore)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    return GPTQModifier(config_groups=groups, ignore=ignore)


def _let_be_read(model: PreTrainedModel, folder: Path, source: Source) -> None:
    """Put the config where llmcompressor reads it again by its name, as stock or per-layer; the model's name changes.

    Its own folder has a recipe of ours under the name of llmcompressor's.
    """
    config = model.config
    if per_layer_model_class(config) is not None:
        AutoConfig.register(config.model_type, type(config), exist_ok=True)
        register_classes(config)
    config.dtype = model.dtype
    with quiet():
        config.save_pretrained(folder)
    if source.folder is not None and runs_remote_code(model):
        copy_in(folder, {path.name: path for path in source.folder.glob("*.py")})
    config._name_or_path = model.name_or_path = str(folder)


@contextmanager
def _counted(model: nn.Module, layers: Sequence[str], total: int, progress: Progress | None) -> Iterator[None]:
    """Show how many of the products that are to come are done."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done = min(done + 1, total)
        if progress is not None:
            progress(done, total)

    handles = [model.get_submodule(path).register_forward_hook(count) for path in layers] if total else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Nowhere(io.TextIOBase):
    """Takes what is written."""

    def write(self, text: str, /) -> int:
        return len(text)


@contextmanager
def _silent() -> Iterator[None]:
    """Leave out the messages and bars of llmcompressor, and of what it calls."""
    with redirect_stderr(_Nowhere()), redirect_stdout(_Nowhere()):  # imported, it warns, and logs to what it finds here
        import llmcompressor  # noqa: F401 - for what it prints on its first import
    with quiet(), silence_logger("torch.fx"), warnings.catch_warnings(action="ignore"):
        yield


def _check_computes(folder: Path, model: PreTrainedModel, expected: Tensor) -> None:
    """Load the folder as users do; it must give the logits of the model in memory, B x T x vocabulary."""
    loader: Any = per_layer_model_class(model.config) or AutoModelForCausalLM
    trust = {} if loader is not AutoModelForCausalLM else {"trust_remote_code": runs_remote_code(model)}
    try:
        with _silent():
            loaded = loader.from_pretrained(folder, dtype=model.dtype, **trust)
            found = first_logits(loaded)
        apart = float((found - expected.to(found.device)).norm() / expected.norm())
    except Exception as error:  # the code of models and compressed-tensors raises anything
        raise CheckpointError(
            f"{type(model).__name__}: transformers cannot load it with quantized weights; {one_line(error)}"
        ) from error
    if not apart <= CLOSE:
        raise ModelError(
            f"{type(model).__name__}: the quantized folder gives other logits than the model in memory (by {apart:.3g} "
            "of their norm), so it was not written"
        )
