"""A model -> a folder with int8 weights in its linear layers, which transformers reads with torchao installed.

Quantization is the last step: packed weights are not scored or cut. Packing, arithmetic and file format are torchao's
(`TorchAoConfig` of transformers): each row of a weight becomes int8 with one scale.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from secateur.checkpoint.save import SHARD, loaded_again
from secateur.errors import CheckpointError, check_installed, one_line
from secateur.evaluation.memory import weight_bytes
from secateur.export.linear_layers import (
    PackedResult,
    check_holdable,
    choose_layers,
    file_bytes,
    first_logits,
    packed_folder,
)
from secateur.export.options import ExportRecipe, Int8Options
from secateur.files import check_vacant
from secateur.models.config import check_not_quantized
from secateur.models.silence import quiet
from secateur.models.streaming import streamed_layers
from secateur.models.tensor_files import sort_metadata
from secateur.models.tensors import plain_tensors

SCHEMES = ("weight-only", "dynamic")
ALIGNED = 8  # multiple of the sizes of an int8 product on CUDA; torchao computes others on the CPU


def export_int8(
    model: PreTrainedModel,
    out: str | Path,
    options: Int8Options | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str | Path | None = None,
    files: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    recipe: ExportRecipe | None = None,
) -> PackedResult:
    """Write a model, dense or pruned, with int8 weights in its linear layers; the model itself stays as it is.

    The output head and the embedding keep their dtype, as does every weight that anything but a linear product uses;
    the result says which and why. `source` is the folder that the model was loaded from: its plan and record are
    copied, as are `files` under their names. Before the folder gets its name it is loaded, and its weights must be
    those in memory. Raises `ModelError` for a model that is quantized already, has another dtype or no such layer, and
    `CheckpointError` where torchao is missing or no folder can hold the model.

    >>> import tempfile
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export_int8(model, Path(folder) / "int8")
    >>> len(done.layers), [name for name in done.left if "embed_tokens" in name]
    (6, ['model.decoder.embed_tokens.weight'])
    """
    out, options = Path(out), options or Int8Options()
    check_vacant(out, overwrite=overwrite)
    packed, layers, left = int8_copy(model, options)
    with packed_folder(out, source=source, files=files, recipe=recipe, overwrite=overwrite) as folder:
        with quiet():
            packed.save_pretrained(folder, max_shard_size=SHARD)
            for path in folder.glob("*.safetensors"):
                sort_metadata(path)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        _check_loads(folder, packed)
    sizes = {path: model.get_parameter(f"{path}.weight").shape for path in layers}
    return PackedResult(
        out=out,
        scheme=SCHEMES[options.dynamic],
        layers=layers,
        left=left,
        weight_bytes={"before": weight_bytes(model), "after": weight_bytes(packed)},
        file_bytes=file_bytes(out),
        unaligned=tuple(path for path, shape in sizes.items() if any(size % ALIGNED for size in shape)),
    )


def int8_copy(
    model: PreTrainedModel, options: Int8Options | None = None
) -> tuple[PreTrainedModel, tuple[str, ...], dict[str, str]]:
    """Copy a model with int8 weights in its linear layers, as transformers quantizes; other weights are shared.

    Returns the copy, the layers whose weights are int8, and the weights of two and more dimensions that are not, each
    with the reason. Raises as `export_int8` does.
    """
    check_torchao()
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, MappingType, quantize_

    check_not_quantized(model.config)
    check_holdable(model)
    layers, left = choose_layers(model)
    shared = [*model.parameters(), *model.buffers()]
    packed: PreTrainedModel = copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})
    # set_inductor_config would change settings of torch that belong to the process, its precision among them.
    how: Any = Int8WeightOnlyConfig(set_inductor_config=False)
    if options is not None and options.dynamic:
        # Activations lie to one side of zero in many layers: symmetric ranges do twice the damage.
        how = Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False)
    unconverted = sorted({name.removesuffix(".weight") for name in left})
    quantizer = AutoHfQuantizer.from_config(TorchAoConfig(how, modules_to_not_convert=unconverted), pre_quantized=False)
    quantizer.preprocess_model(packed)
    chosen = set(layers)
    quantize_(packed, how, filter_fn=lambda _, path: path in chosen)
    packed.hf_quantizer = quantizer
    quantizer.postprocess_model(packed)
    return packed.eval(), tuple(layers), left


def check_torchao() -> None:
    """Raise `CheckpointError` where torchao is not installed."""
    check_installed(CheckpointError, "torchao", extra="int8", what="packing int8 weights")


def _check_loads(folder: Path, packed: PreTrainedModel) -> None:
    """Load the folder as users do: every weight is there and has its value in memory, and the model computes."""
    options: dict[str, Any] = {"attn_implementation": packed.config._attn_implementation}
    if getattr(packed.config, "_experts_implementation", None) is not None:
        options["experts_implementation"] = packed.config._experts_implementation
    if packed.device.type != "cpu" and streamed_layers(packed) is None:
        options["device_map"] = {"": packed.device}
    try:
        loaded = loaded_again(folder, packed, **options)
        tensors = loaded.state_dict()
        if wrong := [name for name, tensor in packed.state_dict().items() if not _same(tensor, tensors[name])]:
            raise ValueError(f"{', '.join(wrong[:3])} would have other values")
        first_logits(loaded)  # it must compute
    except Exception as error:  # the code of models and torchao raises anything
        raise CheckpointError(
            f"{type(packed).__name__}: transformers cannot load it with int8 weights; {one_line(error)}"
        ) from error


def _same(tensor: Tensor, other: Tensor) -> bool:
    pairs = zip(plain_tensors(tensor), plain_tensors(other), strict=True)
    return all(torch.equal(one.cpu(), two.cpu()) for one, two in pairs)  # layers of a streamed model are on the CPU
