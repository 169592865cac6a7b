"""Folders of ours that were damaged, exchanged or made to harm: each is told by name, or does no harm.

A mutation changes one thing in a folder that `save` wrote. Whatever reads the folder then gives an error of ours, of
one line, or the very same as before; `verify` always tells. The one exception is `load` where bytes of weights changed
in place, which only a hash of all of them can tell.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import secateur.checkpoint.save
from recipes import recipe
from secateur import SecateurError, prune_model, verify
from secateur.checkpoint.record import read_record
from secateur.cli.main import run
from secateur.errors import CheckpointError, ModelError
from secateur.files import PLAN_FILE, RECORD_FILE, write_json
from secateur.models.config import load_config
from secateur.models.loading import load
from secateur.models.manifest import CARD_FILE, MANIFEST_FILE, write_manifest
from secateur.models.tokenizer import load_tokenizer
from secateur.planning.plan import Plan, read_plan
from tiny import write_tiny

INDEX = "model.safetensors.index.json"
IDS = torch.arange(2 * 12).reshape(2, 12) % 300
CUTS: dict[str, dict[str, Any]] = {
    "uniform": {"score": "l2", "axes": ("mlp", "attention"), "scope": "local", "shape": "uniform", "ratio": 0.3},
    "layers": {"score": "l2", "axes": ("layers",), "scope": "local", "shape": "uniform", "ratio": 0.3},
    "free": {"score": "l2", "scope": "global", "shape": "per-layer", "ratio": 0.3},
    "sharded": {"score": "l2", "scope": "local", "shape": "uniform", "ratio": 0.3},
}


@dataclass(frozen=True)
class Whole:
    """A folder as it was written, and what its readers give."""

    folder: Path
    logits: Tensor
    plan: Plan


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    parent = tmp_path_factory.mktemp("whole")
    write_tiny(parent / "dense")
    (parent / "dense" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = {}
    for name, cut in CUTS.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "sharded":
                patch.setattr(secateur.checkpoint.save, "SHARD", "100KB")
            made = prune_model(
                recipe(str(parent / "dense"), cut={**cut, "repair": "none", "choose": "score"}), parent / name
            )
        found[name] = Whole(parent / name, logits_of(load(str(parent / name), device="cpu")), made.plan)
    assert (parent / "sharded" / INDEX).is_file()
    assert (parent / "free" / "modeling_per_layer.py").is_file()
    return found


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


# --- mutations --------------------------------------------------------------------------------------------------------

Mutation = Callable[[Path, random.Random], str | None]  # changes the folder; names the file, None where it cannot


def any_file(folder: Path, chance: random.Random, *, suffix: str = "") -> Path | None:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(suffix))
    return chance.choice(files) if files else None


def missing(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    assert path is not None
    path.unlink()
    return path.name


def truncated(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    assert path is not None
    os.truncate(path, chance.randrange(path.stat().st_size))
    return path.name


def emptied(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    assert path is not None
    os.truncate(path, 0)
    return path.name


def longer(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    assert path is not None
    path.write_bytes(path.read_bytes() + chance.choice([b" ", b"\0", b"x" * 1000]))
    return path.name


def flipped(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    assert path is not None
    raw = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 3)):
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)
    return path.name


def flipped_header(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance, suffix=".safetensors")
    assert path is not None
    raw = bytearray(path.read_bytes())
    raw[chance.randrange(8 + int.from_bytes(raw[:8], "little"))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)
    return path.name


def giant_header(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance, suffix=".safetensors")
    assert path is not None
    size = chance.choice([2**63, 2**64 - 1, 2**40, 10**8, path.stat().st_size])
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    return path.name


def a_folder(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    assert path is not None
    path.unlink()
    path.mkdir()
    return path.name


def a_pipe(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    assert path is not None
    path.unlink()
    os.mkfifo(path)
    return path.name


def a_dead_link(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    assert path is not None
    path.unlink()
    path.symlink_to("nowhere")
    return path.name


def other_json(folder: Path, chance: random.Random) -> str:
    path = any_file(folder, chance, suffix=".json")
    assert path is not None
    path.write_text(chance.choice(["[]", "{}", "3", '"x"', "null", "true", "NaN", "[" * 100_000, '{"a":' * 50_000]))
    return path.name


def odd_values() -> Iterator[Any]:
    nested: Any = []
    for _ in range(200):
        nested = [nested]
    yield from (None, True, -1, 0, 3, 10**9, 2**70, 1.5, 1e308, "", "x", "../../x", [], [1], {}, {"a": 1}, nested)


def edited(folder: Path, chance: random.Random) -> str | None:
    """Another value somewhere in a file of JSON."""
    path = any_file(folder, chance, suffix=".json")
    assert path is not None
    data = json.loads(path.read_text())
    before = copy.deepcopy(data)
    holder, key = data, None
    while isinstance(holder, (dict, list)) and holder:
        key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or chance.random() < 0.2:
            break
        holder = holder[key]
    if key is None:
        return None
    holder[key] = chance.choice(list(odd_values()))
    path.write_text(json.dumps(data))
    return path.name if data != before else None


def a_key_twice(folder: Path, chance: random.Random) -> str | None:
    path = any_file(folder, chance, suffix=".json")
    assert path is not None
    data = json.loads(path.read_text())
    key = chance.choice(list(data))
    path.write_text(f"{{{json.dumps(key)}: {chance.choice(['1', '[]', 'null'])}, {json.dumps(data)[1:]}")
    return path.name


def rewritten(change: Callable[[dict[str, Tensor], str], None]) -> Mutation:
    """A mutation of the tensors of a file of weights."""

    def mutate(folder: Path, chance: random.Random) -> str:
        path = any_file(folder, chance, suffix=".safetensors")
        assert path is not None
        weights = load_file(path)
        change(weights, chance.choice(sorted(weights)))
        save_file(weights, path, {"format": "pt"})
        return path.name

    return mutate


def fewer_rows(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = weights[name][:-1].contiguous()


def more_rows(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = torch.cat([weights[name], weights[name][:1]])


def half(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = weights[name].half()


def integers(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = weights[name].to(torch.int8)


def extra(weights: dict[str, Tensor], name: str) -> None:
    weights[f"{name}.extra"] = torch.zeros(3)


def lost(weights: dict[str, Tensor], name: str) -> None:
    del weights[name]


def renamed(weights: dict[str, Tensor], name: str) -> None:
    weights[f"{name}_"] = weights.pop(name)


def other_values(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = weights[name] + 1


def index_entry(*values: Any) -> Mutation:
    def mutate(folder: Path, chance: random.Random) -> str | None:
        if not (folder / INDEX).exists():
            return None
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][chance.choice(sorted(index["weight_map"]))] = chance.choice(values)
        (folder / INDEX).write_text(json.dumps(index))
        return INDEX

    return mutate


def exchanged(folder: Path, chance: random.Random) -> str | None:
    shards = sorted(folder.glob("*-of-*.safetensors"))
    if not shards:
        return None
    first, second = sorted(chance.sample(shards, 2))
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)
    return first.name


def added(name: str) -> Mutation:
    def mutate(folder: Path, chance: random.Random) -> str | None:
        if (folder / name).exists():
            return None
        weights = any_file(folder, chance, suffix=".safetensors")
        assert weights is not None
        content = {"tensors": weights.read_bytes(), "py": b"raise SystemExit('run')", "json": b"{}"}
        (folder / name).write_bytes(content.get(name.rpartition(".")[2], b"\x80\x04."))
        return name

    return mutate


MUTATIONS: dict[str, Mutation] = {
    "a missing file": missing,
    "a truncated file": truncated,
    "an emptied file": emptied,
    "a longer file": longer,
    "flipped bits": flipped,
    "flipped bits of a header": flipped_header,
    "a giant header": giant_header,
    "a folder for a file": a_folder,
    "a pipe for a file": a_pipe,
    "a dead link for a file": a_dead_link,
    "JSON of another type": other_json,
    "an edited value": edited,
    "a key that stands twice": a_key_twice,
    "fewer rows": rewritten(fewer_rows),
    "more rows": rewritten(more_rows),
    "half precision": rewritten(half),
    "integers": rewritten(integers),
    "an extra tensor": rewritten(extra),
    "a lost tensor": rewritten(lost),
    "a renamed tensor": rewritten(renamed),
    "other values": rewritten(other_values),
    "a cyclic index": index_entry(INDEX, "config.json", ""),
    "a path in the index": index_entry("../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors"),
    "no name in the index": index_entry(None, 3, [], {"a": 1}, True),
    "an exchanged shard": exchanged,
    "added weights": added("model-00009-of-00009.safetensors"),
    "an added pickle": added("pytorch_model.bin"),
    "an added adapter": added("adapter_config.json"),
    "added code": added("modeling_evil.py"),
    "an added map of tokens": added("special_tokens_map.json"),
}
IN_PLACE = {"flipped bits", "other values"}  # bytes of weights that no header tells


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """A reader that waits for a pipe, or builds a billion layers, is stopped."""
    signal.alarm(240)
    yield
    signal.alarm(0)


def told(reader: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a reader gives, or its error; any that is not ours, or longer than a line, fails the test."""
    found, error = None, None
    try:
        found = reader()
    except SecateurError as caught:
        error = str(caught)
    assert error is None or (error and "\n" not in error)
    return found, error


def check_damaged(whole: Whole, folder: Path, mutation: str, name: str) -> None:
    """Hold every reader of a folder in which the file `name` was changed to what the top of this file says."""
    found, error = told(lambda: verify(folder))
    if name == MANIFEST_FILE:
        written, now = ((each / name) for each in (whole.folder, folder))
        same = now.is_file() and now.read_bytes().strip() == written.read_bytes().strip()  # white space says nothing
        assert same or error is not None or found.problems or found.files != verify(whole.folder).files
    else:
        assert error is None, error
        assert any(problem.startswith(name) for problem in found.problems), found.problems
    model, error = told(lambda: load(str(folder), device="cpu"))
    if error is not None:
        assert name in error or name == MANIFEST_FILE
    elif not (mutation in IN_PLACE and name.endswith(".safetensors")):
        assert torch.equal(logits_of(model), whole.logits)
    config, error = told(lambda: load_config(str(folder)))
    assert name in error if error else settings_of(config) == settings_of(load_config(str(whole.folder)))
    tokenizer, error = told(lambda: load_tokenizer(str(folder)))
    text = "a cat sat on the log 123 <end>"
    if error is not None:
        assert name in error
    else:
        assert tokenizer(text).input_ids == load_tokenizer(str(whole.folder))(text).input_ids
    plan, error = told(lambda: read_plan(folder / PLAN_FILE))
    assert name in error if error else plan == whole.plan
    record, error = told(lambda: read_record(folder))
    assert name in error if error else record in (None, read_record(whole.folder))
    assert record is not None or error is not None or name == RECORD_FILE


def check_anybodys(folder: Path) -> None:
    """Without a manifest the folder is anybody's: readers may find nothing wrong, but they fail in one line."""
    for reader in (load, load_config, load_tokenizer):
        options = {"device": "cpu"} if reader is load else {}
        told(lambda reader=reader, options=options: reader(str(folder), **options))  # type: ignore[misc]
    told(lambda: read_plan(folder / PLAN_FILE))
    told(lambda: read_record(folder))


def mutate(whole: Whole, folder: Path, mutation: str, seed: str) -> str | None:
    """A copy of a whole folder with one change; the changed file, or None where this change cannot be made."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.folder, folder)
    name = MUTATIONS[mutation](folder, random.Random(seed))
    if name is not None and (whole.folder / name).is_file() and (folder / name).is_file():
        return name if (folder / name).read_bytes() != (whole.folder / name).read_bytes() else None
    return name


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_damaged_is_told(mutation: str, wholes: dict[str, Whole], tmp_path: Path) -> None:
    kinds = [kind for kind in wholes if mutate(wholes[kind], tmp_path / "x", mutation, "0") is not None]
    kind = random.Random(mutation).choice(kinds)
    name = mutate(wholes[kind], tmp_path / "x", mutation, "0")
    assert name is not None
    check_damaged(wholes[kind], tmp_path / "x", mutation, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_whatever_is_damaged_is_told(mutation: str, kind: str, wholes: dict[str, Whole], tmp_path: Path) -> None:
    for seed in range(6):
        name = mutate(wholes[kind], tmp_path / "x", mutation, f"{kind} {seed}")
        if name in (None, CARD_FILE):  # which may be edited
            continue
        check_damaged(wholes[kind], tmp_path / "x", mutation, name)
        if (tmp_path / "x" / MANIFEST_FILE).is_file():
            (tmp_path / "x" / MANIFEST_FILE).unlink()
            check_anybodys(tmp_path / "x")


@pytest.mark.parametrize(
    "mutation", ["an edited value", "JSON of another type", "a path in the index", "a lost tensor"]
)
def test_anybodys_folder_fails_in_one_line(mutation: str, wholes: dict[str, Whole], tmp_path: Path) -> None:
    for seed in range(3):
        kind = random.Random(f"{mutation} {seed}").choice(sorted(wholes))
        if mutate(wholes[kind], tmp_path / "x", mutation, f"{seed}") is None:
            continue
        if (tmp_path / "x" / MANIFEST_FILE).is_file():
            (tmp_path / "x" / MANIFEST_FILE).unlink()
            check_anybodys(tmp_path / "x")


# --- what verify says -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(wholes: dict[str, Whole], tmp_path: Path) -> Path:
    return shutil.copytree(wholes["uniform"].folder, tmp_path / "out")


def rewrite(file: Path, change: Callable[[Any], object]) -> None:
    """Change a file of JSON, and the manifest with it, as if that were what was written."""
    data = json.loads(file.read_text())
    change(data)
    write_json(file, data)
    write_manifest(file.parent)


@pytest.mark.parametrize("kind", CUTS)
def test_a_whole_folder(kind: str, wholes: dict[str, Whole]) -> None:
    found = verify(wholes[kind].folder)
    assert found.problems == ()
    assert found.built
    assert {file.name for file in found.files} == {path.name for path in wholes[kind].folder.iterdir()} - {
        MANIFEST_FILE,
        CARD_FILE,
    }
    assert found.tensors == sum(len(load_file(path)) for path in wholes[kind].folder.glob("*.safetensors"))
    assert all(file.bytes == (wholes[kind].folder / file.name).stat().st_size for file in found.files)
    json.dumps(found.to_json())


def test_files_that_no_loader_reads_may_be_added(folder: Path) -> None:
    (folder / "NOTES.md").write_text("of mine")
    (folder / ".gitattributes").touch()
    (folder / "results.json").write_text("{}")
    assert verify(folder).problems == ()


def test_parts_that_do_not_fit_together(folder: Path, wholes: dict[str, Whole]) -> None:
    """A manifest that fits the files does not help files that do not fit each other."""
    rewrite(folder / PLAN_FILE, lambda data: data["settings"].update(intermediate_size=1))
    (problem,) = verify(folder).problems
    assert re.fullmatch(r"secateur_plan\.json says intermediate_size=1, config\.json \d+", problem)
    shutil.copy(wholes["uniform"].folder / PLAN_FILE, folder)
    rewrite(folder / PLAN_FILE, lambda data: data["parameters"].update(pruned=7))
    (problem,) = verify(folder).problems
    assert re.fullmatch(r"secateur_plan\.json says 7 parameters, the weights have \d+", problem)
    rewrite(folder / PLAN_FILE, lambda data: data.update(settings=None, refusal="no"))
    assert "says that no stock config holds the cut (no), config.json is one" in verify(folder).problems[0]
    rewrite(folder / PLAN_FILE, lambda data: data.update(format=99))
    assert "secateur_plan.json: the plan has format 99" in verify(folder).problems[0]
    shutil.copy(wholes["uniform"].folder / PLAN_FILE, folder)
    rewrite(folder / RECORD_FILE, lambda data: data.update(seed="x"))
    assert "secateur_record.json is damaged (seed: 'x' is no int)" in verify(folder).problems[0]
    shutil.copy(wholes["uniform"].folder / RECORD_FILE, folder)
    rewrite(folder / "config.json", lambda data: data.update(num_hidden_layers=2))
    assert any("config.json describes a model without model.layers.2" in problem for problem in verify(folder).problems)
    rewrite(folder / "config.json", lambda data: data.update(num_hidden_layers=3, intermediate_size=30))
    assert "the checkpoint has another shape for" in verify(folder).problems[0]


def test_custom_code_is_hashed_and_not_run(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('run')")
    rewrite(folder / "config.json", lambda data: data.update(model_type="own", auto_map={"AutoConfig": "own.Config"}))
    found = verify(folder)
    assert (found.problems, found.built) == ((), False)
    (folder / "own.py").write_text("raise SystemExit('RUN')")
    assert verify(folder).problems[0].startswith("own.py has other bytes than were written")
    with pytest.raises(ModelError, match=r"own\.py has other bytes|custom code"):
        load(str(folder), device="cpu", trust_remote_code=False)


def test_code_is_compared_before_it_runs(wholes: dict[str, Whole], tmp_path: Path) -> None:
    folder = shutil.copytree(wholes["uniform"].folder, tmp_path / "own")
    (folder / "own.py").write_text("from transformers import LlamaForCausalLM as Own")
    rewrite(folder / "config.json", lambda data: data.update(auto_map={"AutoModelForCausalLM": "own.Own"}))
    (folder / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(ModelError, match=r"own\.py has \d+ bytes"):
        load(str(folder), device="cpu", trust_remote_code=True)


def test_what_cannot_be_verified(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is no folder; name one that `secateur prune MODEL OUT` wrote"):
        verify(tmp_path / "nowhere")
    (folder / MANIFEST_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=rf"out: {MANIFEST_FILE} cannot be read"):
        verify(folder)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"out has no {MANIFEST_FILE}, so there is nothing to compare it with"):
        verify(folder)
    write_json(folder / MANIFEST_FILE, {"format": 1, "files": {}})
    assert f"{MANIFEST_FILE} lists no weights" in verify(folder).problems


class TestCommand:
    @pytest.fixture(autouse=True)
    def place(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder.parent)

    def test_a_whole_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["verify", "out", "--json", "v.json"]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert "whole: 30 tensors in 9 files, and the model of its config has these tensors" in shown.out
        found = json.loads(Path("v.json").read_text())
        assert (found["problems"], found["built"], len(found["files"])) == ([], True, 9)
        assert run(["verify", "out", "--quiet"]) == 0
        assert capsys.readouterr() == ("", "")

    def test_a_damaged_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        os.truncate("out/tokenizer.json", 7)
        os.truncate("out/model.safetensors", 1000)
        assert run(["verify", "out", "--json", "v.json"]) == 2
        shown = capsys.readouterr()
        assert "no: is truncated or not a safetensors file" in shown.out
        assert "no: has 7 bytes" in shown.out
        assert re.fullmatch(
            r"secateur: error: out: model\.safetensors is truncated .* \(and 1 more\); copy it again, or prune again\n",
            shown.err,
        )
        assert len(json.loads(Path("v.json").read_text())["problems"]) == 2

    def test_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["verify", "nowhere"]) == 2
        assert capsys.readouterr().err.startswith("secateur: error: nowhere is no folder")


def test_sizes_for_engines_that_are_not_those_of_the_weights(wholes: dict[str, Whole], tmp_path: Path) -> None:
    folder = shutil.copytree(wholes["free"].folder, tmp_path / "out")

    def widen(config: dict[str, Any]) -> None:
        layer = next(each for each in config["per_layer_config"].values() if "intermediate_size" in each)
        layer["intermediate_size"] += 1

    rewrite(folder / "config.json", widen)
    (problem,) = verify(folder).problems
    assert re.match(r"config\.json says \{.*\} of layer \d+ \(per_layer_config\), its weights \{", problem)
    rewrite(folder / "config.json", lambda config: config.pop("per_layer_config"))
    (problem,) = verify(folder).problems
    assert problem.startswith("config.json says None of layer 0")
