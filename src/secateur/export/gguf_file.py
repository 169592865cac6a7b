"""A model and its tokenizer -> one GGUF file for llama.cpp, whole or not at all.

The steps: fit the model to an architecture of llama.cpp (`fitting`), collect metadata and vocabulary, name and order
the tensors, write them one by one, and run the file in llama.cpp beside torch (`check`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType, GGUFWriter
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import ExportError
from secateur.export.check import Checked, check_file
from secateur.export.fitting import Fitted, fit
from secateur.export.llama_cpp import is_installed
from secateur.export.mapping import EMBEDDING, LazyTensor
from secateur.export.metadata import metadata
from secateur.export.options import GgufOptions
from secateur.export.tensors import TYPES, block_size, encode, file_tensors, stored_types
from secateur.export.vocabulary import Vocabulary, vocabulary
from secateur.files import atomic_file, check_file_vacant
from secateur.models.llama_cpp_architectures import type_of
from secateur.progress import Progress

SUFFIX = ".gguf"


@dataclass(frozen=True)
class GgufResult:
    """What `export_gguf` wrote."""

    out: Path
    architecture: str
    dtype: str  # one of `GGUF_TYPES`
    bytes: int
    parameters: int  # in the file, padding counted
    added: int  # of them, zeros that pad layers
    plain: tuple[str, ...]  # matrices that stay in 16 bits because their rows do not divide into blocks
    pre: str  # llama.cpp's pre-tokenizer
    notes: tuple[str, ...]
    checked: Checked | None  # None where llama.cpp did not run the file

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    options: GgufOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GgufResult:
    """Write a model, dense or pruned, as a GGUF file that llama.cpp runs.

    Layers of different sizes go into an architecture that has them; where there is none, `options.pad` pads all layers
    to the widest. Raises `ExportError` for what a file cannot describe or when llama.cpp computes something else, and
    `CheckpointError` when the file cannot be written.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    >>> pairs = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    >>> pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> config = AutoConfig.for_model("granite", hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
    ...     intermediate_size=64, vocab_size=3, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    >>> model, tokenizer = AutoModelForCausalLM.from_config(config), PreTrainedTokenizerFast(tokenizer_object=pairs)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_gguf(model, tokenizer, Path(folder) / "tiny.gguf", GgufOptions(check=False)).parameters
    20832
    """
    out, options = Path(out), options or GgufOptions()
    check_gguf(model.config, out, options, overwrite=overwrite)
    model_type = type_of(model.config)
    fitted = fit(model, model_type, pad=options.pad)
    keys = metadata(model.config, model_type, fitted.mapped, fitted.positions)
    rows = fitted.mapped.shape(fitted.mapped.outside[EMBEDDING])[0]
    words = vocabulary(tokenizer, rows, pre=options.pre, stops=_stop_tokens(model))
    contents = _Contents(fitted, file_tensors(fitted.mapped, fitted.architecture, model_type), options.gguf)
    with atomic_file(out, overwrite=overwrite) as file:
        with closing(GGUFWriter(file, fitted.architecture.name)) as writer:
            _write_metadata(writer, keys, words, options.gguf, name=Path(model.config.name_or_path or out.stem).name)
            contents.write(writer, progress)
        checked = None
        if is_installed() if options.check is None else options.check:
            exact = {weight for tensor in contents.exact for weight in fitted.mapped.weights_of(tensor)}
            checked = check_file(file, model, tokenizer, type_name=options.gguf, exact=exact)
        size = file.stat().st_size
    return GgufResult(
        out=out,
        architecture=fitted.architecture.name,
        dtype=options.gguf,
        bytes=size,
        notes=(*fitted.positions.notes, *words.notes, *_notes(fitted, contents)),
        parameters=sum(map(math.prod, contents.shapes.values())),
        added=fitted.padding,
        plain=contents.plain,
        pre=words.pre,
        checked=checked,
    )


def check_gguf(config: PreTrainedConfig, out: Path, options: GgufOptions, *, overwrite: bool = False) -> None:
    """Raise what `export_gguf` would, as far as it is known without the weights."""
    if out.suffix != SUFFIX:
        raise ExportError(f"{out} does not end in {SUFFIX}; name it {out}{SUFFIX}")
    check_file_vacant(out, overwrite=overwrite)
    if options.check and not is_installed():
        raise ExportError("--check runs the file in llama.cpp, which is not installed: pip install 'secateur[gguf]'")
    type_of(config)


def _stop_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    config: Any = model.generation_config if getattr(model, "generation_config", None) is not None else model.config
    stops = config.eos_token_id
    return tuple(stops) if isinstance(stops, (list, tuple)) else () if stops is None else (stops,)


class _Contents:
    """The tensors of a file, with their shapes and types. Final."""

    def __init__(self, fitted: Fitted, tensors: dict[str, LazyTensor], type_name: str) -> None:
        mapped = fitted.mapped
        self.fetch, self.tensors, self.type_name = mapped.fetch, tensors, type_name
        if (factors := fitted.positions.rope_factors) is not None:
            tensors["rope_freqs.weight"] = lambda fetch: factors
        self.shapes = {name: mapped.shape(tensor) for name, tensor in tensors.items()}
        self.types = stored_types(self.shapes, type_name)
        self.exact = [tensors[name] for name, stored in self.types.items() if stored == "f32"]  # whatever the type
        quantized = block_size(type_name) > 1
        self.plain = tuple(name for name, stored in self.types.items() if quantized and stored == "f16")
        if EMBEDDING in self.plain:
            raise ExportError(
                f"{type_name} stores rows in blocks of {block_size(type_name)} numbers, and the hidden width is "
                f"{mapped.hidden}, so nearly all of the model would stay in f16; write --gguf f16 (gguf='f16')"
            )

    def write(self, writer: GGUFWriter, progress: Progress | None) -> None:
        """Write the header, then tensor by tensor."""
        for name, shape in self.shapes.items():
            kind = TYPES[self.types[name]][0]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            length = math.prod(shape) // block * size
            writer.add_tensor_info(name, shape, np.dtype(np.float32), length, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (name, tensor) in enumerate(self.tensors.items(), 1):
            writer.write_tensor_data(encode(name, tensor(lambda weight: self.fetch(weight).cpu()), self.types[name]))
            if progress is not None:
                progress(done, len(self.tensors))


def _notes(fitted: Fitted, contents: _Contents) -> Iterator[str]:
    if fitted.padding:
        yield f"{fitted.padding:,} zeros pad layers to sizes that llama.cpp takes"
    if plain := contents.plain:
        block = block_size(contents.type_name)
        yield (
            f"{len(plain)} matrices stay in f16, since their rows are no multiples of {block}: {plain[0]}"
            + (" and others" if len(plain) > 1 else "")
            + f"; --round-to {block} makes rows that are"
        )


def _write_metadata(
    writer: GGUFWriter, keys: Mapping[str, Any], words: Vocabulary, type_name: str, *, name: str
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(TYPES[type_name][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in keys.items():
        _write_value(writer, f"{writer.arch}.{key}", value)
    writer.add_vocab_size(len(words.tokens))
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    if words.scores is not None:
        writer.add_token_scores(list(words.scores))
    if words.merges is not None:
        writer.add_token_merges(list(words.merges))
    for kind, index in words.special.items():
        writer.add_uint32(getattr(gguf.Keys.Tokenizer, f"{kind.upper()}_ID"), index)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    writer.add_add_space_prefix(words.add_space)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _write_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Integers as unsigned, as llama.cpp expects them."""
    kind = GGUFValueType.get_type(value[0] if isinstance(value, list) else value)
    kind = GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind
    if isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
    else:
        writer.add_key_value(key, value, kind)
