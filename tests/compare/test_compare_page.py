"""The page of `secateur compare` in Chromium: both answer, a plan is downloaded, nothing leaves the machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from browser import CHROMIUM, browser
from secateur.cli.main import run
from secateur.compare import HERE
from secateur.compare.compare import free_port
from secateur.compare.models import load_sides
from secateur.compare.page import build_page
from secateur.compare.plan_tab import Planner
from secateur.evaluation.inference import sample_text
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from tiny import write_tiny

PROMPT = "The for statement is used to iterate over the"
PATIENCE = 60_000  # milliseconds: the machine may be busy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]

# Put on the path of the server's process: the addresses that it connects to or looks up are written to a file.
WATCHER = """
import os, signal, socket
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def watched(name, owner):
    original = getattr(owner, name)
    def call(*arguments, **options):
        with open(os.environ["CONNECTIONS"], "a") as file:
            print(repr(arguments[name == "connect"]), file=file)
        return original(*arguments, **options)
    setattr(owner, name, call)
watched("connect", socket.socket)
watched("getaddrinfo", socket)
"""


@dataclass
class Served:
    """A page that is served by a process of its own."""

    process: subprocess.Popen[str]
    url: str
    connections: Path
    errors: Path
    requests: list[str] = field(default_factory=list)  # of all pages that tests open


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    shelf = tmp_path_factory.mktemp("shelf")
    return write_tiny(shelf / "a", seed=3), write_tiny(shelf / "b", seed=4, num_hidden_layers=2)


@pytest.fixture(scope="module")
def served(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The command, started as a user starts it, when its page can be opened."""
    folder = tmp_path_factory.mktemp("served")
    connections, errors = folder / "connections", folder / "errors"
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text(WATCHER)
    path = os.pathsep.join([str(folder / "path"), str(Path(__file__).parents[2] / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "CONNECTIONS": str(connections)}
    environment.pop("HF_HUB_OFFLINE", None)  # as a user has it
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *"-m secateur compare --port 0 --samples 4 --length 32".split(), *map(str, folders)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            cwd=folder,
        )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"open (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)", line):
            page = Served(process, found[1], connections, errors)
            yield page
            process.kill()
            process.communicate()
            asked = connections.read_text().splitlines() if connections.exists() else []
            assert [line for line in asked if "127.0.0.1" not in line and "localhost" not in line] == []
            requests = {urlsplit(url).netloc for url in page.requests if not url.startswith(("data:", "blob:"))}
            assert requests <= {urlsplit(page.url).netloc}
            break
    else:
        pytest.fail(errors.read_text())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture
def page(chromium: Any, served: Served) -> Iterator[Any]:
    context = chromium.new_context(accept_downloads=True, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    opened.on("request", lambda request: served.requests.append(request.url))
    opened.goto(served.url)
    opened.wait_for_selector("#ask")
    yield opened
    context.close()


def ask(page: Any, prompt: str) -> None:
    page.fill("#prompt textarea", prompt)
    page.click("#ask")


def wait_for_end(page: Any) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_contain_text("A ended: length; B ended: length", timeout=PATIENCE)


def set_number(page: Any, name: str, value: float) -> None:
    """Type a number beside a slider, and leave the field, as a person does."""
    number = page.locator(f"#{name} input[type=number]")
    number.fill(str(value))
    number.press("Tab")


def answers_on(page: Any) -> tuple[str, str]:
    return page.input_value("#answer-a textarea"), page.input_value("#answer-b textarea")


def test_both_answer_as_without_the_page(page: Any, folders: tuple[Path, Path]) -> None:
    set_number(page, "length", 20)
    ask(page, PROMPT)
    wait_for_end(page)
    assert answers_on(page) == tuple(
        # a browser shows carriage returns as ends of lines
        re.sub(r"\r\n?", "\n", sample_text(load(str(f), device="cpu"), load_tokenizer(str(f)), PROMPT, new_tokens=20))
        for f in folders
    )
    for letter in "ab":
        assert re.search(r"[\d.]+ tokens/s, .* 20 written", page.inner_text(f"#speed-{letter}"))


def test_answers_stream_until_stop_or_until_the_browser_is_closed(
    chromium: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """In this process, with models that take their time, so that what they do can be counted."""
    from playwright.sync_api import expect

    sides = load_sides([str(folder) for folder in folders])
    passes: list[int] = []

    def slow(*_: Any) -> None:
        passes.append(1)
        time.sleep(0.1)

    for side in sides:
        side.model.register_forward_hook(slow)
    port = free_port(HERE, 0)
    served = build_page(sides, Planner(tmp_path), plans=tmp_path)
    served.launch(server_name=HERE, server_port=port, quiet=True, prevent_thread_lock=True)
    try:
        context = chromium.new_context()
        opened = context.new_page()
        opened.goto(f"http://{HERE}:{port}")
        set_number(opened, "length", 220)
        for end in ("#stop", None):
            passes.clear()
            ask(opened, PROMPT)
            expect(opened.locator("#speed-b")).to_contain_text("4 written", timeout=PATIENCE)
            assert opened.input_value("#answer-b textarea")
            if end is None:
                context.close()
            else:
                opened.click(end)
                expect(opened.locator("#status")).to_contain_text("Stopped.", timeout=PATIENCE)
            time.sleep(2)
            stopped = len(passes)
            time.sleep(1)
            assert len(passes) == stopped < 200  # of 440
    finally:
        served.close(verbose=False)


def test_a_prompt_that_cannot_be_answered_is_an_error_on_the_page(page: Any) -> None:
    from playwright.sync_api import expect

    ask(page, "word " * 300)
    expect(page.locator(".toast-body")).to_contain_text("reads 256 tokens at most", timeout=PATIENCE)


def test_a_plan_follows_the_slider_and_is_one_that_prune_takes(
    page: Any, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from playwright.sync_api import expect

    page.get_by_role("tab", name="Plan a cut").click()
    expect(page.locator("#plan-status")).to_contain_text("Sizes only")
    set_number(page, "plan-ratio", 0.95)
    expect(page.locator("#plan-status")).to_contain_text("leaves")  # why it cannot be made
    set_number(page, "plan-ratio", 0.4)
    expect(page.locator("#plan-sizes")).to_contain_text(re.compile(r"(39|40)\.\d\d%"))
    expect(page.locator("#download")).to_be_disabled()
    page.click("#choose")
    expect(page.locator("#plan-status")).to_contain_text("Units chosen by the score", timeout=PATIENCE)
    with page.expect_download() as download:
        page.click("#download")
    plan = tmp_path / download.value.suggested_filename
    download.value.save_as(plan)
    planned = json.loads(plan.read_text())
    assert planned["options"]["ratio"] == 0.4
    assert run(["prune", str(folders[0]), str(tmp_path / "out"), "--plan", str(plan), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    pruned = load(str(tmp_path / "out"), device="cpu")
    assert sum(parameter.numel() for parameter in pruned.parameters()) == planned["parameters"]["pruned"]


def test_it_fits_a_phone(chromium: Any, served: Served) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 900}, color_scheme="dark")
    opened = context.new_page()
    opened.goto(served.url)
    opened.wait_for_selector("#ask")
    assert opened.evaluate("document.documentElement.scrollWidth") == 390
    context.close()


def test_ctrl_c_ends_it(served: Served, page: Any) -> None:
    """Last in this file; that no request of any test left the machine is looked at when all are done."""
    ask(page, "Where does this go?")
    wait_for_end(page)
    page.close()
    assert served.requests
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(timeout=60) == 130
    assert served.errors.read_text().endswith("secateur: interrupted\n")
