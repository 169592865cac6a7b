"""Perplexity equals a plain loop and hand-counted cases, whatever the windows; every error says what to do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput
from word_models import VOCABULARY, FixedLogits, word_ids, word_model, word_tokenizer

from letters import LETTERS
from secateur.errors import DataError, ModelError, SecateurError
from secateur.evaluation.perplexity import evaluate, perplexity
from secateur.evaluation.protocols import Protocol, read_protocol, windows
from secateur.evaluation.texts import encode_text
from tiny import VOCABULARY as VOCABULARY_OF_PAIRS
from tiny import tiny_tokenizer


@pytest.fixture
def model() -> LlamaForCausalLM:
    return word_model()


@pytest.fixture
def tokens() -> Tensor:
    return word_ids()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


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
    result = perplexity(model, tokens, data="random", protocol=Protocol(seq_len))
    assert (result.data, result.seq_len, result.tokens) == ("random", seq_len, len(expected))
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-10)
    assert result.ppl == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-10)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 13, 100])
def test_batch_size_does_not_change_the_result(model: LlamaForCausalLM, tokens: Tensor, batch_size: int) -> None:
    result = perplexity(model, tokens, data="random", protocol=Protocol(7), batch_size=batch_size)
    assert result.nll == pytest.approx(perplexity(model, tokens, data="random", protocol=Protocol(7)).nll, rel=1e-12)


def test_pieces_of_the_softmax_do_not_change_the_result(
    model: LlamaForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, tokens, data="random", protocol=Protocol(32))
    monkeypatch.setattr("secateur.evaluation.perplexity.SOFTMAX_BYTES", 5 * 8 * VOCABULARY)  # 31 tokens in pieces of 5
    assert perplexity(model, tokens, data="random", protocol=Protocol(32)).nll == pytest.approx(whole.nll, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_logits_give_the_vocabulary_size(dtype: torch.dtype) -> None:
    result = perplexity(FixedLogits(torch.ones(50, dtype=dtype)), torch.arange(50), data="all", protocol=Protocol(10))
    assert result.ppl == pytest.approx(50, rel=1e-6)  # in bfloat16 itself, log 50 would be off by 1e-3


def test_the_tail_is_dropped_and_the_first_token_of_a_window_is_unscored() -> None:
    # P(0) = 3/4, P(1) = 1/4. Windows 1 0 0 | 1 1 0, tail 1 1: four scored tokens, 0 0 1 0.
    model = FixedLogits(torch.tensor([3.0, 1.0]).log())
    result = perplexity(model, torch.tensor([1, 0, 0, 1, 1, 0, 1, 1]), data="coins", protocol=Protocol(3), batch_size=1)
    assert model.shapes == [(1, 3), (1, 3)]
    assert result.tokens == 4
    assert result.nll == pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4, rel=1e-6)


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(2, 12), st.integers(1, 9))
def test_counts_of_windows_tokens_and_progress(length: int, seq_len: int, batch_size: int) -> None:
    if length < seq_len:
        return
    seen: list[tuple[int, int]] = []
    result = perplexity(
        FixedLogits(torch.zeros(4)),
        torch.zeros(length, dtype=torch.int32),
        data="zeros",
        protocol=Protocol(seq_len),
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
    protocol = Protocol(window, stride)
    result = perplexity(model, tokens, data="random", protocol=protocol, batch_size=batch_size)
    assert (result.protocol, result.seq_len, result.stride) == (f"sliding@{window}/{stride}", window, stride)
    assert result.tokens == len(expected)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-10)


def test_the_loop_of_gptq_gives_the_same_number(model: LlamaForCausalLM, tokens: Tensor) -> None:
    length, nlls = 16, []
    for start in range(0, len(tokens) - length + 1, length):
        ids = tokens[None, start : start + length]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        mean = torch.nn.CrossEntropyLoss()(logits[0, :-1], ids[0, 1:])
        nlls.append(mean * length)
    expected = torch.exp(torch.stack(nlls).sum() / (len(nlls) * length)).item()
    result = perplexity(model, tokens, data="random", protocol=Protocol(length))
    assert result.ppl == pytest.approx(expected, rel=1e-10)


def test_the_interval_is_that_of_the_means_of_windows(model: LlamaForCausalLM, tokens: Tensor) -> None:
    scores = plain_nll(model, tokens, 8)
    means = [sum(scores[i : i + 7]) / 7 for i in range(0, len(scores), 7)]
    result = perplexity(model, tokens, data="random", protocol=Protocol(8))
    assert result.windows == len(means) == 11
    center = sum(means) / 11
    stderr = math.sqrt(sum((mean - center) ** 2 for mean in means) / 10 / 11)
    assert result.nll_stderr == pytest.approx(stderr, rel=1e-9)
    assert result.ppl_low == pytest.approx(math.exp(center - 1.959964 * stderr), rel=1e-6)
    assert result.ppl_high == pytest.approx(math.exp(center + 1.959964 * stderr), rel=1e-6)
    alone = perplexity(model, tokens, data="random", protocol=Protocol(95))
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

    def test_ids_alone_have_no_bytes(self, model: LlamaForCausalLM, tokens: Tensor) -> None:
        result = perplexity(model, tokens, data="random", protocol=Protocol(8))
        assert (result.bytes, result.bits_per_byte) == (None, None)


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


def test_an_impossible_token_gives_infinity_and_a_huge_nll_overflows_to_it() -> None:
    impossible = FixedLogits(torch.tensor([0.0, -math.inf]))
    assert perplexity(impossible, torch.ones(4, dtype=torch.int64), data="ones", protocol=Protocol(2)).ppl == math.inf
    result = perplexity(
        FixedLogits(torch.tensor([0.0, -800.0])), torch.ones(4).long(), data="ones", protocol=Protocol(2)
    )
    assert (result.nll, result.ppl) == (800.0, math.inf)


def test_served_windows_score_the_tokens_of_plain_ones_each_after_the_start_tokens(model: LlamaForCausalLM) -> None:
    text = "thequickbrownfoxjumpsoverthelazydog"
    encoded = encode_text(LETTERS, text)
    assert encoded.start_T.tolist() == [0]
    served = perplexity(model, encoded, data="fox", protocol=Protocol(8, start_tokens=True))
    ids_T = encoded.ids_T[1:]
    logits_TV = [
        model(torch.cat([torch.tensor([0]), part])[None]).logits[0, 1:-1].detach() for part in ids_T.split(8)[:-1]
    ]
    expected = functional.cross_entropy(torch.cat(logits_TV), torch.cat([part[1:] for part in ids_T.split(8)[:-1]]))
    assert served.nll == pytest.approx(float(expected), rel=1e-6)
    plain = perplexity(model, ids_T, data="fox", protocol=Protocol(8))
    assert (served.tokens, served.bytes) == (plain.tokens, plain.tokens)
    assert served.nll != plain.nll
    with pytest.raises(
        DataError, match=r"fox: served@8 needs what encode_text\(tokenizer, text\) returns, not token ids alone"
    ):
        perplexity(model, ids_T, data="fox", protocol=Protocol(8, start_tokens=True))


def test_a_text_that_does_not_begin_with_the_start_tokens_keeps_its_first(model: LlamaForCausalLM) -> None:
    encoded = encode_text(LETTERS, "thequickbrown")
    other = replace(encoded, start_T=torch.tensor([3, 4]))
    served = perplexity(model, other, data="fox", protocol=Protocol(7, start_tokens=True))
    windows = [torch.cat([torch.tensor([3, 4]), part]) for part in encoded.ids_T.split(7)]
    expected = [
        functional.cross_entropy(model(window[None]).logits[0, 2:-1].detach(), window[3:]) for window in windows
    ]
    assert served.nll == pytest.approx(float(sum(expected)) / 2, rel=1e-6)
    assert (served.tokens, served.bytes) == (12, 12)


def test_dropout_is_off_and_the_modes_of_all_modules_come_back(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = (perplexity(model, tokens, data="random", protocol=Protocol(8)) for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"protocol": Protocol(2048)},
            r"wiki: 95 tokens are fewer than one window of 2048\. .* --protocol served@95 or less",
        ),
        ({"batch_size": 0}, r"batch_size=0 is too small. Expected at least 1, for example batch_size=8"),
        ({"text": torch.zeros(1, 95).long()}, r"wiki: token_ids has shape \(1, 95\); expected one dimension\."),
        ({"text": torch.arange(98)}, r"wiki: token 97 is outside the model's vocabulary of 97\."),
        ({"text": torch.arange(-1, 97)}, r"wiki: token -1 is outside the model's vocabulary of 97\."),
    ],
)
def test_errors_of_perplexity(model: LlamaForCausalLM, tokens: Tensor, arguments: dict[str, Any], message: str) -> None:
    keywords: dict[str, Any] = {"text": tokens, "data": "wiki", "protocol": Protocol(49)} | arguments
    with pytest.raises(DataError, match=message):
        perplexity(model, **keywords)


def test_error_of_nan() -> None:
    with pytest.raises(SecateurError, match=r"wiki: .* is NaN \(llm-pruner@4, 1 windows\); .* --dtype bfloat16"):
        perplexity(FixedLogits(torch.full((5,), math.nan)), torch.arange(4), data="wiki", protocol=Protocol(4))


def test_error_of_a_window_longer_than_the_table_of_positions() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    with pytest.raises(
        DataError,
        match=r"but reads 17 tokens at once\. --protocol llm-pruner@17, start tokens included, takes at most 16",
    ):
        perplexity(model, torch.zeros(40).long(), data="wiki", protocol=Protocol(17))


def test_an_index_error_of_another_cause_is_not_renamed() -> None:
    class Broken(FixedLogits):
        def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
            raise IndexError("another cause")

    with pytest.raises(IndexError, match="another cause"):
        perplexity(Broken(torch.zeros(3)), torch.arange(3), data="wiki", protocol=Protocol(3))


def test_error_of_weights_on_meta(tokens: Tensor) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: its weights are on device='meta'.* load\(model, device"):
        perplexity(model, tokens, data="wiki", protocol=Protocol(8))


def test_weights_that_accelerate_leaves_on_disk_are_read(
    model: LlamaForCausalLM, tokens: Tensor, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = perplexity(model, tokens, data="random", protocol=Protocol(8))
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert perplexity(model, tokens, data="random", protocol=Protocol(8)).nll == pytest.approx(expected.nll, rel=1e-12)
