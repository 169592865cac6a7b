"""A model -> the same with a small trainable adapter (LoRA) at every matrix of its layers; and merged again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import TrainingError, check_installed, one_line
from secateur.models.modeling_per_layer import pad_in_place, padded_in
from secateur.models.silence import quiet
from secateur.recovery.options import LoraOptions

TARGET_MODULES = "all-linear"  # peft's name for every linear layer but the output layer
ADAPTER_FOLDER = "adapter"  # within a model's folder


def check_peft() -> None:
    """Raise `TrainingError` where peft is not installed."""
    check_installed(TrainingError, "peft", extra="recover", what="LoRA")


def add_lora(model: PreTrainedModel, options: LoraOptions) -> Any:
    """Return peft's model around `model` with a new adapter, whose product is 0; the model's own weights are frozen.

    Stacked experts get an adapter, too. peft has no dropout for these, so a model that has any is trained without.
    Parts that read images or sound get none, nor do modules that peft takes in no model of the type, such as those
    whose weights a fused kernel reads. Raises `TrainingError` where peft is missing or refuses the model.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> adapted = add_lora(AutoModelForCausalLM.from_config(config), LoraOptions(rank=2))
    >>> sorted({name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad})
    ['fc1', 'fc2', 'k_proj', 'out_proj', 'q_proj', 'v_proj']
    """
    check_peft()
    import peft

    alpha: Any = options.alpha  # peft declares an int and only divides it
    experts = expert_weights(model)
    excluded = [re.escape(name) for name in (*_towers(model), *_more_than_linear(model))]
    padded = padded_in(model, remove=True)  # what a layer reads and gives is padded around its adapter, too
    adapted: Any = None
    with _without_warnings():
        while adapted is None:
            config = peft.LoraConfig(
                r=options.rank,
                lora_alpha=alpha,
                lora_dropout=0.0 if experts else options.dropout,
                target_modules=TARGET_MODULES,
                exclude_modules=rf"(.*\.)?({'|'.join(excluded)})(\..*)?" if excluded else None,
                target_parameters=experts or None,
                task_type=peft.TaskType.CAUSAL_LM,
            )
            try:
                adapted = peft.get_peft_model(model, config)
            except ValueError as error:
                refused = _refused(error) - {*excluded}
                _take_off(model)
                if not refused:
                    pad_in_place(model, padded)
                    raise TrainingError(
                        f"{type(model).__name__} takes no LoRA ({one_line(error)}). Train all weights: --method full "
                        "or distill"
                    ) from error
                excluded = [*excluded, *sorted(refused)]
    pad_in_place(adapted.get_base_model(), padded)
    return adapted


def _refused(error: ValueError) -> set[str]:
    """The names of modules that peft says it takes in no model of this type; their weights are read by a kernel."""
    named = re.search(r"Incompatible modules: \{([^}]*)\}", str(error))
    return set(re.findall(r"'([^']+)'", named[1])) if named else set()


def _take_off(model: nn.Module) -> None:
    """Put modules back that peft had wrapped before it raised an error."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())


def expert_weights(model: nn.Module) -> list[str]:
    """Return the names of weights that stack one matrix for each expert: experts x output x input.

    No more than the config counts; weights of mixers may have three dimensions, too.
    """
    towers = tuple(f"{name}." for name in _towers(model))
    config: Any = getattr(model, "config", None)  # of the model, or of one within an adapter
    most = _most_experts(config.to_dict()) if isinstance(config, PreTrainedConfig) else 0
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")  # whose weights of three dimensions are of convolutions
        and not f"{path}.".startswith(towers)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and len(parameter) <= most
    ]


def _most_experts(settings: Mapping[str, Any]) -> int:
    """The largest number that a config, or one within it, has for anything of experts; 0 where there are none."""
    found = [_most_experts(value) for value in settings.values() if isinstance(value, Mapping)]
    found += [value for name, value in settings.items() if "expert" in str(name) and isinstance(value, int)]
    return max(found, default=0)


def _towers(model: nn.Module) -> list[str]:
    """Return the names of the parts beside the text's own model, which read images or sound; none where it is alone."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return []
    try:
        decoder: Any = model.get_decoder()
    except (AttributeError, NotImplementedError):  # code that came with a model
        return []
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if path and module is not decoder and _holds(module, decoder)
        for name, part in module.named_children()
        if not _holds(part, decoder)
    ]


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(each is part for each in module.modules())


def _more_than_linear(model: nn.Module) -> list[str]:
    """Return the names of linear layers whose own code gives something else than a product, as a router's may.

    peft takes them for linear, and would add to what they give.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
            continue
        try:
            with torch.no_grad():
                given: Any = module(module.weight.new_zeros(1, module.in_features))
            linear = given.shape == (1, module.out_features)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):  # any model code
            linear = False
        if not linear:
            found.append(name)
    return found


def merge_lora(adapted: Any) -> PreTrainedModel:
    """Merge the adapter into the model's weights, in place; returns the ordinary model.

    Raises `TrainingError` where a weight would be NaN or Inf.
    """
    padded = padded_in(adapted.get_base_model(), remove=True)
    with _without_warnings():
        try:
            model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise TrainingError(
                f"the adapter cannot be merged ({one_line(error)}). Train with a smaller learning rate: "
                "--learning-rate 1e-4"
            ) from error
    pad_in_place(model, padded)
    return model


def load_adapter(model: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor]) -> tuple[Any, list[str]]:
    """Return peft's model around `model` with the adapter of a folder, and the names of weights that do not match.

    `weights` are what the folder's file holds; names that the model has no place for, or that are missing, are
    returned. Raises `TrainingError` for an adapter that the model does not take.
    """
    import peft

    padded = padded_in(model, remove=True)
    with _without_warnings(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about missing names, which are returned
        try:
            adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
            loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise TrainingError(
                f"{type(model).__name__} does not take the adapter {folder} ({one_line(error)}). Name the model that "
                "it was trained for: secateur export MODEL OUT --adapter FOLDER"
            ) from error
    pad_in_place(adapted.get_base_model(), padded)
    return adapted, sorted(loaded.keys() ^ weights.keys())


def save_adapter(adapted: Any, folder: Path, *, base: str) -> None:
    """Write the adapter alone, as peft reads it; `base` names the model that it belongs to."""
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = base
    with _without_warnings():
        adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form to be filled in


@contextmanager
def _without_warnings() -> Iterator[None]:
    with quiet(), warnings.catch_warnings():
        # peft reads attributes of models by names that newer versions of transformers have given up.
        warnings.simplefilter("ignore", FutureWarning)
        # About patterns that peft itself has made, for weights that are no module.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
        yield
