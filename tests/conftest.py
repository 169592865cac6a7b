"""What several test files share; no test reaches the hub."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported, so it stands before the imports

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from model_contents import content_of
from model_folders import tiny_config
from secateur.data import windows
from secateur.discovery import tracing
from secateur.discovery.graph import Graph
from secateur.models.config import load_config
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from tiny import write_tiny

settings.register_profile("tests", deadline=None, derandomize=True)  # no clock, and the same examples in every run
settings.load_profile("tests")

# Files whose tests take minutes run first: an idle worker steals from the end of the other's queue, so vLLM is imported
# by one worker only, and both workers end on short tests.
FIRST = ("test_vllm.py", "test_demo.py", "test_notebooks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """Leave the million objects of imported modules out of garbage collection, which makes all tests a fifth faster."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000)  # tests leave few reference cycles, and collecting at 700 took a twentieth of the time


@pytest.fixture(scope="module", autouse=True)
def frozen_after_each_file() -> Iterator[None]:
    """Leave out what the tests of a file have imported, too: every training calls `gc.collect` five times."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def tokenized_once() -> Iterator[None]:
    """Hundreds of tests take their windows of the demo's text: each tokenizer reads each of its forms once."""
    tokenize, known = windows._tokenize, dict[tuple[str, ...], windows.Documents]()

    def looked_up(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> windows.Documents:
        if not hasattr(tokenizer, "backend_tokenizer"):
            return tokenize(documents, tokenizer)
        key = tokenizer.backend_tokenizer.to_str(), *documents
        if key not in known:
            known[key] = tokenize(documents, tokenizer)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_tokenize", looked_up)
        yield


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Hundreds of tests discover the same tiny models: stock models that are alike are traced once."""
    trace, known = tracing.trace, dict[Any, Graph]()

    def looked_up(model: nn.Module, *, start_tokens: Sequence[int] = ()) -> Graph:
        content = content_of(model)
        if content is None:
            return trace(model, start_tokens=start_tokens)
        key = content, tuple(start_tokens)
        if key not in known:
            known[key] = trace(model, start_tokens=start_tokens)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.discovery.discover.trace", looked_up)
        yield


@pytest.fixture(scope="session")
def demo_config() -> PreTrainedConfig:
    return load_config("demo")


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("demo")


@pytest.fixture(scope="session")
def demo_model(demo_config: PreTrainedConfig, demo_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The demo model in float32 on the CPU; shared, so copy it before changing anything.

    It comes last: the file is parsed once for the three, which takes seconds, and forgotten after its weights.
    """
    return load("demo", device="cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with a tokenizer; shared, so copy it before changing anything."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def plain_model() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config()).eval()
    return model


@pytest.fixture
def plain_folder(plain_model: PreTrainedModel, tmp_path: Path) -> Path:
    """A folder with one safetensors file and no tokenizer."""
    plain_model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded_folder(plain_model: PreTrainedModel, tmp_path: Path) -> Path:
    plain_model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    return tmp_path / "shards"
