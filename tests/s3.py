"""A real S3 API over HTTP (moto's server), which counts its requests, and errs when told to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import boto3
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

BUCKET = "bucket"
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",  # of the library's own, so that ours can be counted
}
ERROR = "<Error><Code>{code}</Code><Message>{code}, as it was told</Message></Error>"
CODES = {403: "AccessDenied", 500: "InternalError", 503: "ServiceUnavailable"}


class Request(NamedTuple):
    """What was asked for: the path has the bucket's name in front."""

    method: str
    path: str
    query: str
    range: str


Answer = Callable[[Any, dict[str, Any], Any], Iterable[bytes]]
"""How an application is answered for: application, environment, start_response."""


def status(number: int) -> Answer:
    """An error in place of an answer."""

    def answer(app: Any, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = ERROR.format(code=CODES[number]).encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(f"{number} told", headers)
        return [body]

    return answer


def broken_off(app: Any, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
    """Half an answer, and the connection is closed."""
    body = b"".join(app(environ, start_response))
    yield body[: len(body) // 2]
    raise ConnectionResetError("as it was told")


def shortened(app: Any, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Half an answer that says that it is the whole one."""
    said: list[Any] = []
    body = b"".join(app(environ, lambda *args: said.append(args)))
    half = body[: len(body) // 2]
    code, headers = said[0][:2]
    kept = [(k, v) for k, v in headers if k.lower() != "content-length"]
    start_response(code, [*kept, ("Content-Length", str(len(half)))])
    return [half]


class Server:
    """moto's S3.

    Attributes:
        requests: all since the last reset.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._faults: list[tuple[Callable[[Request], bool], Answer]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._http = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler
        )
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )

    @property
    def variables(self) -> dict[str, str]:
        """The environment that leads here."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.url}

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            thread.join()
            self._http.server_close()
            self.client.close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path, query = environ["PATH_INFO"].lstrip("/"), environ["QUERY_STRING"]
        request = Request(environ["REQUEST_METHOD"], path, query, environ.get("HTTP_RANGE", ""))
        with self._lock:
            self.requests.append(request)
            told = next((fault for fault in self._faults if fault[0](request)), None)
            if told:
                self._faults.remove(told)
        if told:
            return told[1](self._app, environ, start_response)
        found: Iterable[bytes] = self._app(environ, start_response)
        return found

    def reset(self) -> None:
        """No objects, no faults, nothing counted; one empty bucket."""
        self._faults.clear()
        for key in self.keys() if self._has_bucket() else ():
            self.client.delete_object(Bucket=BUCKET, Key=key)
        if not self._has_bucket():
            self.client.create_bucket(Bucket=BUCKET)
        self.requests.clear()

    def _has_bucket(self) -> bool:
        return BUCKET in [b["Name"] for b in self.client.list_buckets()["Buckets"]]

    def fail(self, method: str, ending: str, answer: Answer, times: int = 1) -> None:
        """The next requests of a method for a path that ends so are answered otherwise."""

        def concerns(request: Request) -> bool:
            return request.method == method and request.path.endswith(ending)

        self._faults += [(concerns, answer)] * times

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def methods(self) -> Counter[str]:
        return Counter(request.method for request in self.requests)
