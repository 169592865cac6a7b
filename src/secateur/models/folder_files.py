"""Names of the files in a model's folder: which of them a loader reads, or may run."""

from __future__ import annotations

from fnmatch import fnmatch

from secateur.models.manifest import WEIGHTS

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
# What tokenizers and processors are made of, whichever class reads it; a tokenizer's class may name more.
TOKENIZER_FILES = frozenset(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "vocab.txt merges.txt spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json "
    "processor_config.json preprocessor_config.json video_preprocessor_config.json audio_tokenizer_config.json".split()
)
TEMPLATES = "additional_chat_templates/"  # a folder of them


def is_read(name: str) -> bool:
    """Whether a loader reads, or may run, a file of that name in the folder of a model.

    >>> is_read("model.safetensors"), is_read("README.md")
    (True, False)
    """
    other = name == ADAPTER_FILE or any(fnmatch(name, pattern) for pattern in (*PICKLES, "*.py", "adapter_model.*"))
    return other or is_tokenizer_file(name) or is_model_file(name)


def is_tokenizer_file(name: str) -> bool:
    """Whether a tokenizer or processor may be read from a file of that name, of those that we write.

    >>> is_tokenizer_file("tokenizer.json")
    True
    """
    return name in TOKENIZER_FILES or name.startswith(TEMPLATES)


def is_model_file(name: str) -> bool:
    """Whether a model is read from a file of that name.

    >>> is_model_file("model-00001-of-00002.safetensors")
    True
    """
    return name in ("config.json", "generation_config.json", INDEX_FILE) or name.endswith(WEIGHTS)
