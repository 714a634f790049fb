"""A small Hugging Face hub on loopback, for the real client: repositories, commits, bad days."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000
"""Bytes from which on a file is in LFS: the hub tells its sha256, and another server gives it."""
TOKEN = "hf_" + "s3cret" * 6


def commit_of(files: dict[str, bytes]) -> str:
    """40 hex digits, as git names commits."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """What a hub has, how it behaves, and what it was asked.

    Attributes:
        revisions: files of each revision by repository.
        ways: how requests are answered, first come first; all later ones go well.
        renamed: repositories' new names by those that lead there.
        gated: repositories whose files need the token; everybody may see what they have.
        asked: method and path of each request, with its range.
        leaked: what the file server was told of who asks.
    """

    url: str = ""
    files_url: str = ""
    revisions: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    ways: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def put(self, repo: str, revision: str = "main", **files: bytes) -> str:
        """Commit files, whose names have `__` for dots; returns the commit."""
        named = {name.replace("__", "."): data for name, data in files.items()}
        return self.put_files(repo, named, revision)

    def put_files(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        commit = commit_of(files)
        self.commits[commit] = files
        self.revisions.setdefault(repo, {})[revision] = files
        self.revisions[repo][commit] = files
        return commit


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        wanted = f" {self.headers['Range']}" if self.headers["Range"] else ""
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}{wanted}")
        for old, new in self.hub.renamed.items():
            if f"/{old}/" in self.path:
                self._send(307, b"", Location=self.path.replace(f"/{old}/", f"/{new}/", 1))
                return
        way = self.hub.ways.pop(0) if self.hub.ways else "right"
        if way == "hangs":
            self.hub.over.wait(30)
        elif way.isdecimal():
            self._send(int(way), b"", Retry_After=1)
        elif way[0] in "<[{":
            self._send(200, way.encode(), Content_Type="application/json")
        elif api := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            self._info(api[1], api[2])
        elif tree := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/tree/([^/]+)/?(.*))?", path):
            self._data_set(f"datasets/{tree[1]}", tree[2], tree[3])
        elif resolve := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve(resolve[1], resolve[2], resolve[3], way)
        elif lfs := re.fullmatch(r"/lfs/([0-9a-f]{40})/(.+)", path):
            self.hub.leaked += [v for v in [self.headers["Authorization"]] if v]
            self._file(self.hub.commits[lfs[1]][lfs[2]], way)
        else:
            self._send(404, b"")

    def _known(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """A revision's files, or what the real hub says where there are none."""
        if repo not in self.hub.revisions:
            self._send(401, b"", X_Error_Code="RepoNotFound")
        elif revision not in self.hub.revisions[repo]:
            self._send(404, b"", X_Error_Code="RevisionNotFound")
        else:
            return self.hub.revisions[repo][revision]
        return None

    def _info(self, repo: str, revision: str) -> None:
        if (files := self._known(repo, revision)) is None:
            return
        told = {"id": repo, "sha": commit_of(files), "siblings": [*map(_sibling, files.items())]}
        self._send(200, json.dumps(told).encode(), Content_Type="application/json")

    def _data_set(self, repo: str, revision: str | None, folder: str) -> None:
        """What a folder of a data set has, or that there is such a data set."""
        if (files := self._known(repo, revision or "main")) is None:
            return
        start = f"{folder}/" if folder else ""
        rest = [
            (name.removeprefix(start), d) for name, d in files.items() if name.startswith(start)
        ]
        found: list[dict[str, Any]] = [
            {"type": "file", "path": start + name, "size": len(data), "oid": "0" * 40}
            for name, data in rest
            if "/" not in name
        ]
        folders = sorted({name.partition("/")[0] for name, _ in rest if "/" in name})
        found += [{"type": "directory", "path": start + f, "oid": "0" * 40} for f in folders]
        told = found if revision else {"id": repo, "sha": commit_of(files), "siblings": []}
        self._send(200, json.dumps(told).encode(), Content_Type="application/json")

    def _resolve(self, repo: str, commit: str, name: str, way: str) -> None:
        if (files := self._known(repo, commit)) is None:
            return
        if repo in self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 403 if self.headers["Authorization"] else 401
            self._send(status, b"", X_Error_Code="GatedRepo")
        elif name not in files:
            self._send(404, b"", X_Error_Code="EntryNotFound")
        elif len(files[name]) < LARGE:
            self._file(files[name], way)
        else:
            place = f"{self.hub.files_url}/lfs/{commit_of(files)}/{name}"
            self._send(302, b"", Location=place, X_Linked_Size=len(files[name]))

    def _file(self, data: bytes, way: str) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        start = int(m[1]) if (m := re.match(r"bytes=(\d+)-", self.headers["Range"] or "")) else 0
        kind = "text/plain; charset=utf-8" if len(data) < LARGE else "binary/octet-stream"
        more: dict[str, Any] = {"Content_Length": len(data) - start, "Content_Type": kind}
        more["ETag"] = etag
        if start:
            more["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:] if way != "other" else data[start:][::-1]
        half = way == "breaks"
        self._send(206 if start else 200, body[: len(body) // 2] if half else body, **more)

    def _send(self, status: int, body: bytes, **headers: Any) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sibling(item: tuple[str, bytes]) -> dict[str, Any]:
    name, data = item
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    told: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
    if len(data) >= LARGE:
        sha256 = hashlib.sha256(data).hexdigest()
        told["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
    return told


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, and the server of its large files, which is another by its name."""
    hub = Hub()
    with _running(type("Handler", (_Handler,), {"hub": hub})) as port:
        hub.url, hub.files_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        try:
            yield hub
        finally:
            hub.over.set()


@contextmanager
def serving_folder(folder: Path) -> Iterator[str]:
    """A web server of a folder, as a site's mirror is; gives its address."""
    with _running(partial(_Files, directory=folder)) as port:
        yield f"http://127.0.0.1:{port}"


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def _running(handler: Any) -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
