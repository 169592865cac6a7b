"""What the forward pass of a model takes: for windows of token ids, and for a pass that is only traced.

Windows are int64, samples x length. Where a token is masked, the id that the model reads lies in the lower half of the
64 bits and the token itself, plus one, in the upper half, so windows can be cut and joined as any others. Where an
image stands, its number is there (`media`).
Axes: B samples, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from secateur.errors import DataError, one_line
from secateur.models.classes import is_encoder_decoder, objective, stock_type
from secateur.models.media import HALF, shown_in

INPUT_IDS, DECODER_IDS = "input_ids", "decoder_input_ids"
BINS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "n_mels")  # of a spectrogram
InputsOf = Callable[[PreTrainedConfig, int, int], Mapping[str, Tensor]]
INPUTS: dict[str, InputsOf] = {}  # by model type: what users have registered


def register_inputs(model_type: str) -> Callable[[InputsOf], InputsOf]:
    """Say what the models of a type take, where it cannot be found: a decorator of config, samples, tokens -> inputs.

    The function returns tensors by argument, all that a forward pass needs, for so many samples of so many tokens.
    Numbers that the code looks at (sizes of images, boxes of words) are taken as they are. Calibration puts the token
    ids of its windows in the place of those returned.

    >>> @register_inputs("boxed")
    ... def boxed(config, samples, tokens):
    ...     ids_BT = torch.zeros(samples, tokens, dtype=torch.int64)
    ...     return {"input_ids": ids_BT, "bbox": ids_BT[..., None].expand(-1, -1, 4)}
    >>> INPUTS.pop("boxed") is boxed
    True
    """

    def register(function: InputsOf) -> InputsOf:
        INPUTS[model_type] = function
        return function

    return register


def are_registered(config: PreTrainedConfig) -> bool:
    """Whether a user has said what models of such a config take."""
    return stock_type(config) in INPUTS


def _registered(model: Any, samples: int, tokens: int) -> dict[str, Tensor]:
    """What a user says that the model takes; nothing where no one does.

    Raises `DataError` where the user's code fails, and for what is no tensor.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or not are_registered(config):
        return {}
    model_type = stock_type(config)
    function = INPUTS[model_type]
    try:
        given = dict(function(config, samples, tokens))
    except Exception as error:  # whatever the user's code raises
        raise DataError(f"inputs of {model_type!r}: {one_line(error)}") from error
    for name, each in given.items():
        if not isinstance(each, Tensor):
            raise DataError(
                f"inputs of {model_type!r}: {name!r} is a {type(each).__name__}. Expected tensors by argument: "
                '{"input_ids": torch.zeros(samples, tokens, dtype=torch.int64)}.'
            )
    return given


def arguments(model: Any, windows_BT: Tensor) -> dict[str, Any]:
    """The arguments with which a model reads windows; an encoder gets their first half, its decoder the second.

    A model of speech gets the sound that the windows show, and its decoder their tokens. Raises `DataError` for a model
    that does not read text.

    >>> from transformers import AutoConfig, AutoModelForSeq2SeqLM
    >>> sizes = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8, "vocab_size": 9}
    >>> model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", decoder_start_token_id=0, **sizes))
    >>> arguments(model, torch.tensor([[1, 2, 3, 4]]))
    {'input_ids': tensor([[1, 2]]), 'decoder_input_ids': tensor([[0, 3]]), 'use_cache': False}
    """
    accepted = inspect.signature(model.forward).parameters
    ids_BT = token_ids(windows_BT)
    given: dict[str, Any] = {INPUT_IDS: ids_BT}
    if objective(model) == "transcription":
        given = {DECODER_IDS: ids_BT}
    elif _writes(model, accepted):
        start = torch.full_like(ids_BT[:, :1], _decoder_start(model.config))
        half = ids_BT.shape[1] // 2
        given = {INPUT_IDS: ids_BT[:, :half], DECODER_IDS: torch.cat([start, ids_BT[:, half:-1]], dim=1)}
    samples, tokens = next(iter(given.values())).shape
    others = _registered(model, samples, tokens)
    if others:
        given = {name: each for name, each in given.items() if name in others}
    shown = {} if objective(model) == "masked tokens" else shown_in(windows_BT)
    images = {
        name: each.to(windows_BT.device, model.dtype if each.is_floating_point() else each.dtype)
        for name, each in {**others, **shown}.items()
        if name in accepted
    }
    if type(model).main_input_name not in {*given, *images}:
        check_reads_text(type(model))
    return images | given | without_extras(model)


def without_extras(model: Any) -> dict[str, Any]:
    """The arguments that keep a model from filling a cache, and from a loss over its routers, where it would do so.

    >>> without_extras(nn.Linear(2, 2))
    {'use_cache': False}
    """
    accepted = inspect.signature(model.forward).parameters
    given = {"use_cache": False} if objective(model) == "next token" or "use_cache" in accepted else {}
    if "output_router_logits" in accepted and getattr(model.config.get_text_config(), "output_router_logits", False):
        given["output_router_logits"] = False
    return given


def predicted(result: Any) -> Tensor:
    """What a forward pass returns that is judged: logits, or the hidden states of a model without a head."""
    logits: Tensor | None = getattr(result, "logits", None)
    return result[0] if logits is None else logits


def check_reads_text(model_class: Any) -> None:
    """Raise `DataError` for a class of models that does not read tokens."""
    kind = model_class.main_input_name
    if kind != INPUT_IDS:
        raise DataError(
            f"{model_class.__name__} reads {kind}, and calibration gives it text: use a score of weights and no "
            "repair, --score l2 --repair none; or for speech, give --calibration FOLDER of sounds with their texts"
        )


def _writes(model: Any, accepted: Mapping[str, Any]) -> bool:
    """Whether a decoder gets a text of its own; that of a classifier gets the encoder's."""
    config = getattr(model, "config", None)
    return is_encoder_decoder(config) and DECODER_IDS in accepted and objective(model) != "class"


def _decoder_start(config: PreTrainedConfig) -> int:
    text = config.get_text_config(decoder=True)
    named = (
        getattr(each, name, None) for name in ("decoder_start_token_id", "bos_token_id") for each in (config, text)
    )
    return next((number for number in named if isinstance(number, int)), 0)


def token_ids(windows_BT: Tensor) -> Tensor:
    """The ids that a model reads.

    >>> token_ids(with_masked(torch.tensor([[5, 6]]), torch.tensor([[False, True]]), 4)).tolist()
    [[5, 4]]
    """
    return windows_BT & ((1 << HALF) - 1)


def next_tokens(windows_BT: Tensor) -> Tensor:
    """The tokens of windows, -1 where an image stands, which nothing predicts.

    >>> next_tokens(torch.tensor([[5, 6 + (3 << 32)]])).tolist()
    [[5, -1]]
    """
    return windows_BT.where(windows_BT < 1 << HALF, -1)


def masked_tokens(windows_BT: Tensor) -> Tensor:
    """The tokens under the masks, -1 where there is none.

    >>> masked_tokens(with_masked(torch.tensor([[5, 6]]), torch.tensor([[False, True]]), 4)).tolist()
    [[-1, 6]]
    """
    return (windows_BT >> HALF) - 1


def with_masked(ids_BT: Tensor, masked_BT: Tensor, mask_token: int) -> Tensor:
    """Windows in which some tokens (bool) are masked by a token."""
    return torch.where(masked_BT, ((ids_BT + 1) << HALF) + mask_token, ids_BT)


# --- a pass that is traced -----------------------------------------------------------------------------------------


def traced_inputs(
    model: nn.Module, batch: int, sequence: int, written: int
) -> Iterator[Mapping[str, tuple[int, ...] | Tensor]]:
    """The shapes of what a forward pass may take, by argument: the first that runs is the one to be traced.

    `sequence` is the length of a text, `written` of that of a decoder; `is_numbers` tells what holds no token ids.
    What a user has registered comes alone, with its numbers.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2))
    >>> list(traced_inputs(model, 2, 5, 3))
    [{'input_ids': (2, 5)}]
    """
    if registered := _registered(model, batch, sequence):
        yield registered
        return
    config = getattr(model, "config", None)
    accepted = inspect.signature(model.forward).parameters
    decoder = {DECODER_IDS: (batch, written)} if _writes(model, accepted) else {}
    reads_text = INPUT_IDS in accepted or getattr(model, "main_input_name", INPUT_IDS) == INPUT_IDS
    text = {INPUT_IDS: (batch, sequence)} if reads_text else {}
    for name, parameter in accepted.items():
        if text and parameter.default is parameter.empty and not is_numbers(name):  # such as a Q-Former's
            text[name] = (batch, sequence)
    if text:
        yield {**text, **decoder}
    for numbers in _numbers(config, accepted, batch, sequence):
        yield {**numbers, **decoder}
        if text:
            yield {**text, **numbers, **decoder}


def with_end(model: Any, ids_BT: Tensor) -> Tensor:
    """Ids as a classifier reads them that looks for the end of each text: it is there once, as the last token.

    >>> from transformers import T5Config, T5ForSequenceClassification
    >>> sizes = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8, "vocab_size": 9}
    >>> with_end(T5ForSequenceClassification(T5Config(**sizes)), torch.tensor([[0, 1, 2]]))  # 1 is the end
    tensor([[0, 2, 1]])
    """
    config = getattr(model, "config", None)
    end = getattr(config, "eos_token_id", None)
    if objective(model) != "class" or not is_encoder_decoder(config) or not isinstance(end, int):
        return ids_BT
    ids_BT = ids_BT.masked_fill(ids_BT == end, end + 1)
    ids_BT[:, -1] = end
    return ids_BT


def is_numbers(name: str) -> bool:
    """Whether an argument holds pixels or sound, not ids.

    >>> is_numbers("pixel_values"), is_numbers("input_ids")
    (True, False)
    """
    return not name.endswith(INPUT_IDS)


def _numbers(
    config: Any, accepted: Mapping[str, Any], batch: int, sequence: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of images and sound that a model may take, by its config."""
    if "pixel_values" in accepted:
        parts = (getattr(config, name, None) for name in ("vision_config", "encoder"))
        vision = next((part for part in (*parts, config) if hasattr(part, "image_size")), None)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = next((getattr(vision, name) for name in ("num_channels", "in_channels") if hasattr(vision, name)), 3)
        yield {"pixel_values": (batch, channels, height, width)}
        yield {"pixel_values": (batch, 1, channels, height, width)}  # several images, or frames
    parts = (getattr(config, name, None) for name in ("audio_config", "encoder_config"))
    audio = next((part for part in (*parts, config) if any(hasattr(part, key) for key in BINS)), config)
    for name in ("input_features", "input_values"):
        if name in accepted:
            bins = next(
                (value for key in BINS if isinstance(value := getattr(audio, key, None), int)),
                80,
            )
            positions = getattr(audio, "max_source_positions", None)
            if isinstance(positions, int):
                yield {name: (batch, bins, 2 * positions)}
            yield {name: (batch, 16 * sequence, bins)}
            yield {name: (batch, bins, 8 * sequence)}
            yield {name: (batch, 800 * sequence)}


def hidden_read(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states among a layer's arguments; None where they have another name."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(args), None)


def hidden_in(output: Any) -> Any:
    """The hidden states in what a layer gives."""
    return output[0] if isinstance(output, (tuple, list)) and output else output
