"""vLLM's plug-in: with it, vLLM serves per-layer folders without remote code, and sub-layers that are gone.

`register` is the entry point `vllm.general_plugins`, which vLLM calls in each of its processes. It only names things:
configs are read, and classes made, for per-layer folders alone. The classes are vLLM's transformers backend, told of
what it cannot read from a config: layers without attention, and experts of other sizes in each layer.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from secateur.errors import ExportError
from secateur.models.config import per_layer_config, register_classes
from secateur.models.loading import load_on_meta
from secateur.models.modeling_per_layer import PER_LAYER, Skipped
from secateur.models.sources import check_unchanged, resolve
from secateur.models.weight_files import is_model_file

BACKEND = "vllm.model_executor.models.transformers"
KERNELS = "vllm.model_executor.kernels.linear.scaled_mm.cpu"
KNOWN = "0.32"  # the version whose backend is extended and tested
# Class that is served -> the class of the backend that it extends.
SERVED = {"PerLayerForCausalLM": "TransformersForCausalLM", "PerLayerMoEForCausalLM": "TransformersMoEForCausalLM"}


def register() -> None:
    """Tell transformers and vLLM of per-layer models, in this process; called again, it changes nothing."""
    registry: Any = importlib.import_module("vllm").ModelRegistry
    for name in SERVED:
        if name not in registry.get_supported_archs():
            registry.register_model(name, f"{__name__}:{name}")
    for stock_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model_type = f"{PER_LAYER}_{stock_type}"
        members = {"model_type": model_type, "from_dict": classmethod(_read), "__module__": __name__}
        AutoConfig.register(model_type, type("UnreadConfig", (PreTrainedConfig,), members), exist_ok=True)


def _read(_: Any, written: dict[str, Any], /, **options: Any) -> Any:
    """The config of a folder, of whose code nothing runs; it names the class that vLLM is to serve.

    Raises ValueError, or `ModelError`, for what is no per-layer model or is not as it was written.
    """
    folder = str(options.get("name_or_path", ""))
    if Path(folder).is_dir():
        check_folder(str(Path(folder).absolute()))  # not the demo model, where the folder has its name
    config: Any = per_layer_config(written)
    if "padded" in getattr(config, PER_LAYER):
        raise ValueError("vLLM caches values as wide as keys: serve a model that was cut without the axis head_dim")
    register_classes(config)
    converter: Any = importlib.import_module("vllm.transformers_utils.model_arch_config_convertor")
    experts = converter.ModelArchConfigConvertorBase(config, config.get_text_config()).get_num_experts()
    config.architectures = ["PerLayerMoEForCausalLM" if experts else "PerLayerForCausalLM"]
    return type(config).from_dict(config.to_dict(), **options)


@functools.cache
def check_folder(folder: str) -> None:
    """Raise `ModelError` unless the weights of a folder are those that its config wants, as they were written."""
    check_unchanged(resolve(folder), is_model_file)
    load_on_meta(folder)


def __getattr__(name: str) -> Any:
    """Make the class that vLLM serves, when it asks for it."""
    if name not in SERVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _served(name, getattr(importlib.import_module(BACKEND), SERVED[name]))
    return globals()[name]


def _served(name: str, stock: Any) -> type:
    def patch_config(self: Any) -> None:
        """Before the model is built: in a process that has not read the config itself."""
        register_classes(self.config)
        _flatten_for_amx()
        stock._patch_config(self)

    def replace(self: Any) -> None:
        with _experts_as_they_are(self):
            stock.recursive_replace(self)

    def create_attention_instances(self: Any, prefix: str = "") -> None:
        """Let layers without attention pass as such; they get no cache."""
        gone = _gone(self)
        self.attention_fusers.update({number: (path, _NoAttention) for number, path in gone.items()})
        stock._create_attention_instances(self, prefix)
        context = self.compilation_config.static_forward_context
        for number, path in gone.items():
            del self.attention_fusers[number]
            block = self.get_submodule(path)
            del context[block.attn.layer_name], block.attn

    methods = {
        "_patch_config": patch_config,
        "recursive_replace": replace,
        "_create_attention_instances": create_attention_instances,
    }
    if unknown := sorted(name for name in methods if not hasattr(stock, name)):
        raise ExportError(
            f"{stock.__name__} of this vLLM has no {unknown[0]}: Secateur's plug-in is for vLLM {KNOWN}. Without the "
            "plug-in, its transformers backend may serve the folder: --model-impl transformers --trust-remote-code"
        )
    members = {
        **methods,
        "__module__": __name__,
        "__doc__": f"A {stock.__name__} of per-layer sizes.",
    }
    return type(name, (stock,), members)


@functools.cache  # once in a process
def _flatten_for_amx() -> None:
    """Let the kernel for int8 weights on CPUs with AMX read batches of rows: it takes two dimensions, and gets three.

    vLLM's other kernels take any number.
    """
    with suppress(ImportError, AttributeError):  # no such kernel in this version
        kernel: Any = importlib.import_module(KERNELS).CPUInt8ScaledMMLinearKernel
        of_rows = kernel._apply_weights_sgl

        def apply(self: Any, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            found: Tensor = of_rows(self, layer, x.reshape(-1, x.shape[-1]), bias)
            return found.reshape(*x.shape[:-1], -1)

        kernel._apply_weights_sgl = apply


class _NoAttention:
    """What vLLM asks of the attention in a layer: nothing, where there is none."""

    @staticmethod
    def scale(block: Skipped) -> None:
        """The factor of the scores."""

    @staticmethod
    def sinks(block: Skipped) -> None:
        """The logits that no key has."""


def _gone(model: Any) -> dict[int, str]:
    """Layers whose attention is gone, as their config says, with the path of a module that stands for it."""
    layers: Any = model.text_config.per_layer_config
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        number = next((int(piece) for piece in path.split(".") if piece.isdigit()), None)
        if isinstance(module, Skipped) and number is not None and "attention" in getattr(layers[number], "skip", ()):
            found.setdefault(number, path)
    return found


@contextmanager
def _experts_as_they_are(model: Any) -> Iterator[None]:
    """Give the factory of experts the sizes of those that it replaces; the config has those of the dense model."""
    module: Any = importlib.import_module(f"{BACKEND}.moe")
    factory = module.FusedMoEFactory

    def sized(*, prefix: str, **options: Any) -> Any:
        experts = model.get_submodule(prefix)
        sizes = expert_sizes(experts)
        if sizes is not None:
            options["num_experts"], options["intermediate_size"] = sizes
        return factory(prefix=prefix, **options)

    module.FusedMoEFactory = sized
    try:
        yield
    finally:
        module.FusedMoEFactory = factory


def expert_sizes(experts: nn.Module) -> tuple[int, int] | None:
    """How many experts there are and how wide each is, by their last matrix; None where it is named otherwise."""
    down = getattr(experts, "down_proj", None)
    if isinstance(down, nn.Parameter) and down.dim() == 3:
        return down.shape[0], min(down.shape[1:])
    return None
