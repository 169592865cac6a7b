"""Text is read as documented, and what is wrong with a file is said."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    PreTrainedTokenizerBase,
)

from letters import LETTERS, letter_tokenizer, spell
from secateur.data.calibration import CalibrationOptions
from secateur.data.overlap import overlap
from secateur.data.text import demo_texts, plain_rows, read_calibration, read_rows
from secateur.data.windows import calibration_windows
from secateur.errors import DataError


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
        assert demo_texts.__wrapped__() == (topics["c"], f"{topics['b']}\n\nfourth")

    def test_a_text_of_two_names_counts_at_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        topics = {"d": "two", "a": "one", "b": "two", "c": "three", "e": "five"}
        monkeypatch.setattr("pydoc_data.topics.topics", topics)
        assert demo_texts.__wrapped__() == ("one\n\nthree\n\nfive", "two")


class TestRows:
    @pytest.mark.parametrize(
        ("text", "rows"),
        [
            (" \n = Title = \n \n A line . \n \n", ["", " = Title = \n", "", " A line . \n", ""]),
            (" \n = Title = \n\n A line . \n", ["", " = Title = \n", "", " A line . \n"]),
            (" one line \n another \n", ["one line", "another"]),
            (" one line \n another ", ["one line", "another"]),
            (" one line \r\n another \r\n", ["one line", "another"]),
            (" one line \n another\n", [" one line \n another\n"]),
            (" one line \nanother \n", [" one line \nanother \n"]),
            ("a\n\nb", ["a\n\nb"]),
            ("a\r\n\r\nb\r\n", ["a\n\nb\n"]),
            ("\ufeffa\nb\n", ["a\nb\n"]),
            ("a\u2028b\x0cc\n", ["a\u2028b\x0cc\n"]),
            (" a\u2028b\x0cc \n", ["a\u2028b\x0cc"]),
        ],
    )
    def test_plain_text(self, text: str, rows: list[str], tmp_path: Path) -> None:
        for name in ("x.txt", "x.raw", "x.md", "x"):
            assert read_rows(write(tmp_path, name, text)) == rows

    @given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))), st.booleans())
    def test_only_spaced_lines_are_rows(self, lines: list[str], blank: bool) -> None:
        spaced = [f" x{line} \n" for line in lines]
        text = "".join(spaced if not blank else [" \n", *spaced])
        assert plain_rows(text) == (["", *spaced] if blank else [line.strip() for line in spaced])
        for prose in (f"x\n{text}", f"{text} x\n", f"x{text}"):
            assert plain_rows(prose) == [prose]

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
            ("x.jsonl", '{"text": "a"}\n\n["b"]', r"line 3: a JSON list is no row\. Expected an object"),
            ("x.jsonl", '{"text": 1}', r"line 1: its 'text' is of type int, not a text\. Expected a string, or a list"),
            ("x.jsonl", '{"text": "a"}\n{"text', r"line 2: not JSON \(.*\)\. Expected one object a line"),
            (
                "x.json",
                '[{"text": "a"}, {"body": "b"}]',
                r"x\.json', item 2: no column 'text' among \['body'\]",
            ),
            ("x.jsonl", "[" * 100_000, "line 1: not JSON"),
            ("x.json", "[" * 100_000, "line 1: not JSON"),
            ("x.json", "7", r"item 1: a JSON int is no row"),
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
        for function in (read_rows, read_calibration):
            with pytest.raises(DataError, match=match):
                function(file)

    def test_a_folder_without_text(self, tmp_path: Path) -> None:
        write(tmp_path, "rows.jsonl", '{"text": "a"}')
        write(tmp_path, ".hidden", "a")
        write(tmp_path, "empty.py", " \n")
        write(tmp_path, "picture.png", b"\x89PNG\xff")
        with pytest.raises(DataError, match=r"there is no text file in this folder.*one by one"):
            read_calibration(tmp_path)

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
        with pytest.raises(
            DataError, match=r"reading Parquet needs the package pyarrow\. Run: pip install 'secateur\[data\]'"
        ):
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
        assert read_calibration("demo") == [demo_texts()[0]]

    def test_plain_text_stays_as_it_is(self, tmp_path: Path) -> None:
        file = write(tmp_path, "x.txt", "\ufeff a \n\n b\n")
        assert read_calibration(file) == [" a \n\n b\n"]

    def test_documents_are_kept_apart(self, tmp_path: Path) -> None:
        file = write(tmp_path, "x.jsonl", '{"text": "a"}\n{"text": "b"}\n')
        assert read_calibration(file) == ["a", "b"]

    def test_a_folder_is_a_document_of_each_text_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "sources"
        (folder / "package" / ".cache").mkdir(parents=True)
        written = {f"package/{number}.py": f"x = {number}" for number in range(9)} | {"README": "Read."}
        for name, text in (written | {"package/.cache/a.py": "hidden", "rows.json": "{}"}).items():
            write(folder, name, text)
        documents = read_calibration(folder)
        assert sorted(documents) == sorted(written.values())
        assert documents == read_calibration(str(folder))
        assert [*documents] != sorted(documents)  # the first, as many as are read, are of all parts
        assert len(read_calibration(folder, characters=12)) == 3

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
        with pytest.raises(DataError, match=rf"{file.name}', (line|item|row) 1: no column 'bdy' among {found}"):
            read_calibration(file, column="bdy")

    def test_one_without_text(self, file: Path) -> None:
        with pytest.raises(DataError, match=r"(line|item|row) 1: its 'id' is of type int, not a text"):
            read_calibration(file, column="id")

    def test_instructions_are_read_as_one_text(self, tmp_path: Path) -> None:
        rows = [
            {"instruction": "a", "input": "b", "output": "c"},
            {"question": "a", "input": None, "answer": "c"},
            {"text": "d", "prompt": "a", "answer": "c"},
        ]
        file = write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))
        assert read_calibration(file) == ["a\n\nb\n\nc", "a\n\nc", "d"]
        tokenizer = letter_tokenizer()
        tokenizer.chat_template = TestChat.TEMPLATE
        assert read_calibration(file, chat=tokenizer)[:2] == ["<user>a\n\nb<assistant>c", "<user>a<assistant>c"]
        with pytest.raises(DataError, match=r"line 1: its 'prompt' is of type int, not a text\."):
            read_calibration(write(tmp_path, "x.jsonl", '{"prompt": 1, "answer": "a"}'))

    def test_no_column_of_text(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no column 'text' among \['a'\]\. Expected an object with a text"):
            read_calibration(write(tmp_path, "x.jsonl", '{"a": 1}'))

    def test_it_is_that_of_the_sources_that_have_it(self, tmp_path: Path) -> None:
        texts = {"x.txt": "abc", "x.jsonl": '{"body": "xyz", "text": "abc"}', "y.jsonl": '{"text": "def"}'}
        names = [str(write(tmp_path, name, text)) for name, text in texts.items()]
        options = CalibrationOptions(names, samples=3, length=3, column="body")
        assert [spell(row) for row in calibration_windows(LETTERS, options).tolist()] == ["abc", "xyz", "def"]
        with pytest.raises(DataError, match=r"no column 'bdy' among \['body', 'text'\]"):
            calibration_windows(LETTERS, replace(options, text=names[1:], column="bdy"))

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
        assert read_calibration(write(tmp_path, "x.txt", "a\nb"), chat=tokenizer) == ["<user>a\nb"]

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


class TestDataSet:
    """With a stand-in for the package `datasets`, which has its way to the hub only."""

    @pytest.fixture
    def datasets(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        module = ModuleType("datasets")
        module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return module

    def test_its_train_split_is_read_as_far_as_needed(self, datasets: ModuleType) -> None:
        def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
            assert config is None
            assert (name, split, streaming) == ("organisation/name", "train", True)
            while True:
                yield {"text": "abc"}

        datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
        assert read_calibration("organisation/name", characters=10) == ["abc"] * 4

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
            DataError,
            match=r"^'name': no such file, and no data set .*not in the cache, and HF_HUB_OFFLINE is set[^\n]+$",
        ):
            read_calibration("name")

    def test_a_file_of_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []
        (tmp_path / "part.jsonl").write_text('{"text": "from the hub"}')

        def download(name: str, file: str, **options: object) -> str:
            asked.append((name, file, options["repo_type"], options["revision"]))
            return str(tmp_path / "part.jsonl")

        monkeypatch.setattr("secateur.data.documents.hf_hub_download", download)
        assert read_calibration("hf://datasets/owner/name/sub/part.jsonl") == ["from the hub"]
        assert read_calibration("hf://datasets/owner/name@v1/part.jsonl") == ["from the hub"]
        assert read_rows("hf://datasets/owner/name/part.jsonl") == ["from the hub"]
        assert asked[:2] == [
            ("owner/name", "sub/part.jsonl", "dataset", None),
            ("owner/name", "part.jsonl", "dataset", "v1"),
        ]

    def test_a_file_of_one_without_network(self) -> None:
        for uri, match in {
            "hf://datasets/owner/name/a.jsonl": "the file cannot be read; it is not in the cache, and HF_HUB",
            "hf://owner/name/a.txt": "expected a file of a data set, hf://datasets/OWNER/NAME/FILE",
        }.items():
            with pytest.raises(DataError, match=rf"^'{uri}': {match}[^\n]+$"):
                read_calibration(uri)
