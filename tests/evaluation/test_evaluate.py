"""Perplexity equals a plain loop and hand-counted cases; greedy text is greedy; every error says what to do."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

from secateur.data.calibration import CalibrationOptions, calibration_windows, digest
from secateur.errors import DataError, ModelError, SecateurError
from secateur.evaluation.contamination import warn_of_overlap
from secateur.evaluation.perplexity import (
    BATCH_TOKENS,
    encode,
    encode_text,
    evaluate,
    evaluation_mode,
    fitting_batch,
    greedy_steps,
    join_rows,
    perplexity,
    read_evaluation_text,
    sample_text,
    wanted_protocols,
)
from secateur.evaluation.protocols import Protocol, read_protocol, windows
from tiny import VOCABULARY as VOCABULARY_OF_PAIRS
from tiny import tiny_tokenizer

VOCABULARY = 97


class FixedLogits(PreTrainedModel):
    """Answers `logits` (V) at every position and remembers the shapes of what it read."""

    def __init__(self, logits: Tensor) -> None:
        sizes: dict[str, Any] = {"vocab_size": len(logits)}
        super().__init__(PretrainedConfig(**sizes))
        self.answer = logits
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        self.shapes.append(tuple(input_ids.shape))
        return CausalLMOutput(logits=self.answer.expand(*input_ids.shape, -1))


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        initializer_range=0.5,  # large enough that predictions are far from uniform
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).double().eval()
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (95,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w96 and an end-of-text token that no model here writes; reads 16 tokens, or so it says."""
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<end>": VOCABULARY}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", model_max_length=16)


def plain_nll(model: PreTrainedModel, tokens: Tensor, seq_len: int) -> list[float]:
    """Score one window, one token at a time."""
    scores = []
    for start in range(0, len(tokens) - seq_len + 1, seq_len):
        window = tokens[start : start + seq_len]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0]
        scores += [-logits[i - 1].log_softmax(0)[window[i]].item() for i in range(1, seq_len)]
    return scores


@pytest.mark.parametrize("seq_len", [2, 7, 32, 95])
def test_equals_a_plain_loop(model: LlamaForCausalLM, tokens: Tensor, seq_len: int) -> None:
    expected = plain_nll(model, tokens, seq_len)
    result = perplexity(model, tokens, data="random", seq_len=seq_len)
    assert (result.data, result.seq_len, result.tokens) == ("random", seq_len, len(expected))
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-10)
    assert result.ppl == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-10)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 13, 100])
def test_batch_size_does_not_change_the_result(model: LlamaForCausalLM, tokens: Tensor, batch_size: int) -> None:
    result = perplexity(model, tokens, data="random", seq_len=7, batch_size=batch_size)
    assert result.nll == pytest.approx(perplexity(model, tokens, data="random", seq_len=7).nll, rel=1e-12)


def test_pieces_of_the_softmax_do_not_change_the_result(
    model: LlamaForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, tokens, data="random", seq_len=32)
    monkeypatch.setattr(
        sys.modules["secateur.evaluation.perplexity"], "SOFTMAX_BYTES", 5 * 8 * VOCABULARY
    )  # 31 scored tokens in pieces of 5
    assert perplexity(model, tokens, data="random", seq_len=32).nll == pytest.approx(whole.nll, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_logits_give_the_vocabulary_size(dtype: torch.dtype) -> None:
    result = perplexity(FixedLogits(torch.ones(50, dtype=dtype)), torch.arange(50), data="all", seq_len=10)
    assert result.ppl == pytest.approx(50, rel=1e-6)  # in bfloat16 itself, log 50 would be off by 1e-3


def test_the_tail_is_dropped_and_the_first_token_of_a_window_is_unscored() -> None:
    # P(0) = 3/4, P(1) = 1/4. Windows 1 0 0 | 1 1 0, tail 1 1: four scored tokens, 0 0 1 0.
    model = FixedLogits(torch.tensor([3.0, 1.0]).log())
    result = perplexity(model, torch.tensor([1, 0, 0, 1, 1, 0, 1, 1]), data="coins", seq_len=3, batch_size=1)
    assert model.shapes == [(1, 3), (1, 3)]
    assert result.tokens == 4
    assert result.nll == pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 12), st.integers(1, 9))
def test_counts_of_windows_tokens_and_progress(length: int, seq_len: int, batch_size: int) -> None:
    if length < seq_len:
        return
    seen: list[tuple[int, int]] = []
    result = perplexity(
        FixedLogits(torch.zeros(4)),
        torch.zeros(length, dtype=torch.int32),
        data="zeros",
        seq_len=seq_len,
        batch_size=batch_size,
        progress=lambda done, total: seen.append((done, total)),
    )
    windows = length // seq_len
    assert result.tokens == windows * (seq_len - 1)
    assert seen == [(min(done, windows), windows) for done in range(batch_size, windows + batch_size, batch_size)]


def brute_force(model: PreTrainedModel, tokens: Tensor, window: int, stride: int) -> list[float]:
    """Score every token alone, with what the window that reads it first has before it."""
    scores = []
    for place in range(1, len(tokens)):
        start = 0 if place < window else -(-(place + 1 - window) // stride) * stride
        if start == place:
            continue  # the first of a window
        with torch.no_grad():
            logits = model(input_ids=tokens[None, start:place]).logits[0, -1]
        scores.append(-logits.log_softmax(0)[tokens[place]].item())
    return scores


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (16, 1), (16, 16), (95, 40), (200, 100)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sliding_equals_brute_force(
    model: LlamaForCausalLM, tokens: Tensor, window: int, stride: int, batch_size: int
) -> None:
    expected = brute_force(model, tokens, window, stride)
    protocol = Protocol("sliding", window, stride)
    result = perplexity(model, tokens, data="random", protocol=protocol, batch_size=batch_size)
    assert (result.protocol, result.seq_len, result.stride) == (f"sliding@{window}/{stride}", window, stride)
    assert result.tokens == len(expected)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-10)


def test_gptq_is_the_mean_of_window_means_times_and_over_the_length(model: LlamaForCausalLM, tokens: Tensor) -> None:
    length, nlls = 16, []
    for start in range(0, len(tokens) - length + 1, length):
        ids = tokens[None, start : start + length]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        mean = torch.nn.CrossEntropyLoss()(logits[0, :-1], ids[0, 1:])
        nlls.append(mean * length)
    expected = torch.exp(torch.stack(nlls).sum() / (len(nlls) * length)).item()
    result = perplexity(model, tokens, data="random", protocol=Protocol("gptq", length, length))
    assert result.ppl == pytest.approx(expected, rel=1e-10)
    same = perplexity(model, tokens, data="random", seq_len=length)
    assert (result.nll, result.protocol, same.protocol) == (same.nll, "gptq@16", "llm-pruner@16")


def test_the_interval_is_that_of_the_means_of_windows(model: LlamaForCausalLM, tokens: Tensor) -> None:
    scores = plain_nll(model, tokens, 8)
    means = [sum(scores[i : i + 7]) / 7 for i in range(0, len(scores), 7)]
    result = perplexity(model, tokens, data="random", seq_len=8)
    assert result.windows == len(means) == 11
    center = sum(means) / 11
    stderr = math.sqrt(sum((mean - center) ** 2 for mean in means) / 10 / 11)
    assert result.nll_stderr == pytest.approx(stderr, rel=1e-9)
    assert result.ppl_low == pytest.approx(math.exp(center - 1.959964 * stderr), rel=1e-6)
    assert result.ppl_high == pytest.approx(math.exp(center + 1.959964 * stderr), rel=1e-6)
    alone = perplexity(model, tokens, data="random", seq_len=95)
    assert (alone.windows, alone.nll_stderr, alone.ppl_low, alone.ppl_high) == (1, None, None, None)


class TestBitsPerByte:
    @pytest.fixture
    def pairs(self) -> PreTrainedTokenizerFast:
        return tiny_tokenizer()

    @pytest.mark.parametrize("protocol", ["llm-pruner@16", "sliding@16/4", "sliding@10/10"])
    @pytest.mark.parametrize("text", ["An ordinary text, of letters. " * 9, "Ünïcödé, 漢字 🙂 und mehr! " * 9])
    def test_bits_of_uniform_logits_over_the_bytes_that_were_scored(
        self, pairs: PreTrainedTokenizerFast, protocol: str, text: str
    ) -> None:
        uniform = FixedLogits(torch.zeros(VOCABULARY_OF_PAIRS))
        encoded = encode_text(pairs, text)
        cut = windows(read_protocol(protocol), len(encoded.ids_T))
        # A token of bytes stands for whole characters: decode up to each end, and drop what is cut in the middle.
        lengths = [
            len(str(pairs.decode(encoded.ids_T[:place])).encode().removesuffix("\ufffd".encode()))
            for place in range(len(encoded.ids_T) + 1)
        ]
        bytes_scored = sum(lengths[each.end] - lengths[each.scored] for each in cut)
        [result] = evaluate(uniform, pairs, {"a": text}, protocols=[protocol])
        assert result.bytes is not None
        assert abs(result.bytes - bytes_scored) <= (0 if text.isascii() else 6 * len(cut))
        bits = result.tokens * math.log2(VOCABULARY_OF_PAIRS)
        assert result.bits_per_byte == pytest.approx(bits / result.bytes, rel=1e-6)

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
    def test_all_tokens_together_are_the_whole_text(self, text: str) -> None:
        encoded = encode_text(tiny_tokenizer(), text)
        assert encoded.byte_ends_T.tolist() == sorted(encoded.byte_ends_T.tolist())
        assert int(encoded.byte_ends_T[-1]) == len(text.encode())

    def test_models_with_other_tokenizers_compare(
        self, pairs: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        text = " ".join(f"w{i}" for i in range(90))
        cost = 16 * math.log(2)  # nats of a byte, whatever the token is
        words = Costly(tokenizer, cost, between=1)  # the space before a word belongs to it
        [by_words] = evaluate(words, tokenizer, {"a": text}, protocols=["sliding@64/32"])
        [by_pairs] = evaluate(Costly(pairs, cost, between=0), pairs, {"a": text}, protocols=["sliding@64/32"])
        assert by_words.ppl > 2 * by_pairs.ppl
        assert by_words.bits_per_byte == pytest.approx(16, rel=0.01)
        assert by_pairs.bits_per_byte == pytest.approx(16, rel=0.01)

    def test_a_tokenizer_that_does_not_tell_shares_the_bytes_out(self) -> None:
        def letters(text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text)))}

        encoded = encode_text(letters, "äöü!")  # type: ignore[arg-type]
        assert encoded.byte_ends_T.tolist() == [1, 3, 5, 7]

    def test_ids_alone_have_no_bytes(self, model: LlamaForCausalLM, tokens: Tensor) -> None:
        result = perplexity(model, tokens, data="random", seq_len=8)
        assert (result.bytes, result.bits_per_byte) == (None, None)

    def test_only_the_first_tokens(self, pairs: PreTrainedTokenizerFast) -> None:
        some = encode_text(pairs, "An ordinary text.", max_tokens=4)
        assert len(some.ids_T) == len(some.byte_ends_T) == 4
        with pytest.raises(DataError, match=r"max_tokens=0 leaves nothing to score"):
            encode_text(pairs, "a", max_tokens=0)


class Costly(FixedLogits):
    """Gives every token the likelihood that its bytes, at so many nats each, should have."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, cost: float, *, between: int) -> None:
        vocabulary = len(tokenizer)
        super().__init__(torch.zeros(vocabulary + 1, dtype=torch.float64))
        sizes = torch.ones(vocabulary, dtype=torch.float64)
        for token, number in tokenizer.get_vocab().items():
            sizes[number] = len(token) + between
        self.likelihood = torch.cat([-cost * sizes, torch.zeros(1, dtype=torch.float64)])

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.likelihood.expand(*input_ids.shape, -1))


def test_every_protocol_once_with_seq_lens_first() -> None:
    found = wanted_protocols([64, 128], ["gptq@64", "llm-pruner@64"])
    assert [str(each) for each in found] == ["llm-pruner@64", "llm-pruner@128", "gptq@64"]
    assert [str(each) for each in wanted_protocols(None, ["sliding@8/2"])] == ["sliding@8/2"]
    assert [str(each) for each in wanted_protocols()] == ["llm-pruner@128"]


def test_a_batch_keeps_the_logits_under_the_limit() -> None:
    assert fitting_batch(128, 49152) == 10  # 10 x 128 x 49152 x 4 bytes = 252 MB
    assert fitting_batch(2048, 150_000) == 1
    assert fitting_batch(128, 100) == BATCH_TOKENS // 128


def test_an_impossible_token_gives_infinity_and_a_huge_nll_overflows_to_it() -> None:
    impossible = FixedLogits(torch.tensor([0.0, -math.inf]))
    assert perplexity(impossible, torch.ones(4, dtype=torch.int64), data="ones", seq_len=2).ppl == math.inf
    result = perplexity(FixedLogits(torch.tensor([0.0, -800.0])), torch.ones(4).long(), data="ones", seq_len=2)
    assert (result.nll, result.ppl) == (800.0, math.inf)


def test_dropout_is_off_and_the_modes_of_all_modules_come_back(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = (perplexity(model, tokens, data="random", seq_len=8) for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == modes


def test_evaluation_mode_ends_after_an_error() -> None:
    layer = torch.nn.Dropout()
    with pytest.raises(RuntimeError, match="stop"), evaluation_mode(layer):
        raise RuntimeError("stop")
    assert layer.training


def test_rows_are_joined_by_a_blank_line() -> None:
    assert join_rows([]) == ""
    assert join_rows(["", " = Title = \n", "text"]) == "\n\n = Title = \n\n\ntext"


def test_a_file_is_read_as_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["secateur.evaluation.perplexity"], "read_rows", lambda path: [path.name, "row"])
    assert read_evaluation_text(str(tmp_path / "rows.txt")) == "rows.txt\n\nrow"


def test_encode_reads_a_long_text_in_one_call_and_in_silence(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    text = " ".join(f"w{i}" for i in range(40))
    with caplog.at_level(logging.WARNING):
        assert encode(tokenizer, text).tolist() == list(range(40))
        assert encode(tokenizer, text, max_tokens=3).tolist() == [0, 1, 2]
        assert encode(tokenizer, "w1", max_tokens=3).tolist() == [1]
    assert encode(tokenizer, "").dtype == torch.int64
    assert caplog.messages == []


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
        steps = greedy_steps(model, torch.tensor([[5, 6, 7]]))
        assert [int(next(steps)) for _ in range(8)] == plain_greedy(model, [5, 6, 7], 8)


def test_greedy_steps_read_one_token_with_a_cache_and_everything_without(model: LlamaForCausalLM) -> None:
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.inference_mode():
        steps = greedy_steps(model, torch.tensor([[5, 6, 7]]))
        for _ in range(3):
            next(steps)
    assert lengths == [3, 1, 1]
    stateless = FixedLogits(torch.tensor([0.0, 1.0]))
    steps = greedy_steps(stateless, torch.tensor([[0, 0, 0]]))
    for _ in range(3):
        next(steps)
    assert stateless.shapes == [(1, 3), (1, 4), (1, 5)]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"seq_len": 1},
            r"llm-pruner@1: a window of 1 scores nothing, .* expected at least 2\. --protocol llm-pruner@128",
        ),
        ({"seq_len": 2048}, r"wiki: 95 tokens are fewer than one window of 2048\. .* --seq-len 95 or less"),
        ({"batch_size": 0}, r"batch_size=0 scores nothing; expected at least 1, or None"),
        ({"text": torch.zeros(1, 95).long()}, r"wiki: token_ids has shape \(1, 95\); expected one dimension\."),
        ({"text": torch.arange(98)}, r"wiki: token 97 is outside the model's vocabulary of 97\."),
        ({"text": torch.arange(-1, 97)}, r"wiki: token -1 is outside the model's vocabulary of 97\."),
    ],
)
def test_errors_of_perplexity(model: LlamaForCausalLM, tokens: Tensor, arguments: dict[str, Any], message: str) -> None:
    keywords: dict[str, Any] = {"text": tokens, "data": "wiki", "seq_len": 49} | arguments
    with pytest.raises(DataError, match=message):
        perplexity(model, **keywords)


def test_error_of_too_few_tokens_names_a_length_that_can_work(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match=r"wiki: 1 tokens are fewer than one window of 8\. .* --seq-len 2 or less"):
        perplexity(model, torch.tensor([3]), data="wiki", seq_len=8)


def test_error_of_nan() -> None:
    with pytest.raises(SecateurError, match=r"wiki: .* is NaN over 3 tokens \(seq_len=4\); .* --dtype bfloat16"):
        perplexity(FixedLogits(torch.full((5,), math.nan)), torch.arange(4), data="wiki", seq_len=4)


def test_error_of_a_window_longer_than_the_table_of_positions() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    with pytest.raises(DataError, match=r"16 positions, but reads 17 tokens at once\. --seq-len takes at most 16\."):
        perplexity(model, torch.zeros(40).long(), data="wiki", seq_len=17)


def test_an_index_error_of_another_cause_is_not_renamed() -> None:
    class Broken(FixedLogits):
        def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
            raise IndexError("another cause")

    with pytest.raises(IndexError, match="another cause"):
        perplexity(Broken(torch.zeros(3)), torch.arange(3), data="wiki", seq_len=3)


def test_error_of_weights_on_meta(tokens: Tensor) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: its weights are on device='meta'.* load\(model, device"):
        perplexity(model, tokens, data="wiki", seq_len=8)


def test_weights_that_accelerate_leaves_on_disk_are_read(
    model: LlamaForCausalLM, tokens: Tensor, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = perplexity(model, tokens, data="random", seq_len=8)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert perplexity(model, tokens, data="random", seq_len=8).nll == pytest.approx(expected.nll, rel=1e-12)


def test_errors_of_encode_and_sample_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"max_tokens=0 leaves nothing to score\. --max-tokens 40000"):
        encode(tokenizer, "w1", max_tokens=0)
    with pytest.raises(DataError, match=r"new_tokens=0: expected at least 1\. new_tokens=48"):
        sample_text(model, tokenizer, "w1", new_tokens=0)
    with pytest.raises(DataError, match=r"prompt='' has no tokens\. prompt='Once upon a time'"):
        sample_text(model, tokenizer, "")


class TestWarnOfOverlap:
    TEXT = " ".join(f"w{i}" for i in range(90))

    @pytest.fixture
    def calibrated(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "x.txt").write_text(self.TEXT)
        options = CalibrationOptions(str(tmp_path / "x.txt"), samples=4, length=20)
        tokens = calibration_windows(tokenizer, options)
        return {"calibration": digest(tokens), "calibration_options": asdict(options)}

    def warnings(
        self, tokenizer: PreTrainedTokenizerFast, calibrated: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> list[str]:
        warn_of_overlap("pruned", tokenizer, {"far": "another text", "near": f"x {self.TEXT}"}, calibrated)
        return [record.getMessage() for record in caplog.records]

    def test_the_text_is_named(
        self, tokenizer: PreTrainedTokenizerFast, calibrated: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        (message,) = self.warnings(tokenizer, calibrated, caplog)
        assert message.startswith("pruned: 100 % of its calibration windows, from ")
        assert message.endswith(
            "share 13 words in a row with the evaluation text near; this flatters the result, so calibrate on another "
            "text"
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 1},
            {"text": "no-such.txt"},
            {"text": "organisation/name"},
            {"text": "self"},
            {"length": 500},
            {"colour": "green"},
        ],
        ids=str,
    )
    def test_nothing_is_said_of_what_cannot_be_drawn_again(
        self,
        change: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast,
        calibrated: dict[str, Any],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        changed = {**calibrated, "calibration_options": {**calibrated["calibration_options"], **change}}
        assert self.warnings(tokenizer, changed, caplog) == []
        assert self.warnings(tokenizer, {"calibration": None, "calibration_options": None}, caplog) == []
