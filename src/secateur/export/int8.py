"""A model -> a folder with int8 weights in its linear layers, which transformers reads with torchao installed.

Quantization is the last step: packed weights are not scored or cut. One short forward pass shows which layers take
part, since a weight can be packed only where nothing but a linear product uses it. Packing, arithmetic and file format
are torchao's (`TorchAoConfig` of transformers): each row of a weight becomes int8 with one scale.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE
from secateur.checkpoint.save import SHARD, loaded_again
from secateur.discovery.sizes import shapes_of
from secateur.errors import CheckpointError, ModelError, SecateurError, check_installed, one_line
from secateur.evaluation.inference import evaluation_mode, input_device, vocabulary_size
from secateur.evaluation.memory import weight_bytes
from secateur.export.options import ExportRecipe, Int8Options
from secateur.files import atomic_folder, check_vacant, copy_in, sort_metadata
from secateur.models.config import check_not_quantized
from secateur.models.loading import skeleton
from secateur.models.manifest import write_manifest
from secateur.models.silence import quiet
from secateur.models.tensors import plain_tensors
from secateur.models.trust import runs_remote_code
from secateur.pipeline.recipe import write_recipe

SCHEMES = ("weight-only", "dynamic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 8  # of the forward passes that show how weights are used, and that the written model computes
ALIGNED = 8  # multiple of the sizes of an int8 product on CUDA; torchao computes others on the CPU


@dataclass(frozen=True, slots=True)
class Int8Result:
    """What `export_int8` wrote: which layers are int8, which matrices are not and why, and the bytes."""

    out: Path
    scheme: str  # one of SCHEMES
    layers: tuple[str, ...]  # modules with int8 weights
    left: Mapping[str, str]  # weights of two and more dimensions that keep their dtype -> why
    weight_bytes: Mapping[str, int]  # "before" and "after", in memory; a tied weight counts once
    file_bytes: int  # of the safetensors in the folder
    unaligned: tuple[str, ...]  # layers whose sizes are not multiples of 8, which CUDA has no dynamic product for

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur export --json` writes it."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


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
) -> Int8Result:
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
    with atomic_folder(out, overwrite=overwrite) as folder:
        with quiet():
            packed.save_pretrained(folder, max_shard_size=SHARD)
            for path in folder.glob("*.safetensors"):
                sort_metadata(path)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        beside = {} if source is None else {name: Path(source) / name for name in (PLAN_FILE, RECORD_FILE)}
        copy_in(folder, {**(files or {}), **{name: path for name, path in beside.items() if path.is_file()}})
        _check_loads(folder, packed)
        if recipe is not None:
            write_recipe(folder, "export", recipe)
        write_manifest(folder)
        file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sizes = {path: model.get_parameter(f"{path}.weight").shape for path in layers}
    return Int8Result(
        out=out,
        scheme=SCHEMES[options.dynamic],
        layers=layers,
        left=left,
        weight_bytes={"before": weight_bytes(model), "after": weight_bytes(packed)},
        file_bytes=file_bytes,
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
    _check_holdable(model)
    layers, left = _choose_layers(model)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        raise ModelError(
            f"{type(model).__name__}: no weight can be int8, since torchao takes those of linear layers ({reasons})"
        )
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


def _check_holdable(model: PreTrainedModel) -> None:
    """Raise `ModelError` for a dtype that is not packed, and `CheckpointError` for sizes that the config lacks."""
    if model.dtype not in DTYPES:
        raise ModelError(
            f"weights of {str(model.dtype).removeprefix('torch.')} are not packed; expected float32, bfloat16, "
            "float16: load the model with --dtype float32"
        )
    if shapes_of(model) != shapes_of(skeleton(model.config, trust_remote_code=runs_remote_code(model))):
        raise CheckpointError(
            f"{type(model).__name__}: its config does not have its sizes, since it was cut in memory. Write the folder "
            "first (secateur.save), and quantize what is loaded from it"
        )


def _choose_layers(model: PreTrainedModel) -> tuple[list[str], dict[str, str]]:
    """The layers whose weights can be int8, and why every other weight of two and more dimensions cannot."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    head, used_elsewhere = model.get_output_embeddings(), _used_elsewhere(model)
    layers, left = [], {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        others = [other for other in names[id(weight)] if other != name]
        if others:
            left[name] = f"it is {others[0]}, too"
        elif module is head:
            left[name] = "it gives the logits"
        elif not isinstance(module, nn.Linear) or last != "weight":
            left[name] = f"{type(module).__name__} is no linear layer"
        elif any(f".{kept}." in f".{name}." for kept in model._keep_in_fp32_modules or ()):
            left[name] = "the model's code keeps it in float32"
        elif id(weight) in used_elsewhere:
            left[name] = "more than a linear product is computed with it"
        else:
            layers.append(path)
    return layers, left


class _OtherUses(TorchFunctionMode):
    """Collects the ids of weights that enter anything but a linear product. Final."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.found: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # sizes and dtypes may be asked for
            inputs = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            if func is functional.linear:
                inputs -= {id(kwargs["weight"] if "weight" in kwargs else args[1])}
            self.found |= inputs & self.weights
        return result


def _used_elsewhere(model: PreTrainedModel) -> set[int]:
    """Ids of the weights that anything but a linear product uses, in a forward pass over a few tokens."""
    uses = _OtherUses(model.parameters())
    try:
        with uses:
            _logits(model)
    except SecateurError:
        raise
    except Exception as error:  # the code of models raises anything
        raise ModelError(
            f"{type(model).__name__}: a forward pass over tokens alone shows how weights are used, and it fails; "
            f"{one_line(error)}"
        ) from error
    return uses.found


def _logits(model: PreTrainedModel) -> Tensor:
    """Logits of the first few token ids, BTX."""
    ids_BT = torch.arange(TOKENS, device=input_device(model))[None] % vocabulary_size(model)
    with evaluation_mode(model), torch.no_grad():
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _check_loads(folder: Path, packed: PreTrainedModel) -> None:
    """Load the folder as users do: every weight is there and has its value in memory, and the model computes."""
    options: dict[str, Any] = {"attn_implementation": packed.config._attn_implementation}
    if getattr(packed.config, "_experts_implementation", None) is not None:
        options["experts_implementation"] = packed.config._experts_implementation
    if packed.device.type != "cpu":
        options["device_map"] = {"": packed.device}
    try:
        loaded = loaded_again(folder, packed, **options)
        tensors = loaded.state_dict()
        if wrong := [name for name, tensor in packed.state_dict().items() if not _same(tensor, tensors[name])]:
            raise ValueError(f"{', '.join(wrong[:3])} would have other values")
        _logits(loaded)  # it must compute
    except Exception as error:  # the code of models and torchao raises anything
        raise CheckpointError(
            f"{type(packed).__name__}: transformers cannot load it with int8 weights; {one_line(error)}"
        ) from error


def _same(tensor: Tensor, other: Tensor) -> bool:
    pairs = zip(plain_tensors(tensor), plain_tensors(other), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)
