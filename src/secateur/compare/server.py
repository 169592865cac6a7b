"""A page -> served at an address of this machine until it is interrupted; nothing is asked of any other machine."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import PageError

logger = logging.getLogger(__name__)

HERE = "127.0.0.1"
PORT = 7860
CLOSING = 1  # seconds that browsers have to end what they read when the page is closed
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # of the reader's machine: none is fetched
LEGIBLE = {  # what gradio's own theme shows with a contrast below 4.5 to 1
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "block_label_text_color": "*neutral_700",
    "block_title_text_color": "*neutral_700",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_300",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "slider_color": "*primary_700",
    "color_accent": "*primary_700",
    "checkbox_background_color_selected": "*primary_700",
    "checkbox_border_color_selected": "*primary_700",
}
FIXED_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def check_gradio() -> None:
    """Raise `PageError` where gradio is not installed.

    >>> check_gradio()
    """
    if importlib.util.find_spec("gradio") is None:
        raise PageError("the page is made with gradio, which is not installed: pip install 'secateur[compare]'")


def bind(host: str = HERE, port: int = PORT) -> socket.socket:
    """Take an address, before models are loaded for it; port 0 takes any that is free.

    Raises `PageError` when it is taken, or not this machine's.

    >>> with bind(port=0) as taken, bind(port=taken.getsockname()[1]):
    ...     pass
    Traceback (most recent call last):
    secateur.errors.PageError: port ... of 127.0.0.1 is taken: another program, or another page, listens there; ...
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise PageError(
            f"--host {host} is no address of this machine ({error}); --host {HERE} is the default"
        ) from error
    taken = socket.socket(family, kind, protocol)
    try:
        if os.name != "nt":  # where it would let two programs share a port
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(128)
    except OSError as error:
        taken.close()
        if isinstance(error, PermissionError):
            raise PageError(f"port {port} needs rights that you do not have; give another, --port {PORT}") from error
        if error.errno == 98 or "in use" in str(error):
            raise PageError(
                f"port {port} of {host} is taken: another program, or another page, listens there; give another, "
                f"--port {port + 1 if port < 65535 else PORT}, or any that is free, --port 0"
            ) from error
        raise PageError(f"--host {host} --port {port} cannot be listened at: {error.strerror or error}") from error
    if not _is_loopback(str(address[0])):
        logger.warning(
            "%s is no address of this machine alone: whoever reaches it can use the page, and see what is planned", host
        )
    return taken


def url_of(taken: socket.socket) -> str:
    """The address of the page, for a browser on this machine.

    >>> with bind(port=0) as taken:
    ...     url_of(taken).startswith("http://127.0.0.1:")
    True
    """
    host, port = taken.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else HERE
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def quiet_gradio(folder: Path) -> Iterator[None]:
    """While open, gradio tells nobody that it is used, and keeps its files in a folder."""
    wanted = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "GRADIO_RUN_HISTORY": "False"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def application(page: Any, taken: socket.socket) -> Any:
    """The page as an ASGI application."""
    import gradio as gr
    from fastapi import FastAPI

    host, port = taken.getsockname()[:2]
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page.queue(api_open=False, max_size=64),
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=FIXED_FONTS).set(**LEGIBLE),
        css_paths=[Path(__file__).with_name("page.css")],
    )


def server_config(page: Any, taken: socket.socket) -> Any:
    """The settings of uvicorn that serve the page, without a word in the terminal."""
    import uvicorn

    return uvicorn.Config(
        application(page, taken),
        log_config=None,
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=CLOSING,
        ws="none",
        server_header=False,
    )


def serve(page: Any, taken: socket.socket) -> None:
    """Serve the page until Ctrl-C, which is raised when it is closed."""
    import uvicorn

    uvicorn.Server(server_config(page, taken)).run(sockets=[taken])
    raise KeyboardInterrupt  # uvicorn raises it only where the process was not started with the signal ignored


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
