"""The options of each export format; the type of the options names the format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from secateur.data.calibration import CalibrationOptions
from secateur.decoding import check_choices
from secateur.errors import ExportError, unknown
from secateur.models.options import LoadOptions

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
GGUF_TYPES: tuple[str, ...] = get_args(GgufType)  # all that the gguf package quantizes without an importance matrix


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """One GGUF file, for llama.cpp and what is built on it.

    >>> GgufOptions("q4_k_m")
    Traceback (most recent call last):
    secateur.errors.ExportError: gguf='q4_k_m' is unknown. Expected f32, f16, bf16, q8_0, ...
    """

    gguf: GgufType = "f16"
    """Type of the weight matrices. Norms, biases and routers are float32 in any file."""

    pad: bool = False
    """Pad all layers with zeros to the widest one where llama.cpp has no architecture with layers of different sizes.
    The outputs stay the same, and so does the size of the dense file."""

    pre: str | None = None
    """Name of llama.cpp's pre-tokenizer, where it is not recognised from the tokenizer."""

    check: bool | None = None
    """Run the file in llama.cpp and compare tokens and logits with torch before the file appears. By default where
    llama.cpp is installed (`pip install 'secateur[gguf]'`)."""

    def __post_init__(self) -> None:
        """Refuse a type that is not written, with the tool that writes it."""
        if self.gguf not in GGUF_TYPES:
            raise ExportError(
                f"{unknown('gguf', self.gguf, GGUF_TYPES)} (for another type write f16 and convert it with llama.cpp's "
                "own tool: llama-quantize OUT.gguf SMALLER.gguf TYPE)"
            )


@dataclass(frozen=True, slots=True)
class Int8Options:
    """A folder with int8 weights in the linear layers, packed by torchao and read by transformers."""

    dynamic: bool = False
    """Quantize activations to int8 as well, each token with its own scale, and multiply in int8. Otherwise weights are
    dequantized and products computed in the model's dtype."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """A folder with small weights in the linear layers, by llmcompressor, in the format that vLLM computes with."""

    quantize: Literal["w8a8", "w4a16", "fp8"] = "w8a8"
    """w8a8: int8 weights and activations; w4a16: int4 weights in groups of 128, 64 or 32 columns, whichever divides all
    widths; both by GPTQ. fp8: one-byte floats, weights and activations, which look at no text."""

    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """The text that GPTQ looks at."""

    def __post_init__(self) -> None:
        """Refuse an unknown scheme, and text for one that looks at none."""
        check_choices(self, ExportError)
        if self.quantize == "fp8" and self.calibration != CalibrationOptions():
            raise ExportError(
                "quantize=fp8 looks at no text, and calibration options were given: leave them out, or round by GPTQ: "
                "--quantize w8a8"
            )


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """An ordinary folder with a LoRA adapter merged into the weights."""

    adapter: Path | None = None
    """Folder of the adapter to merge into MODEL. By default MODEL is itself the folder of an adapter, which names its
    base model."""


@dataclass(frozen=True, slots=True)
class ExportRecipe:
    """All that decides a folder that `export` writes: a model, and the options of one format."""

    model: str
    int8: Int8Options | None = None
    quantize: QuantizeOptions | None = None
    merge: MergeOptions | None = None
    loading: LoadOptions = field(default_factory=LoadOptions)
