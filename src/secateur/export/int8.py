"""A model -> the same with int8 weights in its linear layers: a folder that transformers reads, with torchao installed.

Quantising is the last step: packed weights are not scored or cut. Which layers take part is read off one short forward
pass, since a weight can be packed only where nothing but a linear product uses it. Packing, the arithmetic and the
format of the files are torchao's (`TorchAoConfig` of transformers): a row of a weight becomes int8 with one scale.
"""

from __future__ import annotations

import copy
import importlib.util
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
from secateur.checkpoint.stock import SHARD
from secateur.errors import CheckpointError, ModelError, SecateurError
from secateur.evaluation.perplexity import evaluation_mode, input_device, vocabulary_size
from secateur.evaluation.profile import weight_bytes
from secateur.files import atomic_folder, check_apart, check_vacant, copy_in
from secateur.models.config import check_not_quantised, load_config
from secateur.models.loading import LoadOptions, load, skeleton
from secateur.models.manifest import write_manifest
from secateur.models.silence import quiet
from secateur.models.sources import resolve
from secateur.models.tensors import plain_tensors
from secateur.models.tokenizer import load_tokenizer, text_files
from secateur.models.trust import runs_remote_code

SCHEMES = ("weight-only", "dynamic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 8  # of the forward passes that show how weights are used, and that what was written computes
ALIGNED = 8  # sizes of an int8 product on CUDA; torchao computes others on the CPU
_EXTRA = "pip install 'secateur[int8]'"


@dataclass(frozen=True, slots=True)
class Quantised:
    """What `export_int8` wrote: which layers are int8, which matrices are not and why, and the bytes."""

    out: Path
    scheme: str  # one of SCHEMES
    layers: tuple[str, ...]  # modules with int8 weights
    left: Mapping[str, str]  # weights of two and more dimensions that kept their dtype -> why
    weight_bytes: Mapping[str, int]  # "before" and "after", in memory; a tied weight counts once
    file_bytes: int  # of the safetensors in the folder
    unaligned: tuple[str, ...]  # layers whose sizes are not multiples of 8, which CUDA has no dynamic product for

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur export --json` writes it."""
        return {
            "out": str(self.out),
            "scheme": self.scheme,
            "layers": list(self.layers),
            "left": dict(self.left),
            "weight_bytes": dict(self.weight_bytes),
            "file_bytes": self.file_bytes,
            "unaligned": list(self.unaligned),
        }


def export_int8(
    model: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dynamic: bool = False,
    source: str | Path | None = None,
    files: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Quantised:
    """Write a model, pruned or not, with int8 weights in its linear layers; the model itself is left as it is.

    Every row of a weight gets a scale of its own. Products are computed in the model's dtype, or, with `dynamic`, in
    int8: activations are then rounded as well, each token with its own scale. The output head and the table of
    embeddings keep their dtype, as does every weight that anything but a linear product uses; the result says which and
    why. `source` is the folder that the model was loaded from: its plan and record come along. `files` are carried over
    as they are, as `save` does.

    The folder loads with `AutoModelForCausalLM.from_pretrained` where torchao is installed (with
    `trust_remote_code=True` where layers differ in size), and appears whole or not at all: before that it is loaded,
    and its weights must be those in memory. Raises `ModelError` for a model that is quantised already, is of another
    dtype or has no such layer, and `CheckpointError` where torchao is missing or no folder can hold the model.

    >>> import tempfile
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export_int8(model, Path(folder) / "int8")
    >>> len(done.layers), [name for name in done.left if "embed_tokens" in name]
    (6, ['model.decoder.embed_tokens.weight'])
    """
    out = Path(out)
    check_vacant(out, overwrite=overwrite)
    packed, layers, left = int8_copy(model, dynamic=dynamic)
    with atomic_folder(out, overwrite=overwrite) as folder:
        with quiet():
            packed.save_pretrained(folder, max_shard_size=SHARD)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        copy_in(folder, files or {})
        if source is not None:
            beside = {name: Path(source) / name for name in (PLAN_FILE, RECORD_FILE)}
            copy_in(folder, {name: path for name, path in beside.items() if path.is_file()})
        _check_loads(folder, packed)
        write_manifest(folder)
        file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sizes = {path: model.get_parameter(f"{path}.weight").shape for path in layers}
    return Quantised(
        out=out,
        scheme=SCHEMES[dynamic],
        layers=layers,
        left=left,
        weight_bytes={"before": weight_bytes(model), "after": weight_bytes(packed)},
        file_bytes=file_bytes,
        unaligned=tuple(path for path, shape in sizes.items() if any(size % ALIGNED for size in shape)),
    )


def int8_copy(
    model: PreTrainedModel, *, dynamic: bool = False
) -> tuple[PreTrainedModel, tuple[str, ...], dict[str, str]]:
    """The model with int8 weights in its linear layers, as transformers quantises; its other weights are shared.

    Also the layers whose weights are int8 now, and the weights of two and more dimensions that are not, each with the
    reason. Raises as `export_int8` does.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> packed, layers, left = int8_copy(AutoModelForCausalLM.from_config(config))
    >>> layers[-1], left["model.decoder.embed_tokens.weight"]
    ('model.decoder.layers.0.fc2', 'it is lm_head.weight, too')
    """
    check_torchao()
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        MappingType,
        quantize_,
    )

    check_not_quantised(model.config)
    _check_holdable(model)
    layers, left = _sorted_out(model)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        raise ModelError(
            f"{type(model).__name__}: no weight can be int8, since torchao takes those of linear layers ({reasons})"
        )
    shared = [*model.parameters(), *model.buffers()]
    packed: PreTrainedModel = copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})
    # set_inductor_config would change settings of torch that belong to the process, its precision among them.
    how: Any = Int8WeightOnlyConfig(set_inductor_config=False)
    if dynamic:  # activations lie to one side of zero in many layers: symmetric ranges do twice the damage
        how = Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False)
    kept = sorted({name.removesuffix(".weight") for name in left})
    quantizer = AutoHfQuantizer.from_config(TorchAoConfig(how, modules_to_not_convert=kept), pre_quantized=False)
    quantizer.preprocess_model(packed)
    chosen = set(layers)
    quantize_(packed, how, filter_fn=lambda _, path: path in chosen)
    packed.hf_quantizer = quantizer
    quantizer.postprocess_model(packed)
    packed.eval()
    return packed, tuple(layers), left


def export_int8_of(
    model: str,
    out: str | Path,
    *,
    dynamic: bool = False,
    loading: LoadOptions | None = None,
    overwrite: bool = False,
) -> Quantised:
    """Load a MODEL argument and its tokenizer, and write it as `export_int8` does. Raises `SecateurError`.

    >>> export_int8_of("no/such/model", "out")
    Traceback (most recent call last):
    secateur.errors.ModelError: 'no/such/model': no such file or folder. ...
    """
    loading, out = loading or LoadOptions(), Path(out)
    check_torchao()
    check_vacant(out, overwrite=overwrite)
    check_apart(resolve(model).path, out)
    source = resolve(model)
    check_not_quantised(load_config(model, trust_remote_code=loading.trust_remote_code), name=model)
    folder = source.path if source.kind == "folder" else None
    loaded = load(model, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=loading.trust_remote_code)
    return export_int8(
        loaded,
        out,
        tokenizer=tokenizer,
        dynamic=dynamic,
        source=folder,
        files=text_files(model, tokenizer),
        overwrite=overwrite,
    )


def check_torchao() -> None:
    """Raise `CheckpointError` where torchao is not installed.

    >>> check_torchao()
    """
    if importlib.util.find_spec("torchao") is None:
        raise CheckpointError(f"int8 weights are packed by torchao, which is not installed: {_EXTRA}")


def _check_holdable(model: PreTrainedModel) -> None:
    """Raise `ModelError` for a dtype that is not packed, and `CheckpointError` for sizes that no config says."""
    if model.dtype not in DTYPES:
        raise ModelError(
            f"weights of {str(model.dtype).removeprefix('torch.')} are not packed; expected "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}: load the model with --dtype float32"
        )
    twin = skeleton(model.config, trust_remote_code=runs_remote_code(model))
    shapes = [{name: weight.shape for name, weight in each.named_parameters()} for each in (model, twin)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{type(model).__name__}: its config does not say its sizes, since it was cut in memory. Write the folder "
            "first (secateur.save), and quantise what is loaded from it"
        )


def _sorted_out(model: PreTrainedModel) -> tuple[list[str], dict[str, str]]:
    """The layers whose weights can be int8, and why every other weight of two and more dimensions cannot."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    head, elsewhere = model.get_output_embeddings(), _used_elsewhere(model)
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
        elif id(weight) in elsewhere:
            left[name] = "more than a linear product is computed with it"
        else:
            layers.append(path)
    return layers, left


class _Uses(TorchFunctionMode):
    """Notes which of some weights go into anything but a linear product, by id. Final."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.elsewhere: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # sizes and dtypes may be asked for
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            if func is functional.linear:
                given -= {id(kwargs["weight"] if "weight" in kwargs else args[1])}
            self.elsewhere |= given & self.weights
        return result


def _used_elsewhere(model: PreTrainedModel) -> set[int]:
    """Ids of the weights that anything but a linear product uses, in a pass over a few tokens."""
    uses = _Uses(model.parameters())
    try:
        with uses:
            _logits(model)
    except SecateurError:
        raise
    except Exception as error:  # the code of models raises anything
        raise ModelError(
            f"{type(model).__name__}: how it uses its weights shows when it reads a line of tokens, and it cannot; "
            f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        ) from error
    return uses.elsewhere


def _logits(model: PreTrainedModel) -> Tensor:
    """Those of the first few token ids."""
    ids_BT = torch.arange(TOKENS, device=input_device(model))[None] % vocabulary_size(model)
    with evaluation_mode(model), torch.no_grad():
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _check_loads(folder: Path, packed: PreTrainedModel) -> None:
    """Load the folder as anyone would: every weight is there and is what it is in memory, and the model computes."""
    options: dict[str, Any] = {"attn_implementation": packed.config._attn_implementation}
    if getattr(packed.config, "_experts_implementation", None) is not None:
        options["experts_implementation"] = packed.config._experts_implementation
    if packed.device.type != "cpu":
        options["device_map"] = {"": packed.device}
    try:
        with quiet():
            read: Any = type(packed).from_pretrained(
                folder, output_loading_info=True, trust_remote_code=runs_remote_code(packed), **options
            )
        loaded, report = read
        if odd := [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[key]]:
            raise ValueError(f"{', '.join(map(str, odd[:3]))} would not be what it is")
        found = loaded.state_dict()
        if odd := [name for name, tensor in packed.state_dict().items() if not _same(tensor, found[name])]:
            raise ValueError(f"{', '.join(odd[:3])} would have other values")
        _logits(loaded)  # it must compute
    except Exception as error:  # whatever the code of models and of torchao raises
        raise CheckpointError(
            f"{type(packed).__name__}: transformers cannot load it with int8 weights; {type(error).__name__}: "
            f"{' '.join(str(error).split()):.200}"
        ) from error


def _same(tensor: Tensor, other: Tensor) -> bool:
    pairs = zip(plain_tensors(tensor), plain_tensors(other), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)
