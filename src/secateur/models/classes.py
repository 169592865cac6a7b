"""Config -> the class of its model, the auto class that loads it, and what a window of tokens is to such a model.

The class comes from the config's `architectures`; where that names none, the first auto class that knows the type.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from secateur.models.modeling_per_layer import PER_LAYER

AUTO_CLASSES: dict[str, Any] = {  # in the order in which a type that names no architecture is looked for
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "AutoModelForSpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModel": modeling_auto.MODEL_MAPPING,
}

Objective = Literal["next token", "second half", "transcription", "masked tokens", "class", "embedding"]
"""What a model predicts of a window of tokens: each next token; its second half from its first (encoder and decoder);
each next token of the text of a sound; the tokens that are masked; a class; hidden states."""


def architecture(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a config's `architectures` names; None where it names none that an auto class has.

    >>> config = transformers.AutoConfig.for_model("bert", architectures=["BertForMaskedLM"])
    >>> architecture(config) is transformers.BertForMaskedLM
    True
    """
    for name in config.architectures or ():
        model_class = getattr(transformers, str(name), None)
        if model_class is not None and auto_class(model_class, type(config)) is not None:
            found: type[PreTrainedModel] = model_class
            return found
    return None


def auto_class(model_class: Any, config_class: Any) -> str | None:
    """The name of the auto class that builds a model class from such configs; None where none does.

    >>> auto_class(transformers.BertModel, transformers.BertConfig)
    'AutoModel'
    """
    return next((name for name in AUTO_CLASSES if model_class in _classes(name, config_class)), None)


def default_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the first auto class which knows a config builds from it.

    >>> default_class(transformers.AutoConfig.for_model("t5")) is transformers.T5ForConditionalGeneration
    True
    """
    return next((found for name in AUTO_CLASSES for found in _classes(name, type(config))), None)


def _classes(name: str, config_class: Any) -> tuple[type[PreTrainedModel], ...]:
    """What an auto class builds from such configs, if anything: of a few types, one of several."""
    mapping = AUTO_CLASSES[name]
    found = mapping[config_class] if config_class in mapping else ()  # noqa: SIM401 - `get` is not lazy
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def stock_type(config: PreTrainedConfig) -> str:
    """The model type of transformers' own code; a per-layer model has that of its dense model.

    >>> stock_type(transformers.AutoConfig.for_model("bert"))
    'bert'
    """
    return config.model_type.removeprefix(f"{PER_LAYER}_")


def config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of a model, which names the model's class; a copy where it did not.

    >>> config = transformers.AutoConfig.for_model("bert", hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    >>> config_of(transformers.BertModel(config)).architectures
    ['BertModel']
    """
    config: PreTrainedConfig = model.config
    model_class = type(model)
    if auto_class(model_class, type(config)) is None or architecture(config) is model_class:
        return config
    config = copy.deepcopy(config)
    config.architectures = [model_class.__name__]
    return config


def objective(model: Any) -> Objective:
    """What a model predicts of a window of tokens; a model of no auto class is one of the next token.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> objective(BertForSequenceClassification(BertConfig(**sizes)))
    'class'
    """
    return objective_of(type(model), getattr(model, "config", None))


def objective_of(model_class: type, config: Any) -> Objective:
    """What a model of a class predicts (see `objective`).

    >>> objective_of(transformers.T5ForConditionalGeneration, transformers.T5Config())
    'second half'
    """
    stock = next((each for each in model_class.__mro__ if each.__module__.startswith("transformers.")), None)
    own = getattr(stock, "config_class", None)  # a per-layer config is a subclass of it
    name = auto_class(stock, own) or auto_class(stock, type(config))
    if name in (None, "AutoModelForCausalLM"):
        return "next token"
    if name == "AutoModelForSequenceClassification":
        return "class"
    if name == "AutoModel":
        return "embedding"
    if is_encoder_decoder(config):
        return "transcription" if name == "AutoModelForSpeechSeq2Seq" else "second half"
    return "masked tokens" if name == "AutoModelForMaskedLM" else "next token"


def is_encoder_decoder(config: Any) -> bool:
    """Whether a model reads one text with its encoder and writes another with its decoder.

    >>> is_encoder_decoder(transformers.AutoConfig.for_model("t5"))
    True
    """
    return bool(getattr(config, "is_encoder_decoder", False))
