"""A real HTTP server that gives one file in good and bad ways."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SIZE = 3 << 20


def _content() -> bytes:
    """Of a new file; it neither begins nor ends as a web page might begin."""
    return b"PK" + os.urandom(SIZE - 4) + b"KP"


@dataclass
class Served:
    """What a server has, how it gives it, and what it was asked.

    Attributes:
        ways: one for each request; the last one for all that follow.
        ranges: the `Range` of each request, or None.
    """

    url: str = ""
    content: bytes = field(default_factory=_content)
    etag: str = '"v1"'
    ways: list[str] = field(default_factory=lambda: ["right"])
    paths: list[str] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def change(self) -> None:
        """Another version under the same address."""
        self.change_content()
        self.etag = '"v2"'

    def change_content(self) -> None:
        self.content = _content()


class _Handler(http.server.BaseHTTPRequestHandler):
    served: Served

    def do_GET(self) -> None:
        served = self.served
        served.paths.append(self.path)
        served.ranges.append(self.headers["Range"])
        way = served.ways.pop(0) if len(served.ways) > 1 else served.ways[0]
        getattr(self, f"_{way}")()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _head(self, status: int, **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def _asked(self, known: bool = True) -> bytes:
        """Head of a good answer; returns the body that should follow."""
        served = self.served
        if_range = self.headers["If-Range"]
        wanted = re.match(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(wanted[1]) if wanted and if_range == served.etag else 0
        total = len(served.content)
        if start >= total:
            self._head(416, Content_Range=f"bytes */{total}", Content_Length=0)
            return b""
        headers: dict[str, Any] = {"Content-Length": total - start}
        if known:
            headers["ETag"] = served.etag
        if start:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self._head(206 if start else 200, **headers)
        return served.content[start:]

    def _right(self) -> None:
        self.wfile.write(self._asked())

    def _breaks(self) -> None:
        body = self._asked()
        self.wfile.write(body[: len(body) // 2])

    def _anonymous_breaks(self) -> None:
        """Without a version."""
        body = self._asked(known=False)
        self.wfile.write(body[: len(body) // 2])

    def _hangs(self) -> None:
        body = self._asked()
        self.wfile.write(body[: len(body) // 2])
        self.served.over.wait(30)

    def _silent(self) -> None:
        self.served.over.wait(30)

    def _slams(self) -> None:
        """The connection ends before an answer."""

    def _whole(self) -> None:
        """Ignores what is asked for."""
        self._head(200, ETag=self.served.etag, Content_Length=len(self.served.content))
        self.wfile.write(self.served.content)

    def _whole_breaks(self) -> None:
        self._head(200, ETag=self.served.etag, Content_Length=len(self.served.content))
        self.wfile.write(self.served.content[: SIZE // 2])

    def _deaf(self) -> None:
        """A range of whatever version there is."""
        total, start = len(self.served.content), SIZE // 2
        headers = {"Content-Range": f"bytes {start}-{total - 1}/{total}", "ETag": self.served.etag}
        self._head(206, **headers, Content_Length=total - start)
        self.wfile.write(self.served.content[start:])

    def _elsewhere(self) -> None:
        """Another range than was asked for."""
        total = len(self.served.content)
        if self.headers["Range"] is None:
            return self._breaks()
        headers = {"Content-Range": f"bytes 10-{total - 1}/{total}", "ETag": self.served.etag}
        self._head(206, **headers, Content_Length=total - 10)
        self.wfile.write(self.served.content[10:])

    def _unsized(self) -> None:
        self._head(200)
        self.wfile.write(self.served.content)

    def _chunk(self) -> None:
        self._head(200, Transfer_Encoding="chunked")
        self.wfile.write(b"100000\r\n" + self.served.content[:1000])

    def _short(self) -> None:
        self._head(200, Content_Length=1000)
        self.wfile.write(self.served.content)

    def _long(self) -> None:
        self._head(200, ETag=self.served.etag, Content_Length=len(self.served.content) + 1000)
        self.wfile.write(self.served.content)

    def _huge(self) -> None:
        self._head(200, Content_Length=10**16)
        self.wfile.write(self.served.content)

    def _nonsense(self) -> None:
        self._head(200, Content_Length="many")
        self.wfile.write(self.served.content[:1000])

    def _wrong(self) -> None:
        self._head(200, Content_Length=len(self.served.content))
        self.wfile.write(self.served.content[::-1])

    def _empty(self) -> None:
        self._head(200, Content_Length=0)

    def _page(self) -> None:
        page = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
        self._head(200, Content_Type="text/html", Content_Length=len(page))
        self.wfile.write(page)

    def _garbled(self) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def _absent(self) -> None:
        self.send_error(404)

    def _ill(self) -> None:
        self.send_error(503)

    def _moved(self) -> None:
        self._head(302, Location=f"{self.served.url}/moved", Content_Length=0)


@contextmanager
def serving() -> Iterator[Served]:
    served = Served()
    handler = type("Handler", (_Handler,), {"served": served})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        served.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield served
        finally:
            served.over.set()
            running.shutdown()
            thread.join()
