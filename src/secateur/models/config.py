"""MODEL -> its config, and what a config says: the class of the model, packed weights, the number of positions."""

from __future__ import annotations

import re
from typing import Any, cast

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

from secateur.errors import DataError, ModelError
from secateur.models.classes import AUTO_CLASSES, architecture, auto_class, default_class, objective_of
from secateur.models.gguf import config_of_gguf
from secateur.models.modeling_per_layer import PER_LAYER, per_layer_class
from secateur.models.options import DEMO
from secateur.models.sources import check_unchanged, loader_arguments, resolve
from secateur.models.trust import model_errors

MOST_BLOCKS = 10_000  # layers or experts that a config may name: each costs milliseconds to build, on `meta` too
_BLOCKS = re.compile(r"n(um)?_\w*(layer|expert|block)s?")


def load_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the config of a model; a GGUF's metadata becomes an ordinary, unquantized config.

    With `trust_remote_code` the Python files beside the config may run. Raises `ModelError` when there is none, when
    it cannot be read, when it needs such files and they are not trusted, or when no auto class knows its model type.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AutoConfig.for_model("opt", num_hidden_layers=3).save_pretrained(folder)
    ...     load_config(folder).num_hidden_layers
    3
    """
    config = whole_config(model, trust_remote_code=trust_remote_code)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and architecture(config) is None
    model_class = causal_class(config) if causal else None
    text = config.sub_configs.get("text_config")
    # A language model that is a part of a larger model has the part's config.
    is_part = model_class is not None and text is not None and model_class.config_class == text
    return config.get_text_config() if is_part else config


def whole_config(model: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Read a config as `load_config` does, with the parts around the language model that the file may describe."""
    source = resolve(model)
    location, options = loader_arguments(source)
    check_unchanged(source, lambda name: name == "config.json")
    with model_errors(source, "its config cannot be read", trust_remote_code=trust_remote_code):
        if source.kind == "gguf" and source.path is not None:
            config = config_of_gguf(source.path)
        else:
            written = PreTrainedConfig.get_config_dict(location, **options)[0]
            _check_blocks(written)
            if isinstance(written, dict) and str(written.get("model_type")).startswith(f"{PER_LAYER}_"):
                return per_layer_config(written)
            config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code, **options)
    if default_class(config) is None and not is_custom(config):
        raise ModelError(
            f"{model!r}: no model of type {config.model_type!r} is known. Expected one that {', '.join(AUTO_CLASSES)} "
            f"knows, or an auto_map with AutoModelForCausalLM in its config.json; {DEMO!r} works."
        )
    return config


def _check_blocks(written: Any, prefix: str = "") -> None:
    """Raise ValueError for more layers or experts than any model has: to build them would take hours."""
    for name, value in written.items() if isinstance(written, dict) else ():
        if isinstance(value, dict) and not prefix:
            _check_blocks(value, f"{name}.")
        elif type(value) is int and value > MOST_BLOCKS and _BLOCKS.fullmatch(str(name)):
            raise ValueError(f"{prefix}{name}={value}, and no model has more than {MOST_BLOCKS}")


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM builds for a config, or else the one beside it that takes such a config.

    >>> causal_class(AutoConfig.for_model("opt")) is transformers.OPTForCausalLM
    True
    """
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING  # declared as if it held pairs of classes
    if type(config) in mapping:
        return cast(type[PreTrainedModel], mapping[type(config)])
    package = type(config).__module__.rpartition(".")[0]
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if package.endswith(f".{model_type_to_module_name(model_type)}"):
            model_class = mapping[CONFIG_MAPPING[model_type]]
            if model_class.config_class is type(config):
                return cast(type[PreTrainedModel], model_class)
    return None


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class to build from a config and to load; None where it is custom code.

    >>> class_of(AutoConfig.for_model("bert", architectures=["BertModel"])) is transformers.BertModel
    True
    """
    if (per_layer := per_layer_model_class(config)) is not None:
        return per_layer
    if is_custom(config):
        return None
    return architecture(config) or causal_class(config) or default_class(config)


def takes(model_class: Any, config_class: Any) -> bool:
    """Whether a model class of transformers is made from such configs: its own, or those that an auto class gives it.

    >>> takes(transformers.OPTForCausalLM, transformers.OPTConfig)
    True
    """
    own = getattr(model_class, "config_class", None) is config_class
    return own or auto_class(model_class, config_class) is not None


def per_layer_config(written: dict[str, Any]) -> PreTrainedConfig:
    """The config of a per-layer model, for our own class: no code that lies beside it is run.

    Raises ValueError for one that no such model has.
    """
    stock_type = written["model_type"].removeprefix(f"{PER_LAYER}_")
    if stock_type not in CONFIG_MAPPING:
        raise ValueError(f"{PER_LAYER} of the model type {stock_type!r}, which transformers does not know")
    stock = CONFIG_MAPPING[stock_type]
    config: PreTrainedConfig = per_layer_class(stock).from_dict(written)
    about = getattr(config, PER_LAYER)
    architecture = about.get("architecture") if isinstance(about, dict) else None
    model_class = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if model_class is None or not takes(model_class, stock):
        raise ValueError(f"{PER_LAYER}, architecture: {architecture!r:.60} is no model class of transformers for it")
    config.auto_map = auto_map(config, model_class)
    return config


def auto_map(config: PreTrainedConfig, model_class: Any) -> dict[str, str]:
    """Where the Auto classes find the classes of a per-layer model in its folder, for a stock model class.

    With experts of other sizes there is none for AutoModel: vLLM's transformers backend, which builds it, takes those
    sizes from the settings for all layers, and would leave a part of each expert without weights, in silence.
    """
    module, stock = per_layer_class.__module__.rpartition(".")[2], type(config).__mro__[1]
    about = getattr(config, PER_LAYER)
    shapes = about.get("shapes") if isinstance(about, dict) else None
    experts = any(".experts." in str(name) for name in shapes or ())
    classes = {
        "AutoConfig": type(config),
        "AutoModel": None if experts else _base_class(config),
        auto_class(model_class, stock) or "AutoModelForCausalLM": per_layer_class(model_class, stock),
    }
    return {name: f"{module}.{each.__name__}" for name, each in classes.items() if each is not None}


def _base_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class without a head for a per-layer config; None where AutoModel has none for it, or a larger model."""
    mapping: Any = MODEL_MAPPING
    stock = type(config).__mro__[1]
    if stock not in mapping or getattr(config, "is_encoder_decoder", False):
        return None
    return cast(type[PreTrainedModel], per_layer_class(mapping[stock], stock))


def per_layer_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Our class for the config of a per-layer model, which needs no remote code; None for any other config.

    >>> per_layer_model_class(AutoConfig.for_model("bert")) is None
    True
    """
    if type(config).__module__ != per_layer_class.__module__:
        return None
    stock = type(config).__mro__[1]
    model_class = getattr(transformers, getattr(config, PER_LAYER)["architecture"])
    return cast(type[PreTrainedModel], per_layer_class(model_class, stock))


def is_custom(config: PreTrainedConfig) -> bool:
    """Whether the model of a config is custom code, which lies beside it; a per-layer model is of our own class."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and per_layer_model_class(config) is None


def register(model: str) -> None:
    """Let the Auto classes of transformers read per-layer models such as MODEL without remote code, in this process.

    For programs that load by `AutoModelForCausalLM` themselves; nothing that lies in a folder is run. Raises
    `ModelError` for a model that needs nothing of the kind.
    """
    config = load_config(model)
    if per_layer_model_class(config) is None:
        raise ModelError(f"{model!r} has a stock config: from_pretrained reads it as it is")
    AutoConfig.register(config.model_type, type(config), exist_ok=True)
    register_classes(config)


def register_classes(config: PreTrainedConfig) -> None:
    """Let the Auto classes build the models of a per-layer config, in this process."""
    model_class = per_layer_model_class(config)
    stock = type(config).__mro__[1]
    name = auto_class(getattr(transformers, getattr(config, PER_LAYER)["architecture"]), stock)
    getattr(transformers, name or "AutoModelForCausalLM").register(type(config), model_class, exist_ok=True)
    base = _base_class(config)
    if base is not None:
        AutoModel.register(type(config), base, exist_ok=True)


def special_token_ids(config: PreTrainedConfig) -> list[int]:
    """The token ids that a config names, each once; the one that begins a text comes last.

    >>> special_token_ids(AutoConfig.for_model("opt", bos_token_id=2, eos_token_id=3, pad_token_id=1))
    [3, 1, 2]
    """
    text = config.get_text_config()
    names = sorted(name for name in text.to_dict() if name.endswith("_token_id") and name != "bos_token_id")
    ids = [getattr(text, name, None) for name in [*names, "bos_token_id"]]
    vocabulary = getattr(text, "vocab_size", 0)
    known = [each for each in ids if type(each) is int and 0 <= each < vocabulary]
    return [each for place, each in enumerate(known) if each not in known[place + 1 :]]


def quantization(config: PreTrainedConfig) -> str | None:
    """How the weights of a model with this config are packed, as its quantizer is called; None where they are not.

    >>> quantization(AutoConfig.for_model("opt", quantization_config={"quant_method": "gptq"}))
    'gptq'
    """
    about = getattr(config, "quantization_config", None)
    if about is None:
        return None
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    return str(getattr(method, "value", method))


def check_writes_text(config: PreTrainedConfig, *, name: str, doing: str) -> None:
    """Raise `ModelError` for a model that does not continue a text token by token, which what is done asks for.

    >>> check_writes_text(AutoConfig.for_model("vit"), name="vit", doing="evaluate")
    Traceback (most recent call last):
    secateur.errors.ModelError: 'vit' is a ViTModel, which continues no text, and evaluate is for models that do. ...
    """
    if not writes_text(config):
        model_class: Any = class_of(config)
        raise ModelError(
            f"{name!r} is a {model_class.__name__}, which continues no text, and {doing} is for models that do. "
            f"`secateur profile {name}` counts what it costs"
        )


def writes_text(config: PreTrainedConfig) -> bool:
    """Whether the model of a config continues a text token by token.

    >>> writes_text(AutoConfig.for_model("opt")), writes_text(AutoConfig.for_model("t5"))
    (True, False)
    """
    model_class = class_of(config)
    return model_class is None or objective_of(model_class, config) == "next token"


def check_not_quantized(config: PreTrainedConfig, *, name: str | None = None) -> None:
    """Raise `ModelError` for the config of a quantized model: the packed weights of most formats cannot be cut."""
    method = quantization(config)
    if method is not None:
        name = name or config.name_or_path or config.model_type
        raise ModelError(
            f"{name!r} is quantized ({method}), and packed weights cannot be scored, cut or packed again. "
            f"Prune the model that it was made from and quantize the result; `secateur plan {name} --sizes-only` "
            "says what a cut leaves"
        )


def max_positions(config: PreTrainedConfig) -> int | None:
    """The number of tokens that a model has positions for; None where there is no limit.

    >>> max_positions(AutoConfig.for_model("opt", max_position_embeddings=8))
    8
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None  # -1 and the like: no limit


def check_positions(config: PreTrainedConfig, length: int, *, name: str = "length") -> None:
    """Raise `DataError` when samples of `length` tokens are longer than the positions of the config's model.

    `name` is that of the option which sets the length.

    >>> check_positions(AutoConfig.for_model("opt", max_position_embeddings=8), 9)
    Traceback (most recent call last):
    secateur.errors.DataError: length=9 is longer than the model's 8 positions. Expected at most length=8 (--length 8)
    """
    positions = max_positions(config)
    if positions is not None and length > positions:
        flag = f"--{name.replace('_', '-')}"
        raise DataError(
            f"{name}={length} is longer than the model's {positions} positions. Expected at most {name}={positions} "
            f"({flag} {positions})"
        )
