"""MODEL -> the model itself: without memory (`skeleton`), on a CPU or on a GPU (`load`).

Weights are read from safetensors or GGUF and never from a pickle. What cannot be loaded whole is an error: a tensor
that the checkpoint lacks is never filled with random numbers.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from secateur.errors import ModelError, check_installed, one_line, unknown
from secateur.models.classes import auto_class
from secateur.models.config import class_of, per_layer_model_class, quantization, whole_config
from secateur.models.gguf import forget_gguf
from secateur.models.options import LoadOptions
from secateur.models.silence import quiet
from secateur.models.sources import Source, check_unchanged, loader_arguments, resolve
from secateur.models.streaming import stream_in_place
from secateur.models.trust import check_trust, model_errors, runs_remote_code
from secateur.models.weight_files import check_weight_files, is_model_file

logger = logging.getLogger(__name__)

STREAMED = "streamed"  # a device's name: layers on the CPU, brought to the GPU one by one
WEIGHTS_SHARE = 0.8  # of the free memory of a GPU: larger models are streamed to it
EXPERTS = "batched_mm"  # experts as plain matrix products, whichever tokens they get: shapes that no data decides
PACKERS = {  # how weights are packed -> the package that reads them, and the extra of ours that brings it
    "torchao": ("torchao", "int8"),
    "compressed-tensors": ("compressed_tensors", "quantize"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of a config on `meta`: every shape, no storage, eager attention, evaluation mode.

    The config is copied, not changed. Raises `ModelError` when the model's own code rejects its sizes, and when that
    code is custom and `trust_remote_code` does not let it run.

    >>> config = transformers.AutoConfig.for_model("bert", hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    >>> {str(weight.device) for weight in skeleton(config).parameters()}
    {'meta'}
    """
    own_config = copy.deepcopy(config)
    if hasattr(own_config, "_experts_implementation"):
        own_config._experts_implementation = EXPERTS
    try:
        with quiet(), torch.device("meta"), no_init_weights():  # there are no values to initialise
            build: Any = functools.partial(AutoModelForCausalLM.from_config, trust_remote_code=trust_remote_code)
            model_class = class_of(config)
            if model_class is not None and auto_class(model_class, type(config)) != "AutoModelForCausalLM":
                build = model_class._from_config
            model = build(own_config, attn_implementation="eager")
            model.tie_weights()  # else a part of the initialisation
    except Exception as error:  # any model code may raise anything
        check_trust(error, config.name_or_path or config.model_type, trust_remote_code=trust_remote_code)
        raise ModelError(
            f"model type {config.model_type!r}: no model can be built from this config; {one_line(error)}."
        ) from error
    return cast(PreTrainedModel, model.eval())


def load(
    model: str, *, dtype: str | torch.dtype = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model with all its weights, in evaluation mode; its class is the one that its config names.

    `dtype` is `auto` (the checkpoint's own; float32 for a quantized GGUF), one of `DTYPES` or a torch.dtype; `device`
    is as in `LoadOptions`. On a CPU, safetensors that need no other dtype or layout stay on the disk: they are mapped.
    A GGUF becomes an ordinary model with unpacked weights. Raises `ModelError` when a file is missing, truncated or a
    pickle, and when the weights are not exactly those that the model needs; NaN and Inf are left to `check_finite`.

    >>> config = transformers.AutoConfig.for_model("bert", hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ...     load(folder, dtype="bfloat16").dtype
    torch.bfloat16
    """
    source = resolve(model)
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if source.kind == "config":
        raise ModelError(
            f"{model!r}: a config file holds no weights. Name the folder that has them, or use what needs only "
            f"sizes: skeleton(load_config({model!r}))."
        )
    check_weight_files(source)
    check_unchanged(source, is_model_file)
    # Without this the weights of a GGUF may stay packed, the model refuses to be saved, and its config says quantized.
    if source.kind == "gguf" and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    config = whole_config(model, trust_remote_code=trust_remote_code)
    gpu = _streams_to(source, config, options["dtype"], device, trust_remote_code)
    if gpu is None:
        options |= _device_map(device)
    if (method := quantization(config)) in PACKERS:
        package, extra = PACKERS[method]
        check_installed(ModelError, package, extra=extra, what=f"{model!r}: reading packed weights")
    if source.kind == "folder" and quantization(config) is None:
        # What the weights do not have is made up at random, in whatever size the config asks for: compare them first.
        _loaded(source, config, {"device_map": {"": "meta"}}, trust_remote_code)
    loaded, unexpected = _loaded(source, config, options, trust_remote_code)
    if options["dtype"] != "auto" and runs_remote_code(loaded):
        for parameter in loaded.parameters():  # code may build some in a dtype of its own, whatever is asked for
            parameter.data = parameter.data.to(options["dtype"]) if parameter.is_floating_point() else parameter.data
    if method == "compressed-tensors":
        with quiet(), torch.no_grad():  # the first pass unpacks the weights, which it shows as bars
            loaded(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=loaded.device))
    if unexpected:
        logger.warning("%r: the model has no place for %s of its checkpoint", source.argument, _some(unexpected))
    if gpu is not None:
        stream_in_place(loaded, gpu)
    return loaded  # from_pretrained has set evaluation mode


def load_on_meta(model: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load the model of a folder without memory: its shapes and ties, and the tensors that it has no place for.

    Raises `ModelError` as `load` does.
    """
    source = resolve(model)
    check_weight_files(source)
    config = whole_config(model, trust_remote_code=trust_remote_code)
    loaded, unexpected = _loaded(source, config, {"device_map": {"": "meta"}}, trust_remote_code)
    return loaded, tuple(unexpected)


def _loaded(
    source: Source, config: PreTrainedConfig, options: dict[str, Any], trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model by the loader of its kind, and the tensors of the checkpoint that it has no place for, sorted."""
    location, location_options = loader_arguments(source)
    loader: Any = class_of(config)
    if per_layer_model_class(config) is None:
        if loader is None or auto_class(loader, type(config)) in (None, "AutoModelForCausalLM"):
            loader = AutoModelForCausalLM
        location_options = {**location_options, "trust_remote_code": trust_remote_code}
        if trust_remote_code:
            check_unchanged(source, lambda name: name.endswith(".py"))
    silence = nullcontext() if quantization(config) is None else quiet()  # what unpacks shows bars
    with model_errors(source, "its weights cannot be loaded", trust_remote_code=trust_remote_code), silence:
        loaded, report = loader.from_pretrained(
            location,
            config=copy.deepcopy(config),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, from which we make a better error
            use_kernels=False,  # no code from the hub: what is traced, scored and measured is the model's own
            **location_options,
            **options,
        )
    forget_gguf()
    _check_report(source, report)
    return cast(PreTrainedModel, loaded), sorted(report["unexpected_keys"])


def _check_report(source: Source, report: dict[str, Any]) -> None:
    """Raise `ModelError` for weights that the checkpoint lacks or has in another shape."""
    remedy = "Expected every weight of the model; use the config.json that belongs to these weights, or copy both anew."
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{source.argument!r}: the checkpoint lacks {_some(missing)}. {remedy}")
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{name} ({tuple(found)}, expected {tuple(wanted)})" for name, found, wanted in mismatched]
        raise ModelError(f"{source.argument!r}: the checkpoint has another shape for {_some(shapes)}. {remedy}")
    if report.get("error_msgs"):
        problems = [str(message) for message in report["error_msgs"]]
        raise ModelError(f"{source.argument!r}: the checkpoint cannot be converted: {_some(problems)}. {remedy}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ModelError(unknown("dtype", str(dtype), ["auto", *DTYPES]))


def _streams_to(
    source: Source, config: PreTrainedConfig, dtype: str | torch.dtype, device: str, trust_remote_code: bool
) -> torch.device | None:
    """The GPU to which layers are brought one by one; None where all weights are loaded to one place."""
    if device not in ("auto", STREAMED):
        return None
    gpu = _device("auto")
    if gpu.type == "cpu":
        if device == STREAMED:
            raise ModelError("device 'streamed' brings layers to a GPU; torch sees none. Use device 'cpu'")
        return None
    if device == STREAMED:
        return gpu
    if quantization(config) is not None:
        return None
    stored = config.dtype if source.kind != "gguf" else None
    kind = next((each for each in (dtype, stored) if isinstance(each, torch.dtype)), torch.float32)
    shapes = skeleton(config, trust_remote_code=trust_remote_code).parameters()
    gc.collect()
    torch.cuda.empty_cache()  # what torch has kept of models that are gone is free, and does not look so
    weights, room = kind.itemsize * sum(weight.numel() for weight in shapes), torch.cuda.mem_get_info(gpu)[0]
    if weights < WEIGHTS_SHARE * room:
        return None
    logger.warning(
        "%r: %.1f GiB of weights do not fit on %s, which has %.1f free: its layers stay on the CPU and are brought "
        "there one by one",
        *(source.argument, weights / 2**30, gpu, room / 2**30),
    )
    return gpu


def _device_map(device: str) -> dict[str, Any]:
    """The keyword argument of `from_pretrained` for a device; none for a CPU, where weights stay mapped."""
    if device == "balanced":
        if torch.cuda.device_count() < 2:
            raise ModelError(
                f"device 'balanced' is for several GPUs; torch sees {torch.cuda.device_count()}. Use device 'auto'"
            )
        return {"device_map": "balanced"}
    target = _device(device)
    return {} if target.type == "cpu" else {"device_map": {"": target}}


def _device(device: str) -> torch.device:
    if device == "auto":
        rank = os.environ.get("LOCAL_RANK")  # of this process, where several are started
        return torch.device(("cuda" if rank is None else f"cuda:{rank}") if torch.cuda.is_available() else "cpu")
    expected = 'Expected auto, cpu, cuda, cuda:N, balanced or streamed: load("demo", device="auto").'
    try:
        target = torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"device {device!r} is unknown. {expected}") from error
    n_gpus = torch.cuda.device_count()
    if target.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} is not supported. {expected}")
    if target.type == "cuda" and (target.index or 0) >= n_gpus:
        raise ModelError(f"device {device!r} does not exist; torch sees {n_gpus} GPUs. {expected}")
    return target


def unplaced_in(name: str, loading: LoadOptions) -> tuple[str, ...]:
    """The tensors of a checkpoint that the model has no place for; the weights of a GGUF have other names."""
    gguf = resolve(name).kind == "gguf"
    return () if gguf else load_on_meta(name, trust_remote_code=loading.trust_remote_code)[1]
