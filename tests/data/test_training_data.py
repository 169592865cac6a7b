"""Rows of files become rows of tokens: what is learned of them, how they are cut, pack_rows, mixed and ordered."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.data.options import DataOptions, split_weight
from secateur.data.rows import IGNORED, Rows, collate, pack_rows, steps_for_epochs, training_order
from secateur.data.training_data import TrainingData, read_training_data
from secateur.errors import DataError
from tiny import tiny_tokenizer

CHAT = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ALPACA = {"instruction": "Add the numbers.", "input": "2 and 3", "output": "They are five."}


@pytest.fixture
def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = None
    yield made
    made.chat_template = None


def write(folder: Path, rows: list[Any], name: str = "rows.json") -> str:
    path = folder / name
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


def read(tokenizer: Any, *sources: str, **options: Any) -> TrainingData:
    return read_training_data(tokenizer, DataOptions(sources, **{"validation": 0.0, "loss_on": "answers", **options}))


def texts(tokenizer: Any, rows: Rows) -> list[tuple[str, str]]:
    """Every row as text, and what of it is learned."""
    found = []
    for row in range(len(rows)):
        ids, learned = rows.ids_T[rows.slice_of(row)], rows.loss_mask_T[rows.slice_of(row)]
        found.append((tokenizer.decode(ids), tokenizer.decode(ids[learned])))
    return found


class TestWords:
    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
    def test_alpaca_as_llm_pruner_words_it(self, name: str, tokenizer: Any, tmp_path: Path) -> None:
        without = {**ALPACA, "instruction": "Say hello.", "input": "", "output": "Hello."}
        rows = read(tokenizer, write(tmp_path, [ALPACA, without], name)).train
        assert texts(tokenizer, rows) == [
            (
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n"
                "### Input:\n2 and 3\n\n### Response:\nThey are five.<end>",
                "They are five.<end>",
            ),
            (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nSay hello.\n\n### Response:\nHello.<end>",
                "Hello.<end>",
            ),
        ]

    @pytest.mark.parametrize(
        "row",
        [
            {"instruction": "Add the numbers.", "context": "2 and 3", "response": "They are five.", "category": "qa"},
            {"prompt": "Add the numbers.", "input": "2 and 3", "completion": "They are five."},
            {"question": "Add the numbers.", "context": "2 and 3", "answer": "They are five."},
        ],
    )
    def test_other_names_of_the_same_fields(self, row: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
        same = read(tokenizer, write(tmp_path, [ALPACA], "alpaca.json")).train
        assert read(tokenizer, write(tmp_path, [row])).train.digest() == same.digest()

    @pytest.mark.parametrize(
        "row",
        [
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}] * 2},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello you"}] * 2},
        ],
    )
    def test_a_chat_is_put_into_the_template(self, row: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.chat_template = CHAT
        rows = read(tokenizer, write(tmp_path, [row])).train
        turn = "[user] Hi<end>\n[assistant] Hello you<end>\n"
        assert texts(tokenizer, rows) == [(turn * 2, "Hello you<end>\n" * 2)]

    def test_an_instruction_as_a_chat(self, tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.chat_template = CHAT
        rows = read(tokenizer, write(tmp_path, [ALPACA]), template="chat").train
        whole = "[user] Add the numbers.\n\n2 and 3<end>\n[assistant] They are five.<end>\n"
        assert texts(tokenizer, rows) == [(whole, "They are five.<end>\n")]

    def test_all_tokens_but_the_first_are_learned_where_asked_for(self, tokenizer: Any, tmp_path: Path) -> None:
        rows = read(tokenizer, write(tmp_path, [ALPACA]), loss_on="all").train
        assert rows.loss_mask_T.tolist() == [False] + [True] * (len(rows.loss_mask_T) - 1)

    def test_text_is_cut_into_rows_and_nothing_is_lost(self, tokenizer: Any, tmp_path: Path) -> None:
        text = "A saw cuts a branch. " * 30
        (tmp_path / "book.txt").write_text(text)
        rows = read(tokenizer, str(tmp_path / "book.txt"), max_length=32).train
        assert tokenizer.decode(rows.ids_T) == f"{text}<end>"
        assert set(rows.lengths_R[:-1].tolist()) == {32}
        assert len(read(tokenizer, str(tmp_path / "book.txt"), max_length=32, samples=3).train) == 3

    def test_documents_and_a_column_of_another_name(self, tokenizer: Any, tmp_path: Path) -> None:
        named = write(tmp_path, [{"text": "One.", "body": "Two two."}])
        assert texts(tokenizer, read(tokenizer, named).train)[0][0] == "One.<end>"
        assert texts(tokenizer, read(tokenizer, named, column="body").train)[0][0] == "Two two.<end>"

    def test_a_slow_tokenizer_learns_the_same(self, tokenizer: Any, tmp_path: Path) -> None:
        class Slow:
            """The tokenizer without its offsets."""

            is_fast, eos_token_id = False, tokenizer.eos_token_id

            def __call__(self, text: Any, **options: Any) -> Any:
                assert not options.pop("return_offsets_mapping", False)
                return tokenizer(text, **options)

        named = write(tmp_path, [ALPACA, {**ALPACA, "output": "5"}])
        assert read(Slow(), named).train.digest() == read(tokenizer, named).train.digest()


class TestCut:
    def test_rows_are_cut_and_those_without_an_answer_left_out(self, tokenizer: Any, tmp_path: Path) -> None:
        long, empty = {**ALPACA, "instruction": "word " * 200}, {**ALPACA, "output": " "}
        found = read(
            tokenizer, write(tmp_path, [ALPACA, long, empty, {**ALPACA, "output": "five " * 300}]), max_length=200
        )
        assert found.dropped == {"cut off before the answer": 1, "without an answer": 1}
        assert len(found.train) == 2
        assert int(found.train.lengths_R.max()) == 200

    @pytest.mark.parametrize(
        ("rows", "options", "match"),
        [
            ([], {}, "there are no rows in it"),
            ([ALPACA], {"max_length": 8}, r"nothing is left of its 1 rows .* 1 are cut off .* --max-length 16"),
            ([{**ALPACA, "output": ""}], {}, r"nothing is left of its 1 rows .* --loss-on all"),
            ([{"body": "One."}], {}, r"item 1: no fields to train on among \['body'\]. .*--column NAME"),
            ([ALPACA], {"column": "body"}, r"no column 'body' among \['input', 'instruction', 'output'\]"),
            ([{**ALPACA, "output": 5}], {}, "its 'output' is of type int, not a text"),
            ([{"text": 5}], {}, "its 'text' is of type int, neither a text nor messages"),
            ([{"messages": [{"role": "user"}]}], {}, "has a message without text"),
            ([{"messages": [{"role": "user", "content": "Hi"}]}], {}, "the tokenizer has none"),
            ([{"messages": [{"role": "user", "content": "Hi"}]}], {"template": "alpaca"}, "no place for"),
            (["text"], {}, "a JSON str is no row"),
        ],
    )
    def test_what_cannot_be_read(
        self, rows: list[Any], options: dict[str, Any], match: str, tokenizer: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(DataError, match=match):
            read(tokenizer, write(tmp_path, rows), **options)

    def test_a_template_that_refuses_or_rewrites(self, tokenizer: Any, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}] * 2
        named = write(tmp_path, [{"messages": messages}])
        tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].role) }}"
        with pytest.raises(DataError, match=r"the chat template does not take it .*no user"):
            read(tokenizer, named)
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(DataError, match="writes message 2 otherwise when others follow"):
            read(tokenizer, named)
        assert len(read(tokenizer, named, loss_on="all").train) == 1

    def test_a_column_of_plain_text(self, tokenizer: Any, tmp_path: Path) -> None:
        (tmp_path / "book.txt").write_text("Some text.")
        with pytest.raises(DataError, match="column='body' names a field of rows, and this is one text"):
            read(tokenizer, str(tmp_path / "book.txt"), column="body")

    def test_no_file(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match="no such file"):
            read(tokenizer, "nothing.json")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"sources": ()}, "names no data"),
            ({"sources": ("",)}, "names no data"),
            ({"template": "vicuna"}, "template='vicuna' is unknown. Expected auto, alpaca or chat"),
            ({"loss_on": "questions"}, "loss_on='questions' is unknown"),
            ({"max_length": 1}, "max_length=1 is too small"),
            ({"samples": 0}, "samples=0 is too small"),
            ({"validation": 1.0}, r"validation=1.0 is no fraction of the rows"),
            ({"sources": ("a.json@0",)}, "the weight 0 leaves nothing of it"),
        ],
    )
    def test_refused(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(DataError, match=match):
            DataOptions(**{"sources": ("a.json",), **options})

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("a.json", ("a.json", None)),
            ("a.json@2", ("a.json", 2.0)),
            ("a@b.json", ("a@b.json", None)),
            ("a@b.json@.5", ("a@b.json", 0.5)),
        ],
    )
    def test_weights(self, source: str, expected: tuple[str, float | None]) -> None:
        assert split_weight(source) == expected


class TestSplit:
    def test_validation_rows_are_others(self, tokenizer: Any, tmp_path: Path) -> None:
        named = write(tmp_path, [{**ALPACA, "output": f"Answer {i}."} for i in range(50)])
        found = read(tokenizer, named, validation=0.1)
        train, validation = (set(texts(tokenizer, rows)) for rows in (found.train, found.validation))
        assert (len(train), len(validation)) == (45, 5)
        assert not train & validation
        assert read(tokenizer, named, validation=0.1).validation.digest() == found.validation.digest()
        assert read(tokenizer, named, validation=0.1, seed=1).validation.digest() != found.validation.digest()

    @pytest.mark.parametrize("seed", range(6))
    def test_each_source_has_a_row_to_train_on(self, seed: int, tokenizer: Any, tmp_path: Path) -> None:
        first, *others = (write(tmp_path, [{**ALPACA, "output": name}], f"{name}.json") for name in "abc")
        found = read(tokenizer, f"{first}@2", *others, validation=0.9, seed=seed)
        assert found.train.sources_R.tolist() == [0, 1, 2]
        assert len(found.validation) == 0

    def test_written_rows_stand_behind_the_start_tokens(self, tokenizer: Any) -> None:
        written = torch.arange(10, 22).reshape(2, 6)
        without = read_training_data(tokenizer, DataOptions(("self",), validation=0.0), written_RT=written).train
        assert without.ids_T.tolist() == written.flatten().tolist()
        assert without.loss_mask_T.tolist() == ([False] + [True] * 5) * 2
        begin = 99

        class Beginning:
            bos_token_id = begin

            def __call__(self, text: str) -> dict[str, list[int]]:
                return {"input_ids": [begin, *map(ord, text)]}

        rows = read_training_data(
            cast(Any, Beginning()), DataOptions(("self",), validation=0.0), written_RT=written
        ).train
        assert rows.ids_T.tolist() == [begin, 10, 11, 12, 13, 14, begin, 16, 17, 18, 19, 20]
        assert rows.loss_mask_T.tolist() == ([False] + [True] * 5) * 2

    def test_one_row_is_to_train_on(self, tokenizer: Any, tmp_path: Path) -> None:
        found = read(tokenizer, write(tmp_path, [ALPACA]), validation=0.5)
        assert (len(found.train), len(found.validation)) == (1, 0)


def some_rows(lengths: list[int], sources: list[int] | None = None) -> Rows:
    ids = torch.arange(sum(lengths), dtype=torch.int32)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    learned = torch.ones(len(ids), dtype=torch.bool)
    learned[starts[:-1]] = False
    return Rows(ids, learned, starts, torch.tensor(sources or [0] * len(lengths), dtype=torch.int32))


@given(st.lists(st.integers(2, 20), min_size=1, max_size=40), st.integers(20, 50))
def test_packing_keeps_every_token_once_and_fills_rows(lengths: list[int], length: int) -> None:
    rows = some_rows(lengths)
    fewer = pack_rows(rows, length)
    assert sorted(fewer.ids_T.tolist()) == rows.ids_T.tolist()
    assert int(fewer.lengths_R.max()) <= length
    assert fewer.positions_T is not None
    begins = fewer.positions_T == 0
    assert int(begins.sum()) == len(lengths)
    assert not fewer.loss_mask_T[begins].any()
    full = fewer.lengths_R.tolist()
    assert all(a + b > length for i, a in enumerate(full) for b in full[:i])  # else the two would be one


def test_packed_rows_are_of_one_source() -> None:
    fewer = pack_rows(some_rows([5, 5, 5, 5], [0, 1, 0, 1]), 10)
    assert fewer.sources_R.tolist() == [0, 1]
    assert fewer.ids_T.tolist() == [*range(5), *range(10, 15), *range(5, 10), *range(15, 20)]


class TestOrder:
    @given(st.lists(st.integers(2, 20), min_size=4, max_size=40), st.integers(1, 4), st.booleans())
    def test_every_row_is_read_before_any_again(self, lengths: list[int], batch: int, group: bool) -> None:
        rows = some_rows(lengths)
        steps = steps_for_epochs(len(rows), 3, batch)
        order = training_order(rows, steps=steps, batch_size=batch, seed=1, group_by_length=group)
        counts = Counter(order.flatten().tolist())
        assert max(counts.values()) - min(counts[row] for row in range(len(rows))) <= 1
        by_step = rows.lengths_R[order]
        assert bool((by_step.diff(dim=1) <= 0).all())

    def test_the_same_seed_gives_the_same_order_and_another_another(self) -> None:
        rows = some_rows([4] * 32)
        first, same, other = (training_order(rows, steps=4, batch_size=8, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    def test_sources_are_drawn_by_weight(self) -> None:
        rows = some_rows([4] * 40, [0] * 30 + [1] * 10)
        order = training_order(rows, steps=10, batch_size=8, seed=0, weights=(1.0, 3.0))
        assert Counter(rows.sources_R[order.flatten()].tolist()) == {0: 20, 1: 60}
        assert set(order.flatten().tolist()) >= set(range(30, 40))

    def test_grouping_leaves_less_padding(self) -> None:
        rows = some_rows(torch.randint(2, 200, (256,), generator=torch.Generator().manual_seed(0)).tolist())

        def padding(group: bool) -> int:
            lengths = rows.lengths_R[training_order(rows, steps=64, batch_size=4, seed=0, group_by_length=group)]
            return int((lengths.max(dim=1).values * 4 - lengths.sum(dim=1)).sum())

        assert padding(True) < padding(False) / 2


def test_labels_are_the_next_tokens_that_are_learned() -> None:
    rows = some_rows([2, 4])
    rows.loss_mask_T[3] = False
    batch = collate(rows, [1, 0], pad=9)
    assert batch["input_ids"].tolist() == [[2, 3, 4, 5], [0, 1, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 4, 5, IGNORED], [1, IGNORED, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(("numbers", "width"), [([0], 4), ([1], 8), ([2], 9), ([0, 2], 9)])
def test_widths_are_multiples_up_to_the_longest_row(numbers: list[int], width: int) -> None:
    rows = some_rows([2, 5, 9])
    plain, wide = collate(rows, numbers, pad=0), collate(rows, numbers, pad=0, multiple=4)
    assert wide["input_ids"].shape == (len(numbers), width)
    length = plain["input_ids"].shape[1]
    for name, tensor in plain.items():
        assert torch.equal(wide[name][:, :length], tensor)
    assert not wide["attention_mask"][:, length:].any()
    assert (wide["labels"][:, length:] == IGNORED).all()


class TestForms:
    @pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
    def test_a_share_of_the_plain_text_is_in_other_forms(self, share: float, tokenizer: Any, tmp_path: Path) -> None:
        documents = [{"text": f"Number {i}, it's there."} for i in range(16)]
        found = texts(tokenizer, read(tokenizer, write(tmp_path, documents), varied=share).train)
        changed = [text for text, _ in found if not text.startswith("Number") or " , " in text]
        assert len(changed) == 16 * share
        assert len([text for text in changed if text.startswith("number N it 's there")]) == 8 * share

    def test_a_long_text_is_divided_where_a_paragraph_ends(self, tokenizer: Any, tmp_path: Path) -> None:
        paragraph = "A line, and more.\n" * 100
        (tmp_path / "long.txt").write_text("\n".join([paragraph] * 12))
        whole = "".join(text for text, _ in texts(tokenizer, read(tokenizer, str(tmp_path / "long.txt")).train))
        assert whole.count("<end>") == 1
        assert whole.count("a line and more") == pytest.approx(whole.count("A line , and more . "), abs=400)
        assert whole.count("a line and more") > 100

    def test_instructions_stay_as_they_are(self, tokenizer: Any, tmp_path: Path) -> None:
        source = write(tmp_path, [ALPACA] * 8)
        assert read(tokenizer, source, varied=0.5).train.digest() == read(tokenizer, source, varied=0.0).train.digest()

    def test_a_share_that_is_none(self) -> None:
        with pytest.raises(DataError, match=r"varied=1.5 is no fraction of the plain text.*DataOptions\(varied=0.25\)"):
            DataOptions(("a.txt",), varied=1.5)


def test_every_row_of_a_text_begins_as_a_text_does(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    (tmp_path / "long.txt").write_text("a cat and a dog and a bird sat on a log and sang " * 20)
    plain = read(tokenizer, str(tmp_path / "long.txt"), max_length=16, varied=0.0).train
    with pytest.MonkeyPatch.context() as patch:
        backend = tokenizer.backend_tokenizer
        patch.setattr(backend, "post_processor", TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)]))
        rows = read(tokenizer, str(tmp_path / "long.txt"), max_length=16, varied=0.0).train
        backend.post_processor = None
    assert all(rows.ids_T[rows.starts[:-1]] == 0)
    assert int(rows.lengths_R.max()) == 16
    inner = torch.ones(len(rows.ids_T), dtype=torch.bool)
    inner[rows.starts[:-1]] = False
    assert rows.ids_T[inner].tolist() == plain.ids_T.tolist()
