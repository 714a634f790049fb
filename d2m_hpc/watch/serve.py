"""`d2m report --serve`: the report over HTTP, made anew while a run works, and nothing else."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from errno import EADDRNOTAVAIL
from hmac import compare_digest
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import gaierror
from threading import Lock
from typing import Any

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.storage.texts import safe

HERE = "127.0.0.1"
FRESH = 10.0
"""Seconds for which a page is not made again, whoever asks."""
REFRESH = 30
"""Seconds after which a browser asks again, until the run is complete."""
Page = Callable[[], tuple[bytes, bool]]
"""Makes the page, and tells whether the run is complete."""


class ReportServer(ThreadingHTTPServer):
    """Serves one page, under a path that nobody can guess: every user of a machine can connect.

    Example:
        with ReportServer(lambda: (b"<!doctype html>...", True)) as server:
            print(server.url)
            server.serve_forever()

    Raises:
        ConfigError: the system does not give the address.
    """

    daemon_threads = True

    def __init__(self, page: Page, port: int = 0, host: str = HERE) -> None:
        self.path = f"/{secrets.token_urlsafe(16)}/"
        self._page, self._one, self._made = page, Lock(), (0.0, b"", False)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, ValueError) as error:
            is_host = isinstance(error, gaierror | ValueError) or error.args[0] == EADDRNOTAVAIL
            mend = "give an IPv4 address or a name of this machine as --host"
            mend = mend if is_host else "take another --port"
            why = f"{host}:{port} cannot be served at: {error}; {mend}"
            raise ConfigError("--serve", [why]) from None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}{self.path}"

    def page(self) -> tuple[bytes, bool]:
        """The page, as it was a few seconds ago at the oldest."""
        with self._one:
            made, data, is_complete = self._made
            if not data or time.monotonic() - made > FRESH:
                data, is_complete = self._page()
                self._made = (time.monotonic(), data, is_complete)
            return data, is_complete

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that has gone."""


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version, sys_version = "d2m", ""
    timeout = 30

    def do_GET(self) -> None:
        if not compare_digest(self.path.encode(), self.server.path.encode()):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        status, kind, again = HTTPStatus.OK, "text/html", True
        try:
            data, is_complete = self.server.page()
            again = not is_complete
        except D2MError as error:
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain"
            data = safe(str(error), lines=True).encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        if again:
            self.send_header("Refresh", str(REFRESH))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for each request."""
