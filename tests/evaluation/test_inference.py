"""Greedy text is greedy, with or without a cache; a batch fits in memory; modules keep their modes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from word_models import VOCABULARY, FixedLogits, word_model, word_tokenizer

from secateur.errors import DataError
from secateur.evaluation.inference import (
    BATCH_TOKENS,
    decode_steps,
    evaluation_mode,
    fitting_batch,
    random_ids,
    sample_text,
)
from secateur.evaluation.memory import cache_bytes_by_layer
from tiny import tiny_model


@pytest.fixture
def model() -> LlamaForCausalLM:
    return word_model()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def test_a_batch_keeps_the_logits_under_the_limit() -> None:
    assert fitting_batch(128, 49152) == 10  # 10 x 128 x 49152 x 4 bytes = 252 MB
    assert fitting_batch(2048, 150_000) == 1
    assert fitting_batch(128, 100) == BATCH_TOKENS // 128


def test_evaluation_mode_ends_after_an_error() -> None:
    layer = torch.nn.Dropout()
    with pytest.raises(RuntimeError, match="stop"), evaluation_mode(layer):
        raise RuntimeError("stop")
    assert layer.training


def plain_greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Continue without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def tiny_mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4))


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5))


@pytest.mark.parametrize("make", [tiny_mamba, tiny_gpt2])
def test_greedy_steps_equal_greedy_without_a_cache(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.inference_mode():
        steps = decode_steps(model, torch.tensor([[5, 6, 7]]))
        assert [int(next(steps)) for _ in range(8)] == plain_greedy(model, [5, 6, 7], 8)


def test_steps_read_one_token_with_a_cache_and_everything_without(model: LlamaForCausalLM) -> None:
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.inference_mode():
        steps = decode_steps(model, torch.tensor([[5, 6, 7]]))
        for _ in range(3):
            next(steps)
    assert lengths == [3, 1, 1]
    stateless = FixedLogits(torch.tensor([0.0, 1.0]))
    steps = decode_steps(stateless, torch.tensor([[0, 0, 0]]))
    for _ in range(3):
        next(steps)
    assert stateless.shapes == [(1, 3), (1, 4), (1, 5)]


@pytest.mark.parametrize("fails_at", [1, 2], ids=["first", "second"])
def test_code_that_fails_with_its_cache_reads_everything_again(
    model: LlamaForCausalLM, fails_at: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, passes = plain_greedy(model, [5, 6, 7], 4), 0
    usual = model.forward

    def forward(input_ids: Tensor, *, use_cache: bool, **state: Any) -> Any:
        nonlocal passes
        passes += 1
        if use_cache and passes == fails_at:
            raise ValueError(f"no cache\nin pass {fails_at}")
        return usual(input_ids=input_ids, use_cache=use_cache, **state)

    monkeypatch.setattr(model, "forward", forward)
    with torch.inference_mode():
        steps = decode_steps(model, torch.tensor([[5, 6, 7]]))
        assert [int(next(steps)) for _ in range(4)] == expected
    assert passes == 5
    (record,) = caplog.records
    assert f"LlamaForCausalLM fails with its cache (ValueError: no cache in pass {fails_at})" in record.getMessage()
    assert cache_bytes_by_layer(model, seq_len=4) is not None
    passes = 0
    assert (cache_bytes_by_layer(model, seq_len=4) is None) == (fails_at == 1)


@pytest.mark.parametrize(
    ("works", "error"), [(0, torch.OutOfMemoryError("all")), (2, ValueError("later"))], ids=["memory", "later"]
)
def test_a_failure_that_is_not_of_the_cache_is_raised(
    model: LlamaForCausalLM, works: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, passes = model.forward, 0

    def forward(**arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == works + 1:
            raise error
        return usual(**arguments)

    monkeypatch.setattr(model, "forward", forward)
    with torch.inference_mode():
        steps = decode_steps(model, torch.tensor([[5]]))
        for _ in range(works):
            next(steps)
        with pytest.raises(type(error), match=str(error)):
            next(steps)


def test_sample_text_is_the_greedy_continuation_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model.generation_config.temperature = 0.1  # a model's own settings change nothing
    expected = plain_greedy(model, [5, 6, 7], 9)
    with caplog.at_level(logging.WARNING):
        text = sample_text(model, tokenizer, "w5 w6 w7", new_tokens=9)
    assert text == "".join(f" w{token}" for token in expected)
    assert caplog.messages == []


@pytest.mark.parametrize("known_by", ["model", "model_list", "tokenizer"])
def test_sample_text_ends_at_the_end_of_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, known_by: str
) -> None:
    expected = plain_greedy(model, [5, 6, 7], 9)
    end = expected[4]
    model.generation_config.eos_token_id = {"model": end, "model_list": [95, end]}.get(known_by)
    if known_by == "tokenizer":
        tokenizer.eos_token = f"w{end}"
    written = expected[: expected.index(end)]
    assert sample_text(model, tokenizer, "w5 w6 w7", new_tokens=9) == "".join(f" w{token}" for token in written)


def test_errors_of_sample_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"new_tokens=0 is too small. Expected at least 1, for example new_tokens=48"):
        sample_text(model, tokenizer, "w1", new_tokens=0)
    with pytest.raises(DataError, match=r"prompt='' has no tokens\. prompt='Once upon a time'"):
        sample_text(model, tokenizer, "")


def test_random_ids_follow_the_seed_and_the_smallest_vocabulary() -> None:
    models = [tiny_model(), tiny_model(vocab_size=11)]
    first, again, other = (random_ids(models, 1, 200, seed=seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert set(first[0]) == set(range(11))
