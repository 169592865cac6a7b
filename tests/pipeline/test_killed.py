"""Commands that are killed with kill -9 or meet a full disk: nothing half-written has the name of an output."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kills import Commands, Moment, after, commands, contents, partial, while_writing
from secateur import verify
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from tiny import names, write_tiny

TEXT = "a cat and a dog and a bird sat on a log and sang\n" * 60
CUT = "--calibration in/text.txt --samples 4 --length 16 --resume --quiet"

# Every limit of the size of a file, one after the other: the kernel refuses to let a file grow beyond it.
LIMITED = """
import resource, signal, sys
import secateur.cli.main
from secateur import *  # before the first limit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in sys.argv[1].split(","):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
    print(secateur.cli.main.run(sys.argv[2:]))
"""
FULL = """
set -e
mount -t tmpfs -o size=$1 tmpfs here
cp -r in/old here/out
shift
"$@" || status=$?
echo "status $status"
rm -f here/out/.keep
diff -r in/old here/out && echo unchanged
ls -A here
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to write in, with the model and the text elsewhere."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "in" / "tiny")
    (tmp_path / "in" / "text.txt").write_text(TEXT)
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def prune(*more: str) -> list[str]:
    return ["prune", "in/tiny", "here/out", *CUT.split(), *more]


def check_whole(out: Path, whole: dict[str, bytes]) -> None:
    """What has the name of the output is the output."""
    found = contents(out)
    assert found is None or found == whole
    if found is not None and out.is_dir():
        assert verify(out).problems == ()
        load(str(out), device="cpu")
        load_tokenizer(str(out))


def check_kills(run: Commands, arguments: list[str], out: Path, moments: Iterator[Moment], kills: int) -> int:
    """Kill a command so often, and run the same again each time; how often it was killed while it wrote."""
    whole = contents(out)
    assert whole is not None
    beside = names(out.parent)
    killed = writing = 0
    for moment in itertools.islice(moments, 3 * kills):  # some come to their end before their moment
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        hit = run.kill(arguments, moment)
        killed += hit
        writing += hit and bool(partial(out))
        check_whole(out, whole)
        if not out.exists():
            run.run(arguments)
        assert contents(out) == whole
        assert names(out.parent) == beside
        if killed == kills:
            return writing
    pytest.fail(f"only {killed} of {kills} kills came in time")


def kill_anywhere_and_while_writing(arguments: list[str], out: Path, kills: int) -> None:
    """Kill a command as often anywhere in its run as after some files of its output are there under another name."""
    run, chance = commands(), random.Random(0)
    run.run(arguments)
    seconds = run.run([*arguments, "--overwrite"])
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    run.run(arguments)
    files = len(contents(out) or {}) // 2
    anywhere = (after(seconds * chance.uniform(0, 1)) for _ in itertools.count())
    writing = (while_writing(out, chance.randint(0, files)) for _ in itertools.count())
    check_kills(run, arguments, out, anywhere, kills)
    assert check_kills(run, arguments, out, writing, kills) > 0


@pytest.mark.slow
def test_a_killed_prune_leaves_no_half_folder_and_resumes_to_the_same_bytes(place: Path) -> None:
    kill_anywhere_and_while_writing(prune(), Path("here/out"), 4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("out.gguf", "--gguf f16 --no-check"), ("out", "--int8 --dynamic")])
def test_a_killed_export_leaves_no_half_output(name: str, options: str, place: Path) -> None:
    if "--int8" in options:
        pytest.importorskip("torchao", reason="int8 folders need torchao")
    write_tiny(Path("in/deep"), num_hidden_layers=24)
    out = place.relative_to(Path.cwd()) / name
    kill_anywhere_and_while_writing(["export", "in/deep", str(out), *options.split(), "--quiet"], out, 3)


@pytest.mark.slow
def test_what_is_to_be_replaced_is_never_missing(place: Path) -> None:
    """Until the new folder is whole the old one is there, and then the new one is."""
    out, run = Path("here/out"), commands()
    run.run(prune("--ratio", "0.1"))
    old = contents(out)
    shutil.move(out, "in/old")
    shutil.copytree("in/old", out)
    run.run(prune("--overwrite"))
    new = contents(out)
    assert old is not None
    assert new is not None
    writing = 0
    for files in (0, len(new) // 2, len(new) - 1, len(new)):
        shutil.rmtree(out)
        shutil.copytree("in/old", out)
        run.kill(prune("--overwrite"), while_writing(out, files))
        writing += bool(partial(out))
        assert contents(out) in (old, new)
        run.run(prune("--overwrite"))
        assert contents(out) == new
        assert [name for name in names(place) if "/" not in name] == ["out"]
    assert writing >= 2


@pytest.mark.slow
def test_a_file_that_cannot_grow_leaves_the_old_state(place: Path) -> None:
    commands().run(prune("--ratio", "0.1"))
    old = contents(Path("here/out"))
    assert old is not None
    sizes = sorted({len(content) for content in old.values()})
    limits = [0, *(size - 1 for size in sizes[::6]), sizes[-1] - 1]
    arguments = ["prune", "in/tiny", "here/out", *CUT.split(), "--overwrite", "--ratio", "0.12"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, ",".join(map(str, limits)), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = done.stdout.split()
    assert len(codes) == len(limits)
    assert set(codes) <= {"0", "2"}
    assert codes.count("2") >= len(limits) - 2
    errors = done.stderr.splitlines()
    assert len(errors) == codes.count("2")
    for error in errors:
        assert error.startswith("secateur: error: ")
        assert "cannot be written" in error or "cannot be kept" in error
    found = contents(Path("here/out"))
    assert found == old if "0" not in codes else verify("here/out").problems == ()
    # What was done before the disk was full may be kept, and nothing else.
    assert {name for name in names(place) if "/" not in name} - {".out.secateur"} == {"out"}


@pytest.mark.slow
@pytest.mark.parametrize("room", [40_000, 250_000])
def test_a_full_disk_leaves_the_old_state(room: int, place: Path) -> None:
    """A file system with that much room beside the old folder, in a namespace of its own; the second holds weights."""
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("this system lets no one mount a file system of his own")
    commands().run(prune("--ratio", "0.1"))
    shutil.move("here/out", "in/old")
    pages = sum(-(-path.stat().st_size // 4096) + 1 for path in Path("in/old").iterdir())
    command = [sys.executable, "-m", "secateur", "prune", "in/tiny", "here/out", *CUT.split(), "--overwrite"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL, "sh", str(pages * 4096 + room), *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(place.parent)},
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert (told[:2], {*told[2:]} - {".out.secateur"}) == (["status 2", "unchanged"], {"out"})
    assert done.stderr.startswith("secateur: error: ")
    error, _, kept = done.stderr.strip().partition("; ")
    assert ("are free on its disk" if room < 100_000 else "No space left on device") in error or "os error 28" in error
    assert kept.endswith("go on with --resume (resume=True)") if ".out.secateur" in told else kept == ""
    assert done.stderr.count("\n") == 1
