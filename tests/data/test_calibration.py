"""Text is read as documented, windows are random places of it, and what is wrong with a text is said."""

from __future__ import annotations

import copy
import importlib.machinery
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import secateur.data.calibration
from secateur.data.calibration import (
    CalibrationOptions,
    calibration_windows,
    demo_texts,
    digest,
    overlap,
    read_calibration,
    read_rows,
    read_text,
    sample_windows,
    self_written,
)
from secateur.errors import DataError
from secateur.models.config import check_positions
from secateur.scoring.scores import score
from tiny import VOCABULARY, tiny_model, tiny_tokenizer


def letter_tokenizer() -> PreTrainedTokenizerBase:
    """One token per letter, a = 1; asked to, it puts 0 in front."""
    vocabulary = {"^": 0, **{chr(96 + i): i for i in range(1, 27)}}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="^"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=8)


LETTERS = letter_tokenizer()


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


class TestDemoTexts:
    def test_every_text_is_in_one_half_at_most(self) -> None:
        from pydoc_data.topics import topics

        calibration, evaluation = demo_texts()
        for text in topics.values():
            assert not (text in calibration and text in evaluation)
        n_distinct, held = len(set(topics.values())), len(calibration) + len(evaluation)
        assert 0.7 < held / (sum(map(len, set(topics.values()))) + 2 * (n_distinct - 2)) <= 1

    def test_the_halves_share_no_run_of_words(self) -> None:
        calibration, evaluation = demo_texts()
        assert overlap([calibration], evaluation) == 0
        assert overlap([calibration + evaluation[1000:2000]], evaluation) == 1

    def test_a_topic_that_repeats_part_of_the_evaluation_text_is_left_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
        topics = {"a": f"first {shared}", "b": f"{shared} last", "c": shared.replace("six", "6"), "d": "fourth"}
        monkeypatch.setattr("pydoc_data.topics.topics", topics)
        assert demo_texts() == (topics["c"], f"{topics['b']}\n\nfourth")

    def test_a_text_of_two_names_counts_at_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        topics = {"d": "two", "a": "one", "b": "two", "c": "three", "e": "five"}
        monkeypatch.setattr("pydoc_data.topics.topics", topics)
        assert demo_texts() == ("one\n\nthree\n\nfive", "two")


class TestRows:
    @pytest.mark.parametrize(
        ("text", "rows"),
        [
            (" \n = Title = \n \n A line . \n \n", ["", " = Title = \n", "", " A line . \n", ""]),
            (" one line \n another\n", ["one line", "another"]),
            (" one line \n another", ["one line", "another"]),
            ("a\n\nb", ["a\n", "", "b"]),
            ("a\r\n\r\nb\r\n", ["a\n", "", "b\n"]),
            ("\ufeffa\nb\n", ["a", "b"]),
            ("a\u2028b\x0cc\n", ["a\u2028b\x0cc"]),
        ],
    )
    def test_plain_text(self, text: str, rows: list[str], tmp_path: Path) -> None:
        for name in ("x.txt", "x.raw", "x.md", "x"):
            assert read_rows(write(tmp_path, name, text)) == rows

    @given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1)))
    def test_joined_rows_of_prose_are_the_lines(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in ["x", "", *lines])
        rows = secateur.data.calibration._text_rows(text)
        assert len(rows) == len(lines) + 2
        assert all(
            row == f"{line}\n" or (row == "" and not line.strip()) for row, line in zip(rows[2:], lines, strict=True)
        )

    def test_documents(self, tmp_path: Path) -> None:
        texts = ["a\nb\n", " c ", "ö"]
        lines = [json.dumps({"text": text, "id": 1}) for text in texts]
        for name, content in (
            ("x.jsonl", "\n".join(lines)),
            ("x.JSONL", "\n\n".join(lines) + "\n"),
            ("x.json", "\n".join(lines)),
            ("x.json", f"[{','.join(lines)}]"),
            ("x.jsonl", "\ufeff" + "\n".join(lines)),
        ):
            assert read_rows(write(tmp_path, name, content)) == texts
        assert read_rows(str(write(tmp_path, "one.json", lines[0]))) == texts[:1]

    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            (
                "x.jsonl",
                '{"text": "a"}\n{"body": "b", "a": 1}',
                r"x\.jsonl', line 2: no column 'text' among \['a', 'body'\]\. 'body' holds",
            ),
            ("x.jsonl", '{"text": "a"}\n\n["b"]', r"line 3: a JSON list is no document\. Expected an object"),
            ("x.jsonl", '{"text": 1}', r"line 1: its 'text' is of type int, not a text\. Expected a string, or a list"),
            ("x.jsonl", '{"text": "a"}\n{"text', r"line 2: not JSON \(.*\)\. Expected one object a line"),
            (
                "x.json",
                '[{"text": "a"}, {"body": "b"}]',
                r"x\.json', item 2: no column 'text' among \['body'\]",
            ),
            ("x.json", "7", r"item 1: a JSON int is no document"),
            ("x.txt", b"ok\xff", r"x\.txt': byte 2 is not UTF-8\. Expected text in UTF-8"),
            ("x.txt", "", r"x\.txt': there is no text in it"),
            ("x.txt", " \n\n", r"x\.txt': there is no text in it"),
            ("x.jsonl", '{"text": " "}', r"x\.jsonl': there is no text in it"),
        ],
    )
    def test_a_file_that_is_not_what_it_should_be(
        self, name: str, content: str | bytes, match: str, tmp_path: Path
    ) -> None:
        file = write(tmp_path, name, content)
        for function in (read_rows, read_calibration, read_text):
            with pytest.raises(DataError, match=match):
                function(file)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"x\.txt': no such file\. Expected a text file"):
            read_rows(tmp_path / "x.txt")
        with pytest.raises(DataError, match="this is a folder"):
            read_rows(tmp_path)

    def test_a_file_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(*_: object, **__: object) -> str:
            raise PermissionError(13, "Permission denied")

        file = write(tmp_path, "x.txt", "a")
        monkeypatch.setattr(Path, "read_text", forbidden)
        with pytest.raises(DataError, match=r"x\.txt': the file cannot be read \(Permission denied\)"):
            read_rows(file)


class TestParquet:
    def test_without_the_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"reading Parquet needs pyarrow\. Run: pip install 'secateur\[data\]'"):
            read_rows(write(tmp_path, "x.parquet", b"PAR1"))

    def test_the_text_column(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": ["a\n", ""], "n": [1, 2]}), tmp_path / "x.parquet")
        assert read_rows(tmp_path / "x.parquet") == ["a\n", ""]
        parquet.write_table(pyarrow.table({"n": [1, 2]}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=r"no column 'text' among \['n'\]"):
            read_rows(tmp_path / "x.parquet")
        parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=r"row 2: its 'text' is of type NoneType"):
            read_rows(tmp_path / "x.parquet")
        with pytest.raises(DataError, match="not a readable Parquet file"):
            read_rows(write(tmp_path, "y.parquet", b"PAR1"))


class TestCalibrationText:
    def test_demo(self) -> None:
        assert read_calibration("demo") == read_text("demo") == demo_texts()[0]

    def test_plain_text_stays_as_it_is(self, tmp_path: Path) -> None:
        file = write(tmp_path, "x.txt", "\ufeff a \n\n b\n")
        assert read_calibration(file) == read_text(str(file)) == " a \n\n b\n"

    def test_documents_are_kept_apart_or_joined(self, tmp_path: Path) -> None:
        file = write(tmp_path, "x.jsonl", '{"text": "a"}\n{"text": "b"}\n')
        assert read_calibration(file) == ["a", "b"]
        assert read_text(file) == "a\n\nb"

    @pytest.mark.parametrize("name", ["./x", "/no/x", "~/no-such-x", "x.txt", "x.jsonl", "a/b/c", "x.RAW", "a\\x"])
    def test_a_missing_file_is_not_taken_for_a_data_set(self, name: str) -> None:
        with pytest.raises(DataError, match=r"no such file\. Expected a text file"):
            read_calibration(name)

    @pytest.mark.parametrize("name", ["bookcorpus", "organisation/name", "set-v1.0"])
    def test_a_data_set_without_the_package(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=rf"'{name}': no such file, and .* needs the package datasets\. Run: pip"):
            read_calibration(name)


class TestColumn:
    ROWS = ({"id": 1, "body": "a b", "turns": ["Hi.", "Hello."], "text": ""}, {"id": 2, "body": "c", "turns": []})

    @pytest.fixture(params=["jsonl", "json", "parquet"])
    def file(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        path = tmp_path / f"x.{request.param}"
        if request.param == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(self.ROWS)), path)
        elif request.param == "json":
            path.write_text(json.dumps(self.ROWS))
        else:
            path.write_text("\n".join(map(json.dumps, self.ROWS)))
        return path

    def test_it_is_read(self, file: Path) -> None:
        assert read_calibration(file, column="body") == ["a b", "c"]
        assert read_calibration(file, column="turns") == ["Hi.\nHello.", ""]

    def test_one_that_is_not_there(self, file: Path) -> None:
        found = r"\['body', 'id', 'text', 'turns'\]\. 'body' holds text: name it, Cal.*Options\(column='body'\)"
        with pytest.raises(DataError, match=rf"{file.name}'(, (line|item) 1)?: no column 'bdy' among {found}"):
            read_calibration(file, column="bdy")

    def test_one_without_text(self, file: Path) -> None:
        with pytest.raises(DataError, match=r"(line|item|row) 1: its 'id' is of type int, not a text"):
            read_calibration(file, column="id")

    def test_no_column_of_text(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no column 'text' among \['a'\]\. Expected an object with a text"):
            read_calibration(write(tmp_path, "x.jsonl", '{"a": 1}'))

    def test_a_plain_text_has_none(self, tmp_path: Path) -> None:
        for name in (write(tmp_path, "x.txt", "a b"), "demo"):
            with pytest.raises(DataError, match=r"column='body' names a field of documents, and this is one text"):
                read_calibration(name, column="body")


class TestChat:
    TEMPLATE = (
        "{% for m in messages %}{{ raise_exception('who?') if m.role == 'narrator' }}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )

    @pytest.fixture
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = letter_tokenizer()
        tokenizer.chat_template = self.TEMPLATE
        return tokenizer

    @pytest.mark.parametrize(
        ("row", "column", "expected"),
        [
            ({"text": "a"}, "text", "<user>a"),
            ({"text": ["a", "b", "c"]}, "text", "<user>a<assistant>b<user>c"),
            ({"messages": [{"role": "system", "content": "a", "id": 7}]}, "messages", "<system>a"),
            ({"messages": [{"role": "system", "content": "a"}], "text": "b"}, "text", "<system>a"),
            ({"messages": [{"role": "system", "content": "a"}], "body": "b"}, "body", "<user>b"),
        ],
    )
    def test_documents_are_put_into_the_template(
        self, row: Any, column: str, expected: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        file = write(tmp_path, "x.jsonl", json.dumps(row))
        assert read_calibration(file, column=column, chat=tokenizer) == [expected]

    def test_a_plain_text_is_one_message(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        assert read_calibration(write(tmp_path, "x.txt", "a\nb"), chat=tokenizer) == "<user>a\nb"

    def test_messages_of_parquet(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"messages": [[{"role": "user", "content": "a"}]], "text": ["b"]})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "x.parquet")
        assert read_calibration(tmp_path / "x.parquet", chat=tokenizer) == ["<user>a"]

    def test_windows_are_of_what_the_template_writes(self, tmp_path: Path) -> None:
        tokenizer = letter_tokenizer()
        tokenizer.chat_template = "xyz{{ messages[0].content }}"
        file = write(tmp_path, "x.jsonl", '{"text": "abc"}')
        options = CalibrationOptions(str(file), samples=1, length=6, chat=True)
        assert [spell(row) for row in calibration_windows(tokenizer, options).tolist()] == ["xyzabc"]

    def test_messages_without_the_template(self, tmp_path: Path) -> None:
        file = write(tmp_path, "x.jsonl", '{"messages": [{"role": "user", "content": "a"}]}')
        with pytest.raises(
            DataError, match=r"its 'messages' holds messages of a chat\. .*\(column='messages', chat=True"
        ):
            read_calibration(file, column="messages")

    def test_no_template(self) -> None:
        with pytest.raises(DataError, match=r"the tokenizer has no chat template\. .*CalibrationOptions\(chat=False\)"):
            calibration_windows(LETTERS, CalibrationOptions(chat=True))

    def test_a_template_that_refuses(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        file = write(tmp_path, "x.jsonl", '{"messages": [{"role": "narrator", "content": "a"}]}')
        with pytest.raises(DataError, match=r"line 1: its 'messages': the chat template does not take it \(.*who\?\)"):
            read_calibration(file, chat=tokenizer)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


class TestSelfWritten:
    OPTIONS = CalibrationOptions("self", samples=3, length=20)

    @settings(max_examples=8, deadline=None)
    @given(st.integers(1, 5), st.integers(2, 12), st.integers(0, 2**31))
    def test_the_shape_is_what_was_asked_and_a_seed_gives_the_same(
        self, model: PreTrainedModel, samples: int, length: int, seed: int
    ) -> None:
        options = CalibrationOptions("self", samples=samples, length=length, seed=seed)
        written = self_written(model, options)
        assert (written.shape, written.dtype) == ((samples, length), torch.int64)
        assert 0 <= int(written.min()) <= int(written.max()) < VOCABULARY
        assert torch.equal(written, self_written(model, options))

    def test_samples_and_seeds_differ(self, model: PreTrainedModel) -> None:
        written = self_written(model, self.OPTIONS)
        assert len({tuple(row) for row in written.tolist()}) == 3
        assert not torch.equal(written, self_written(model, replace(self.OPTIONS, seed=1)))

    def test_nothing_else_changes(self, model: PreTrainedModel) -> None:
        theirs = model.generation_config
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        self_written(model, self.OPTIONS)
        assert torch.equal(torch.rand(3), expected)
        assert model.generation_config is theirs
        assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())

    def test_tokens_follow_the_models_own_distribution(self, model: PreTrainedModel) -> None:
        """With settings that would change it, and an end of text that would stop it."""
        model = copy.deepcopy(model)
        weight = model.get_output_embeddings().weight
        with torch.no_grad():
            weight.zero_()
        model.generation_config = GenerationConfig(
            top_k=1, temperature=9.0, repetition_penalty=9.0, eos_token_id=[0, 7], bad_words_ids=[[3]], min_p=0.9
        )
        written = self_written(model, CalibrationOptions("self", samples=30, length=200))
        counts = torch.bincount(written.flatten(), minlength=VOCABULARY)  # 20 of each are expected
        assert counts.shape == (VOCABULARY,)
        assert 3 < int(counts.min()) <= int(counts.max()) < 50

    def test_each_token_is_drawn_given_those_before_it(self) -> None:
        """A model that is sure of itself writes what it finds most likely, with a cache and without."""
        model = tiny_model(seed=3, bos_token_id=1)  # token 0 pads: it is embedded as zeros, which say nothing
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1e5)
        written = self_written(model, self.OPTIONS)
        read = torch.cat([torch.ones(3, 1, dtype=torch.int64), written], dim=1)
        with torch.no_grad():
            likely = model(input_ids=read).logits.argmax(-1)
        assert torch.equal(written, likely[:, :-1])

    def test_batches(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, int]] = []
        monkeypatch.setattr(secateur.data.calibration, "WRITTEN_TOKENS", 45)
        written = self_written(model, self.OPTIONS, progress=lambda done, total: seen.append((done, total)))
        assert written.shape == (3, 20)
        assert seen == [(2, 3), (3, 3)]

    @pytest.mark.parametrize(
        ("changes", "start"),
        [
            ({"bos_token_id": 5}, 5),
            ({"bos_token_id": None, "eos_token_id": [6, 7]}, 6),
            ({"bos_token_id": VOCABULARY, "eos_token_id": 8}, 8),
            ({"bos_token_id": -1, "eos_token_id": None, "pad_token_id": None}, 0),
        ],
    )
    def test_what_it_starts_after(self, changes: dict[str, Any], start: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(**changes)
        read: list[Tensor] = []
        model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        self_written(model, self.OPTIONS)
        assert read[0].tolist() == [[start]] * 3

    def test_a_model_that_cannot(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        silent: Any = SimpleNamespace(config=model.config)
        with pytest.raises(DataError, match=r"'self': SimpleNamespace has no generate.*CalibrationOptions\('demo'\)"):
            self_written(silent, self.OPTIONS)

        def fail(**_: object) -> None:
            raise ValueError("no\ncache")

        monkeypatch.setattr(model, "generate", fail)
        with pytest.raises(DataError, match=r"'self': \w+ writes no text \(ValueError: no cache\)\. Give a text"):
            self_written(model, self.OPTIONS)

    def test_nan(self) -> None:
        model = tiny_model()
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(float("nan"))
        with pytest.raises(DataError, match=r"the logits of \w+ hold NaN, so it writes no text"):
            self_written(model, self.OPTIONS)

    def test_it_is_no_text_to_read(self) -> None:
        with pytest.raises(DataError, match=r"'self' is no text to read: .* self_written\(model, options\) does"):
            read_calibration("self")


class TestPositions:
    @given(st.integers(1, 40), st.integers(1, 40))
    def test_a_sample_must_fit(self, positions: int, length: int) -> None:
        config = AutoConfig.for_model("opt", max_position_embeddings=positions)
        if length <= positions:
            check_positions(config, length)
            return
        match = rf"^length={length} is longer than the model's {positions} positions.*length={positions} "
        with pytest.raises(DataError, match=match):
            check_positions(config, length)

    def test_names_and_limits_of_families(self) -> None:
        check_positions(AutoConfig.for_model("bloom"), 10**9)  # has no such setting
        check_positions(AutoConfig.for_model("xlnet"), 10**9)  # says -1: no limit
        with pytest.raises(DataError, match="the model's 7 positions"):
            check_positions(AutoConfig.for_model("gpt2", n_positions=7), 8)

    def test_before_any_pass(self) -> None:
        model = tiny_model(max_position_embeddings=16)
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
        options = CalibrationOptions("self", samples=2, length=17)
        for attempt in (
            lambda: self_written(model, options),
            lambda: score(model, calibration=options),
            lambda: score(model, windows=torch.zeros(2, 17, dtype=torch.int64)),
            lambda: score(model, tiny_tokenizer(), calibration=replace(options, text="demo")),
        ):
            with pytest.raises(DataError, match="length=17 is longer than the model's 16 positions"):
                attempt()


class TestScore:
    def test_self_written_windows(self) -> None:
        model, options = tiny_model(), CalibrationOptions("self", samples=2, length=10)
        found = score(model, calibration=options)
        assert found.options == options
        assert found.calibration == digest(self_written(model, options))

    def test_windows_of_unknown_origin(self) -> None:
        windows, options = torch.ones(2, 10, dtype=torch.int64), CalibrationOptions("x.txt")
        assert score(tiny_model(), windows=windows).options is None
        assert score(tiny_model(), windows=windows, calibration=options).options == options


class TestOverlap:
    @given(
        st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=4),
        st.lists(st.sampled_from("abc"), max_size=20),
        st.integers(1, 5),
    )
    def test_it_counts_windows_with_a_run_of_the_text(
        self, windows: list[list[str]], text: list[str], words: int
    ) -> None:
        runs = {tuple(text[i : i + words]) for i in range(len(text) - words + 1)}
        hit = [any(tuple(w[i : i + words]) in runs for i in range(len(w) - words + 1)) for w in windows]
        expected = sum(hit) / len(hit) if hit else 0
        assert overlap([" ".join(window) for window in windows], " ".join(text), words=words) == expected

    def test_case_and_punctuation_do_not_count(self) -> None:
        words = [f"word{i}" for i in range(13)]
        assert overlap([" ".join(words)], "Before. " + ", ".join(words).upper()) == 1
        assert overlap([" ".join(words[:12])], " ".join(words)) == 0


class TestDataSet:
    """With a stand-in for the package `datasets`, which has its way to the hub only."""

    @pytest.fixture
    def datasets(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        module = ModuleType("datasets")
        module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return module

    def test_its_train_split_is_read_as_far_as_needed(
        self, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
            assert config is None
            assert (name, split, streaming) == ("organisation/name", "train", True)
            while True:
                yield {"text": "abc"}

        datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setattr(secateur.data.calibration, "MAX_CHARACTERS", 10)
        assert read_calibration("organisation/name") == ["abc"] * 4

    def test_a_config_of_one(self, datasets: ModuleType) -> None:
        def load_dataset(name: str, config: str | None, **_: object) -> list[dict[str, str]]:
            return [{"text": f"{name} {config}"}]

        datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
        assert read_calibration("organisation/name:some-config") == ["organisation/name some-config"]

    def test_a_column_of_another_name(self, datasets: ModuleType) -> None:
        datasets.load_dataset = lambda *_, **__: [{"body": "a"}]  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=r"'name', row 1: no column 'text' among \['body'\]"):
            read_calibration("name")

    def test_an_empty_one(self, datasets: ModuleType) -> None:
        for rows in ([], [{"text": " "}]):
            datasets.load_dataset = lambda *_, rows=rows, **__: rows  # type: ignore[attr-defined]
            with pytest.raises(DataError, match=r"^'name': there is no text in it"):
                read_calibration("name")

    def test_utterances_are_lines(self, datasets: ModuleType) -> None:
        datasets.load_dataset = lambda *_, **__: [{"dialog": ["Hi.", "Hello."]}]  # type: ignore[attr-defined]
        assert read_calibration("name", column="dialog") == ["Hi.\nHello."]

    def test_whatever_fails_is_one_line(self, datasets: ModuleType) -> None:
        def load_dataset(*_: object, **__: object) -> None:
            raise ConnectionError("the hub\nis far away")

        datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
        with pytest.raises(
            DataError, match=r"^'name': no such file, and no data set .*: the hub is far away\)\. Check.*$"
        ):
            read_calibration("name")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": ""}, r"text='' names no text\. Expected demo, a file or a data set: CalibrationOptions\('demo'\)"),
        ({"samples": 0}, r"samples=0 is too small\. Expected at least 1: CalibrationOptions\(samples=64\)"),
        ({"length": 1}, r"length=1 is too small\. Expected at least 2: CalibrationOptions\(length=128\)"),
        ({"column": ""}, r"column='' names no field\. .*CalibrationOptions\(column='text'\)"),
        (
            {"text": "self", "chat": True},
            r"chat=True are about documents, and 'self' is what .*: Cal.*Options\('self'\)",
        ),
        ({"text": "self", "column": "x"}, r"column='x' and chat=False are about documents"),
        ({"seed": -1}, r"seed=-1 is too small\. Expected at least 0: CalibrationOptions\(seed=0\)"),
        ({"shuffled": -0.1}, r"shuffled=-0\.1 is no share of the windows .*: CalibrationOptions\(shuffled=0\.25\)"),
        ({"shuffled": 1.0}, r"shuffled=1 is no share .* Expected at least 0 and less than 1: "),
        ({"shuffled": float("nan")}, r"shuffled=nan is no share"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        CalibrationOptions(**changes)


WORDS = st.text("abcdefghijklmnopqrstuvwxyz", max_size=30)


class TestWindows:
    @given(st.one_of(WORDS, st.lists(WORDS, max_size=5)), st.integers(1, 12), st.integers(2, 9), st.integers(0, 99))
    def test_windows_are_different_places_of_the_text_or_an_error_says_why_not(
        self, text: str | list[str], samples: int, length: int, seed: int
    ) -> None:
        documents = [text] if isinstance(text, str) else text
        options = CalibrationOptions(samples=samples, length=length, seed=seed)
        places = sum(max(len(document) - length + 1, 0) for document in documents)
        if places < samples:
            with pytest.raises(DataError, match=r"tokens, but one window needs|tiny calibration text"):
                sample_windows(text, LETTERS, options)
            return
        windows = sample_windows(text, LETTERS, options)
        assert windows.dtype == torch.int64
        assert windows.shape == (samples, length)
        assert torch.equal(windows, sample_windows(text, LETTERS, options))
        assert all(any(spell(row) in document for document in documents) for row in windows.tolist())

    @given(st.integers(1, 9), st.integers(2, 6), st.floats(0, 1, exclude_max=True), st.integers(0, 99))
    def test_the_last_windows_have_the_same_tokens_in_another_order(
        self, samples: int, length: int, shuffled: float, seed: int
    ) -> None:
        text = "the quick brown fox jumps over the lazy dog".replace(" ", "")
        options = CalibrationOptions(samples=samples, length=length, seed=seed)
        mixing = replace(options, shuffled=shuffled)
        plain, mixed = (sample_windows(text, LETTERS, each) for each in (options, mixing))
        kept = len(mixing.in_order(plain))
        assert kept == samples - int(samples * shuffled) >= 1
        assert torch.equal(mixed[:kept], plain[:kept])
        assert mixed.shape == plain.shape
        assert torch.equal(mixed[kept:].flatten().sort().values, plain[kept:].flatten().sort().values)
        assert torch.equal(mixed, sample_windows(text, LETTERS, mixing))

    def test_tokens_change_places_between_windows_and_scores_see_none_of_it(self) -> None:
        options = CalibrationOptions(samples=20, length=20, for_scores=15, shuffled=0.5)
        text = "abcdefghijklmnopqrstuvwxyz" * 9
        plain, mixed = (sample_windows(text, LETTERS, each) for each in (replace(options, shuffled=0.0), options))
        assert not any(spell(row) in text for row in mixed[10:].tolist())
        assert torch.equal(options.scored(mixed), plain[:10])

    def test_all_places_are_drawn_before_one_is_drawn_twice(self) -> None:
        windows = sample_windows("abcdefgh", LETTERS, CalibrationOptions(samples=6, length=3))
        assert sorted(map(spell, windows.tolist())) == ["abc", "bcd", "cde", "def", "efg", "fgh"]

    @given(st.lists(WORDS, min_size=1, max_size=6), st.integers(2, 5), st.integers(0, 99))
    def test_no_document_is_drawn_again_before_all_were(self, documents: list[str], length: int, seed: int) -> None:
        capitals = [f"{chr(65 + i)}{document}" for i, document in enumerate(documents)]
        places = [max(len(document) - length + 1, 0) for document in capitals]
        if not sum(places):
            return

        def tokenizer(texts: list[str], **_: Any) -> SimpleNamespace:  # 100 i + place in document i
            return SimpleNamespace(input_ids=[[100 * i + j for j in range(len(t))] for i, t in enumerate(texts)])

        options = CalibrationOptions(samples=sum(places), length=length, seed=seed)
        windows = sample_windows(capitals, cast(PreTrainedTokenizerBase, tokenizer), options)
        drawn = [int(token) // 100 for token in windows[:, 0]]
        assert sorted(windows[:, 0].tolist()) == [100 * i + j for i, n in enumerate(places) for j in range(n)]
        for count in range(len(drawn)):
            before = Counter(drawn[:count])
            assert all(before[drawn[count]] <= before[i] for i, n in enumerate(places) if before[i] < n)

    def test_another_seed_gives_other_windows(self) -> None:
        text = "abcdefghijklmnopqrstuvwxyz" * 20
        first, second = (sample_windows(text, LETTERS, CalibrationOptions(seed=seed, length=8)) for seed in (0, 1))
        assert not torch.equal(first, second)

    def test_short_documents_are_passed_over_and_the_others_drawn_evenly(self) -> None:
        documents = ["ab", "c" + "d" * 99, "e" * 400]
        # Windows at different places have the same letters here; what counts is the document.
        windows = sample_windows(documents, LETTERS, CalibrationOptions(samples=90, length=3))
        letters = [spell(row)[-1] for row in windows.tolist()]
        assert set(letters) == {"d", "e"}
        assert 30 <= letters.count("d") <= 60

    def test_only_the_first_characters_are_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(secateur.data.calibration, "MAX_CHARACTERS", 7)
        options = CalibrationOptions(samples=2, length=4)
        for text in ("aaaaabbzzzz", ["aaaaa", "bbzzzz", "zzzzzz"]):
            assert "z" not in "".join(map(spell, sample_windows(text, LETTERS, options).tolist()))

    def test_a_text_longer_than_the_context_is_no_reason_to_warn(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        tokenizer = letter_tokenizer()
        sample_windows("abc" * 50, tokenizer, CalibrationOptions(samples=2, length=20))
        assert caplog.text == ""
        tokenizer("abc" * 50)
        assert "longer than the specified maximum" in caplog.text

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (
                "",
                r"the calibration text has 0 tokens, but one window needs 4.*CalibrationOptions\(length=2, samples=1\)",
            ),
            ("abc", r"the calibration text has 3 tokens, .* shorter window: CalibrationOptions\(length=3, samples=1\)"),
            ([], r"the longest calibration document has 0 tokens, but one window needs 4"),
            (["ab", "abc"], r"the longest calibration document has 3 tokens, but one window needs 4"),
            ("abcde", r"tiny calibration text: 5 tokens hold 2 different windows of 4, but 3 samples.*\(samples=2\)"),
            (["abcd", "abc", "abcd"], r"tiny calibration text: 8 tokens hold 2 different windows of 4, but 3 samples"),
        ],
    )
    def test_too_little_text(self, text: str | list[str], match: str) -> None:
        with pytest.raises(DataError, match=match):
            sample_windows(text, LETTERS, CalibrationOptions(samples=3, length=4))

    def test_the_tokenizer_is_asked_for_no_special_tokens(self) -> None:
        asked: dict[str, Any] = {}

        def tokenizer(texts: list[str], **options: Any) -> SimpleNamespace:
            asked.update(options)
            return SimpleNamespace(input_ids=[[1, 2, 3] for _ in texts])

        sample_windows("abc", cast(PreTrainedTokenizerBase, tokenizer), CalibrationOptions(samples=1, length=3))
        assert asked["add_special_tokens"] is False
        assert LETTERS("a").input_ids == [0, 1]  # where the property test above would see them

    @pytest.mark.demo_model
    def test_the_demo_calibration(self, demo_tokenizer: PreTrainedTokenizerBase) -> None:
        windows = sample_windows(read_calibration("demo"), demo_tokenizer, CalibrationOptions())
        assert windows.shape == (64, 128)
        decoded = cast(str, demo_tokenizer.decode(windows[0, 1:-1]))
        assert decoded.strip("\ufffd") in demo_texts()[0]


def spell(row: list[int]) -> str:
    return "".join(chr(96 + token) for token in row)


class TestDigest:
    @given(st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=8))
    def test_it_depends_on_values_and_shape_alone(self, values: list[int]) -> None:
        tokens = torch.tensor([values, values])
        assert digest(tokens) == digest(tokens.T.contiguous().T)
        assert digest(tokens) != digest(tokens.flatten())
        changed = tokens.clone()
        changed[0, 0] += 1
        assert digest(tokens) != digest(changed)

    def test_it_never_changes(self) -> None:
        expected = "1ae380e7c104b3c4"
        assert digest(torch.tensor([[1, 2], [3, 4]]))[:16] == expected
        assert len(digest(torch.zeros(0, 4, dtype=torch.int64))) == 64
