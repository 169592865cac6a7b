"""Every type that AutoModelForCausalLM knows has a tiny model; a mixed dozen of them runs."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from every_type import EXCEPTIONS, FLOAT32, NOT_BUILT, TYPES, tiny_config, tiny_inputs, tiny_type_model
from secateur.models.silence import quiet

RUN = (
    "bart",  # a decoder taken from an encoder and decoder
    "bert",  # an encoder made causal
    "deepseek_v3",  # latent attention, experts
    "gemma3",  # text inside a multimodal model
    "gemma4_assistant",  # takes embeddings and another model's keys
    "gpt2",  # weights stored input first
    "gpt_oss",  # experts in one tensor, sinks
    "jamba",  # state space, attention and experts
    "mamba2",  # state space only
    "musicgen",  # several rows of tokens per text
    "qwen3_next",  # linear attention, experts
    "xglm",  # float32 only
)


def test_every_exception_names_a_type_and_a_reason() -> None:
    reasons = {name: exception.reason for name, exception in EXCEPTIONS.items()}
    for table in (reasons, NOT_BUILT, FLOAT32):
        assert set(table) <= set(TYPES)
        assert all(reason.strip() for reason in table.values())
    assert all(exception.settings for exception in EXCEPTIONS.values())


@pytest.mark.parametrize("model_type", RUN)
def test_a_tiny_model_gives_finite_logits_that_differ(model_type: str) -> None:
    with quiet():
        model = tiny_type_model(model_type)
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad():
            logits = model(**tiny_inputs(model_type, model.config), **options).logits
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
    assert not model.training


@pytest.mark.parametrize("model_type", ["gemma2", "qwen3_next"])
def test_a_seed_gives_the_same_weights_and_leaves_config_and_random_numbers_alone(model_type: str) -> None:
    config = tiny_config(model_type)
    before, state = copy.deepcopy(config), torch.random.get_rng_state()
    first, second = tiny_type_model(model_type, config).state_dict(), tiny_type_model(model_type).state_dict()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not torch.equal(first["lm_head.weight"], tiny_type_model(model_type, seed=1).state_dict()["lm_head.weight"])
    assert config.to_dict() == before.to_dict()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tied_weights_stay_tied() -> None:
    model = tiny_type_model("gemma2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
