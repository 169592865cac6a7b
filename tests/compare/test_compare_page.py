"""The page of `secateur compare` in headless Chromium: asking, planning, downloading; people at the same time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from secateur.cli.main import run
from secateur.compare.cuts import Workplace
from secateur.compare.page import build_page
from secateur.compare.server import bind, quiet_gradio, server_config, url_of
from secateur.compare.sides import load_sides
from secateur.evaluation.inference import sample_text
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from tiny import write_tiny

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PROMPT = "The for statement is used to iterate over the"
ENDED = re.compile(r"has the length asked for|came to its end|was stopped|failed")
SETTLED = """() => Promise.all(document.getAnimations()
    .filter(each => each.effect.getTiming().iterations !== Infinity).map(each => each.finished.catch(() => 0)))"""
PATIENCE = 60_000  # milliseconds: the machine may be busy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]

# Put on the path of the server's process: whom it connects to is written to a file.
WATCHER = """
import os, socket
connect, told = socket.socket.connect, os.environ["CONNECTIONS"]
def watched(self, address):
    with open(told, "a") as file:
        print(repr(address), file=file)
    return connect(self, address)
socket.socket.connect = watched
looked_up = socket.getaddrinfo
def asked(host, *others, **options):
    with open(told, "a") as file:
        print(repr((host,)), file=file)
    return looked_up(host, *others, **options)
socket.getaddrinfo = asked
"""


@dataclass
class Served:
    """A page that is served by a process of its own."""

    process: subprocess.Popen[str]
    url: str
    printed: list[str]
    connections: Path
    errors: Path
    requests: list[str] = field(default_factory=list)  # of all pages that tests open

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        return self.process.returncode


def start(folder: Path, *arguments: str) -> Served:
    """Start the command, and wait until it says where its page is."""
    watcher, connections, errors = folder / "bars", folder / "connections", folder / "errors"
    watcher.mkdir()
    (watcher / "sitecustomize.py").write_text(WATCHER)
    source = str(Path(__file__).parents[2] / "src")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(watcher), source]),
        "CONNECTIONS": str(connections),
        "COLUMNS": "120",
    }
    environment.pop("HF_HUB_OFFLINE", None)  # as a user has it
    with errors.open("w") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "secateur", "compare", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            env=environment,
            cwd=folder,
        )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if found := re.match(r"open (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)", line):
            return Served(process, found[1], printed, connections, errors)
    pytest.fail(f"no page: {''.join(printed)} {errors.read_text()}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    shelf = tmp_path_factory.mktemp("shelf")
    first, second = write_tiny(shelf / "a", seed=3), write_tiny(shelf / "b", seed=4, num_hidden_layers=2)
    (first / "chat_template.jinja").write_text("{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}")
    return first, second


@pytest.fixture(scope="module")
def served(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = start(tmp_path_factory.mktemp("served"), *map(str, folders), "--samples", "4", "--length", "32")
    yield found
    if found.process.poll() is None:
        found.interrupt()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    context = open_in(browser, served)
    yield context.pages[0]
    context.close()


def open_in(browser: Any, served: Served, **how: Any) -> Any:
    """A context of its own, as a person's browser is, with the page open."""
    context = browser.new_context(accept_downloads=True, **{"viewport": {"width": 1280, "height": 900}, **how})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("request", lambda request: served.requests.append(request.url))
    page.goto(served.url)
    page.wait_for_selector("#ask")
    return context


def ask(page: Any, prompt: str) -> None:
    page.fill("#prompt textarea", prompt)
    page.evaluate("() => document.querySelector('#status p').setAttribute('data-old', 1)")
    page.click("#ask")
    page.wait_for_selector("#status p:not([data-old])")


def wait_for_end(page: Any) -> str:
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_contain_text(ENDED, timeout=PATIENCE)
    expect(page.locator("#ask")).to_be_enabled(timeout=PATIENCE)
    return str(page.inner_text("#status"))


def answers_on(page: Any) -> tuple[str, str]:
    return page.input_value("#answer-a textarea"), page.input_value("#answer-b textarea")


def set_number(page: Any, name: str, value: float) -> None:
    """Type a number beside a slider, and leave the field, as a person does."""
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def expected(folders: tuple[Path, Path], prompt: str, tokens: int) -> tuple[str, ...]:
    """What both models write, by another implementation; a browser shows carriage returns as ends of lines."""
    written = (
        sample_text(load(str(folder), device="cpu"), load_tokenizer(str(folder)), prompt, new_tokens=tokens)
        for folder in folders
    )
    return tuple(text.replace("\r\n", "\n").replace("\r", "\n") for text in written)


def plan_numbers(page: Any) -> dict[str, list[str]]:
    rows = page.locator("#plan-sizes tbody tr")
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows.all()}


def test_both_answer_and_settings_rule(page: Any, folders: tuple[Path, Path]) -> None:
    ask(page, PROMPT)
    assert "A has the length asked for, B has the length asked for. B wrote" in wait_for_end(page)
    assert answers_on(page) == expected(folders, PROMPT, 64)
    for letter in "ab":
        shown = page.inner_text(f"#numbers-{letter}")
        assert re.search(r"speed\s+[\d.]+ tokens/s", shown)
        assert re.search(r"64 written", shown)
        assert re.search(r"memory held\s+[\d.]+ KiB", shown)

    set_number(page, "length", 20)
    ask(page, PROMPT)
    wait_for_end(page)
    greedy = answers_on(page)
    assert greedy == expected(folders, PROMPT, 20)
    assert "20 written" in page.inner_text("#numbers-a")

    found = {}
    steps: dict[str, dict[str, float]] = {
        "drawn": {"temperature": 1.5, "seed": 1},
        "again": {},
        "other seed": {"seed": 2},
        "narrow": {"top-p": 0.05},
        "one": {"top-p": 1, "top-k": 1},
    }
    for name, settings in steps.items():
        for setting, value in settings.items():
            set_number(page, setting, value)
        ask(page, PROMPT)
        wait_for_end(page)
        found[name] = answers_on(page)
    assert found["one"] == greedy
    assert found["drawn"] != greedy
    assert found["again"] == found["drawn"]
    assert found["other seed"] != found["drawn"]
    assert found["narrow"] != found["other seed"]

    page.locator("#chat input").check()
    ask(page, PROMPT)
    wait_for_end(page)
    assert answers_on(page)[0] == expected(folders, f"Q: {PROMPT}\nA:", 20)[0]
    assert answers_on(page)[1] == greedy[1]  # it has no template


def test_a_slider_is_moved_by_its_handle(page: Any) -> None:
    slider = page.locator("#length input[type=range]")
    slider.focus()
    for _ in range(4):
        slider.press("ArrowLeft")
    ask(page, PROMPT)
    wait_for_end(page)
    assert "60 written" in page.inner_text("#numbers-a")


def test_answers_stream_and_can_be_stopped(page: Any, folders: tuple[Path, Path]) -> None:
    whole = expected(folders, PROMPT, 220)
    set_number(page, "length", 220)
    page.evaluate(
        """() => { window.seen = new Set();
        window.timer = setInterval(() => seen.add(document.querySelector("#answer-b textarea").value), 5) }"""
    )
    ask(page, PROMPT)
    wait_for_end(page)
    seen = [text for text in page.evaluate("() => { clearInterval(timer); return [...seen] }") if text]
    assert len(seen) > 3
    assert all(whole[1].startswith(text) for text in seen)

    # Stopped while it writes: what is written stays, and the next question is answered.
    page.evaluate(
        """() => { const box = document.querySelector("#answer-a textarea"), before = box.value;
        window.stopping = setInterval(() => { const button = document.querySelector("#stop"), now = box.value;
        if (now && now !== before && !button.disabled) { button.click(); clearInterval(stopping) } }, 1) }"""
    )
    ask(page, "Names refer to")
    assert "was stopped" in wait_for_end(page)
    written = int(re.findall(r"(\d+) written", page.inner_text("#numbers-a"))[0])
    assert 0 < written < 220
    set_number(page, "length", 5)
    ask(page, PROMPT)
    wait_for_end(page)
    assert answers_on(page) == expected(folders, PROMPT, 5)


def test_prompts_that_cannot_be_answered_are_said(page: Any) -> None:
    from playwright.sync_api import expect

    for prompt, told in (
        ("", "the prompt is empty: type some text."),
        ("   ", "the prompt is empty: type some text."),
        ("word " * 300, "reads 256 tokens at most, and the prompt has"),
    ):
        ask(page, prompt)
        expect(page.locator("#status [role=alert]")).to_contain_text(told, timeout=PATIENCE)
        expect(page.locator("#ask")).to_be_enabled(timeout=PATIENCE)
        assert answers_on(page) == ("", "")
        ask(page, "x")  # the message goes when there is an answer
        wait_for_end(page)
        assert page.locator("#status [role=alert]").count() == 0


def test_two_people_at_once_get_their_own_answers(browser: Any, served: Served, folders: tuple[Path, Path]) -> None:
    from playwright.sync_api import expect

    prompts = (PROMPT, "Names refer to objects and")
    contexts = [open_in(browser, served) for _ in prompts]
    for context, prompt in zip(contexts, prompts, strict=True):
        set_number(context.pages[0], "length", 150)
        context.pages[0].fill("#prompt textarea", prompt)
    for context in contexts:
        context.pages[0].click("#ask")
    for context in contexts:
        expect(context.pages[0].locator("#status")).not_to_have_text("")
    for context, prompt in zip(contexts, prompts, strict=True):
        wait_for_end(context.pages[0])
        assert answers_on(context.pages[0]) == expected(folders, prompt, 150)
        context.close()


def test_a_browser_that_is_closed_stops_the_models(browser: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """In this process, with models that take their time, so that what they do can be counted."""
    import uvicorn
    from playwright.sync_api import expect

    sides = load_sides([str(folder) for folder in folders])
    passes: list[int] = []

    def slow(*_: Any) -> None:
        passes.append(1)
        time.sleep(0.1)

    hooks = [side.model.register_forward_hook(slow) for side in sides]
    with bind(port=0) as taken, quiet_gradio(tmp_path / "gradio"):
        page = build_page(sides, Workplace(tmp_path / "run"), folder=tmp_path)
        server = uvicorn.Server(server_config(page, taken))
        serving = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        serving.start()
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(url_of(taken))
        set_number(opened, "length", 220)
        ask(opened, PROMPT)
        expect(opened.locator("#numbers-b")).to_contain_text("4 written", timeout=PATIENCE)
        assert sum(thread.name.startswith("answer") for thread in threading.enumerate()) == 2
        context.close()
        closed = len(passes)
        deadline = time.monotonic() + 30
        while any(thread.name.startswith("answer") for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stopped = len(passes)
        time.sleep(1)
        server.should_exit = True
        serving.join(30)
    for hook in hooks:
        hook.remove()
    assert closed <= stopped < 100  # of 440
    assert len(passes) == stopped


def test_a_cut_is_planned_downloaded_and_made(
    page: Any, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from playwright.sync_api import expect

    page.get_by_role("tab", name="Plan a cut").click()
    expect(page.locator("#plan-sizes")).to_contain_text("removed")
    before, layers = plan_numbers(page), page.inner_text("#plan-layers")
    assert before["parameters"][0] == "106.90 K"
    assert "Sizes only" in page.inner_text("#plan-status")
    assert page.locator("#download").is_disabled() or page.locator("#download button").is_disabled()

    start = time.monotonic()
    set_number(page, "plan-ratio", 0.4)
    expect(page.locator("#plan-sizes")).not_to_contain_text(before["parameters"][1])
    assert time.monotonic() - start < 5  # under a second where the machine has nothing else to do
    after = plan_numbers(page)
    assert page.inner_text("#plan-layers") != layers
    for name in ("parameters", "non-embedding parameters", "MACs of 64 tokens", "bytes of weights in bfloat16"):
        assert float(after[name][1].split()[0]) < float(before[name][1].split()[0])
    assert abs(float(after["non-embedding parameters"][2].rstrip("%")) - 40) < 1

    for name, option in (("plan-preset", "fast"), ("plan-shape", "uniform"), ("plan-score", "param_first")):
        choose(page, name, option)
    page.locator("#plan-axes").get_by_label("mlp", exact=True).check()
    expect(page.locator("#plan-layers")).not_to_contain_text("attention")
    page.click("#choose")
    expect(page.locator("#plan-status")).to_contain_text("The plan says which units of 3 groups stay", timeout=PATIENCE)
    assert "param_first on 4 windows of 32 tokens (demo)" in page.inner_text("#plan-status")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "plan.json"
    plan = tmp_path / "plan.json"
    download.value.save_as(plan)

    planned = json.loads(plan.read_text())
    assert planned["options"]["axes"] == ["mlp"]
    assert planned["options"]["ratio"] == 0.4
    out = tmp_path / "out"
    assert run(["prune", str(folders[0]), str(out), "--plan", str(plan), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    pruned = load(str(out), device="cpu")
    assert sum(parameter.numel() for parameter in pruned.parameters()) == planned["parameters"]["pruned"]

    # What was scored is kept: for another ratio it is known at once which units stay. The old plan is offered no more.
    set_number(page, "plan-ratio", 0.3)
    expect(page.locator("#plan-status")).to_contain_text("Which units stay follows from scores that are kept")
    expect(page.locator("#download")).to_be_disabled()
    # A cut that cannot be made is said, and the next one shown.
    set_number(page, "plan-ratio", 0.95)
    expect(page.locator("#plan-status [role=alert]")).to_contain_text("cutting mlp down to the fewest units")
    set_number(page, "plan-ratio", 0.2)
    expect(page.locator("#plan-sizes")).to_contain_text("removed")


def choose(page: Any, name: str, option: str) -> None:
    """Pick an entry of a list."""
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=option, exact=True).click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everybody_can_use_it(browser: Any, served: Served, scheme: str, width: int) -> None:
    """No violation of axe's rules, on both tabs, with answers and without; nothing wider than the window."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import expect

    context = open_in(browser, served, color_scheme=scheme, viewport={"width": width, "height": 900})
    page, axe = context.pages[0], Axe()

    def check(what: str) -> None:
        page.evaluate(SETTLED)  # colours that are on their way from one to the other have no contrast to speak of
        found = axe.run(page).response
        problems = [
            f"{what}: {rule['id']}: {node['html'][:200]}" for rule in found["violations"] for node in rule["nodes"]
        ]
        assert problems == []
        assert len(found["passes"]) > 20
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    check("empty")
    ask(page, PROMPT)
    wait_for_end(page)
    check("answered")
    ask(page, "")
    expect(page.locator("#status [role=alert]")).to_be_visible()
    check("refused")
    page.get_by_role("tab", name="Plan a cut").click()
    expect(page.locator("#plan-layers")).to_contain_text("layer 2")
    check("planned")
    context.close()


def test_nothing_else_is_served(served: Served, folders: tuple[Path, Path]) -> None:
    """No API for other programs to call, no list of them, no files of the machine."""
    for path in (
        "gradio_api/info",
        "docs",
        "openapi.json",
        f"gradio_api/file={folders[0] / 'config.json'}",
        "monitoring",
    ):
        request = urllib.request.Request(f"{served.url}/{path}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            text = str(error.code)
        assert "hidden_size" not in text
        assert "/write" not in text
    host, port = urlsplit(served.url).hostname, urlsplit(served.url).port
    assert host == "127.0.0.1"
    with socket.socket() as other:  # not on any other address of this machine
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", port or 0)) != 0


def test_no_request_leaves_the_machine_and_it_ends_as_other_commands_do(served: Served) -> None:
    """Last in this file: whom the pages of all tests above and the process itself have asked."""
    schemes = ("data:", "blob:")
    assert served.requests
    assert {urlsplit(url).netloc for url in served.requests if not url.startswith(schemes)} == {
        urlsplit(served.url).netloc
    }
    assert "".join(served.printed).count("│") > 10
    assert served.interrupt() == 130
    assert served.errors.read_text() == "secateur: interrupted\n"
    asked = served.connections.read_text().splitlines() if served.connections.exists() else []
    assert [line for line in asked if "127.0.0.1" not in line] == []
