"""A tokenizer without some of its tokens gives every text back, and reads a text of the others as before."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from secateur.data.calibration import CalibrationOptions
from secateur.data.text import demo_texts
from secateur.errors import PlanError
from secateur.models.tokenizer import load_tokenizer
from secateur.vocabulary.calibrated import rank_by_text
from secateur.vocabulary.pieces import Pieces, pieces_of
from secateur.vocabulary.ranking import rank_tokens, token_counts
from secateur.vocabulary.tokenizer import cut_tokenizer
from small_tokenizers import LETTERS, TOKENIZERS, words

SEEDS = 10  # tokenizers of each kind
STRANGE = [0x1F600, 0x0301, 0x200D, 0x2581, 0x00A0, 0xFFFD, 0x10FFFF, 0x20000, 0x0E01, 0x05D0, 0x0A, 0x09, 0x7F]


def text_of_all_planes(rng: random.Random) -> str:
    """Words that the tokenizers know, letters, and characters from anywhere in Unicode."""
    known = words(rng.randrange(SEEDS))[0].split()
    pieces: list[Callable[[], str]] = [
        lambda: rng.choice(known),
        lambda: rng.choice(LETTERS),
        lambda: " ",
        lambda: chr(rng.choice(STRANGE)),
        lambda: chr(rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    return "".join(rng.choice(pieces)() for _ in range(rng.randrange(1, 30)))


def cut(whole: PreTrainedTokenizerFast, seed: int, share: float) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer without a share of what may go, by counts of some text."""
    ranking = rank_tokens(pieces_of(whole), token_counts(whole, words(seed)[:20], len(whole)))
    keep = [*ranking.kept(len(whole) - int(share * len(ranking.order)))]
    return cut_tokenizer(whole, keep), keep


def check(whole: PreTrainedTokenizerFast, smaller: PreTrainedTokenizerFast, keep: list[int], text: str) -> None:
    before, after = (each(text, add_special_tokens=False).input_ids for each in (whole, smaller))
    assert smaller.decode(after) == whole.decode(before), text
    if {*before} <= {*keep}:
        assert [keep[number] for number in after] == before, text


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seeds", [1, pytest.param(SEEDS, marks=pytest.mark.slow)])
def test_every_text_is_given_back(kind: str, seeds: int) -> None:
    """500 texts of all planes and more: of ten tokenizers of each kind, cut by little and by all that may go."""
    rng = random.Random(kind)
    for seed in range(seeds):
        whole = TOKENIZERS[kind](seed)
        for share in (0.3, 0.7, 1.0):
            smaller, keep = cut(whole, seed, share)
            assert len(smaller) == len(keep)
            assert [smaller.convert_ids_to_tokens(n) for n in range(len(keep))] == whole.convert_ids_to_tokens(keep)
            for _ in range(60):
                check(whole, smaller, keep, text_of_all_planes(rng))
            for line in words(seed)[:5]:
                check(whole, smaller, keep, line)


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("model", ["demo", *filter(None, os.environ.get("SECATEUR_MODELS", "").split(os.pathsep))])
def test_a_real_tokenizer_gives_every_text_back(model: str) -> None:
    """500 texts of all planes; of the demo, and of models whose paths the environment has."""
    whole: Any = load_tokenizer(model)
    text, size = demo_texts()[0], len(whole)
    ranking = rank_tokens(pieces_of(whole), token_counts(whole, [text], size))
    rng = random.Random(0)
    for share in (0.5, 1.0):
        keep = [*ranking.kept(size - int(share * len(ranking.order)))]
        smaller = cut_tokenizer(whole, keep)
        assert len(smaller) == len(keep) < 0.6 * size
        for _ in range(250):
            check(whole, smaller, keep, text_of_all_planes(rng))
        check(whole, smaller, keep, text[:20_000])


SAME = {kind: (whole := make(0), *cut(whole, 0, 0.8)) for kind, make in TOKENIZERS.items() if kind != "unigram"}


@pytest.mark.parametrize("kind", SAME)
@given(text=st.text(max_size=40))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_given_back(kind: str, text: str) -> None:
    check(*SAME[kind], text)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_kept_tokens_are_read_as_before(kind: str) -> None:
    """Texts that the dense tokenizer makes of kept tokens alone, found by decoding such tokens."""
    whole = TOKENIZERS[kind](3)
    smaller, keep = cut(whole, 3, 0.6)
    rng, seen = random.Random(0), 0
    for _ in range(100):
        text = str(whole.decode(rng.choices(keep, k=rng.randrange(1, 6)), skip_special_tokens=True))
        seen += {*whole(text, add_special_tokens=False).input_ids} <= {*keep}
        check(whole, smaller, keep, text)
    assert seen > 20  # the check looked at something


def test_special_tokens_and_those_around_a_text_stay() -> None:
    whole = TOKENIZERS["wordpiece"](0)
    smaller, keep = cut(whole, 0, 1.0)
    assert smaller("a").input_ids[0] == smaller.bos_token_id == keep.index(whole.bos_token_id)
    assert smaller("a").input_ids[-1] == smaller.eos_token_id == keep.index(whole.eos_token_id)


def test_a_chat_is_written_with_kept_tokens() -> None:
    whole = TOKENIZERS["byte_level"](0)
    whole.chat_template = "{% for m in messages %}{{ m['role'] + ' said: ' + m['content'] }}{% endfor %}"
    smaller, keep = cut(whole, 0, 1.0)
    before = whole("user said: .", add_special_tokens=False).input_ids
    assert {*before} <= {*keep}
    assert smaller.chat_template == whole.chat_template


def test_counts_follow_the_parts() -> None:
    """A token that goes leaves its uses to its parts, so a part is never cheaper than what is made of it."""
    whole = TOKENIZERS["byte_level"](1)
    pieces = pieces_of(whole)
    ranking = rank_tokens(pieces, token_counts(whole, words(1), len(whole)))
    place = {number: index for index, number in enumerate(ranking.order)}
    for number, parts in pieces.parts.items():
        for part in parts:
            assert number not in place or part not in place or place[number] < place[part]
    scores_V = ranking.scores(2.0)[torch.tensor(ranking.order)]
    assert (scores_V.diff() > 0).all()


def test_a_part_that_has_gone_counts_by_its_own_parts() -> None:
    """In a vocabulary of Unigram a part may go before the token made of it."""
    tokens = {0: "a", 1: "b", 2: "c", 3: "d", 4: "ab", 5: "abc", 6: "abcd"}
    pieces = Pieces(tokens, {4: (0, 1), 5: (4, 2), 6: (5, 3)}, frozenset({0, 1, 2, 3}), closed=False)
    ranking = rank_tokens(pieces, torch.tensor([1.0, 1, 1, 1, 30, 0, 10]).double())
    assert ranking.order == (5, 6, 4)
    total = 44
    # "abcd" becomes "ab", "c", "d" where "abc" has gone: two tokens more for each of ten uses, and then "ab" has 40.
    assert (ranking.growth_V[torch.tensor(ranking.order)] * total).tolist() == [0, 20, 40]


def test_a_long_text_is_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text, asked = "ab cde f " * 40, list[int]()

    def letters(texts: list[str], **_: Any) -> SimpleNamespace:
        asked.append(sum(map(len, texts)))
        return SimpleNamespace(input_ids=[[max(0, ord(each) - 96) for each in text] for text in texts])

    whole = token_counts(cast(Any, letters), [text], 8)
    monkeypatch.setattr("secateur.vocabulary.ranking.PIECE", 50)
    assert torch.equal(token_counts(cast(Any, letters), [text], 8), whole)
    assert asked[0] == len(text)
    assert max(asked[1:]) <= 100
    monkeypatch.setattr("secateur.vocabulary.ranking.COUNTED", 100)
    assert token_counts(cast(Any, letters), [text], 8).sum() < 200


def test_tokens_that_the_text_lacks_go_by_zipfs_law() -> None:
    """All together they weigh what `unseen` says, and a token that a tokenizer lists early weighs more."""
    pieces = Pieces(
        {number: str(number) for number in range(5)}, dict.fromkeys((2, 3, 4), (0, 1)), frozenset({0, 1}), closed=True
    )
    counts_V = torch.tensor([8.0, 8.0, 0.0, 4.0, 0.0]).double()
    unseen = rank_tokens(pieces, counts_V, unseen=10.0)
    assert unseen.order == (4, 2, 3)
    assert float(unseen.growth_V[[2, 4]].sum()) == pytest.approx(10 / 20)
    assert unseen.growth_V[2] > unseen.growth_V[4]


@pytest.mark.parametrize("weight", [1, 5])
def test_the_weight_of_a_text_is_no_evidence(weight: int, tmp_path: Path) -> None:
    """A token that occurs once is rare, however much its text weighs: so are those that do not occur."""
    whole = TOKENIZERS["byte_level"](0)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words(0)), encoding="utf-8")
    options = CalibrationOptions((f"{file}@{weight}",))
    assert rank_by_text(whole, len(whole), options).growth_V.tolist() == pytest.approx(
        rank_by_text(whole, len(whole), CalibrationOptions((str(file),))).growth_V.tolist()
    )


def test_tokens_that_are_protected_stay() -> None:
    whole = TOKENIZERS["byte_level"](0)
    counts_V = torch.zeros(len(whole), dtype=torch.float64)
    some = whole(words(0)[0], add_special_tokens=False).input_ids
    ranking = rank_tokens(pieces_of(whole), counts_V, protected=some)
    assert {*some} <= {*ranking.kept(ranking.least)}


def test_tokens_of_a_text_to_keep_stay(tmp_path: Path) -> None:
    whole = TOKENIZERS["byte_level"](0)
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    (about, *_, rare) = words(0)
    first.write_text(" ".join([about] * 50))
    second.write_text(f"{rare} {rare}")
    used = {*whole(second.read_text(), add_special_tokens=False).input_ids}
    options = CalibrationOptions((str(first),))
    without, with_it = (rank_by_text(whole, len(whole), options, keep=keep) for keep in ((), (str(second),)))
    assert used <= {*with_it.kept(with_it.least)}
    assert not used <= {*without.kept(without.least)}


def test_what_a_vocabulary_is_not_counted_by() -> None:
    with pytest.raises(PlanError, match="axes=vocabulary counts tokens in a text, and calibration=self is too little"):
        rank_by_text(TOKENIZERS["byte_level"](0), 9, CalibrationOptions("self", varied=0.0))
    with pytest.raises(PlanError, match="object is no fast tokenizer, and only a"):
        pieces_of(object())  # type: ignore[arg-type]


def test_a_tokenizer_of_words_is_refused() -> None:
    from tokenizers import Tokenizer, models

    words_alone = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(PlanError, match="of type WordLevel, whose tokens have no smaller parts"):
        pieces_of(words_alone)
