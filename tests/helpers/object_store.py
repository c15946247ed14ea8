"""An S3 server on localhost, moto's, and a proxy before it that disturbs what passes."""

import contextlib
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

MODES = ("open", "paused", "refused", "slow", "cut", "full", "skewed", "hold seals")
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
               "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
_ANSWER = "HTTP/1.1 {} no\r\nContent-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}"
_ERROR = "<Error><Code>{}</Code><Message>{}</Message></Error>"
_REFUSALS = {
    "full": (507, _ERROR.format("XMinioStorageFull", "Storage backend has reached its minimum free drive threshold")),
    "skewed": (403, _ERROR.format("RequestTimeTooSkewed", "The difference between the times is too large")),
}


@contextlib.contextmanager
def server(bucket: str = "bucket") -> Iterator[int]:
    """The port of a server that holds an empty bucket."""
    from moto.moto_api._internal.models import moto_api_backend
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    try:
        port = made.get_host_and_port()[1]
        make_bucket(port, bucket)
        yield port
    finally:
        moto_api_backend.reset()
        made.stop()


def make_bucket(port: int, bucket: str = "bucket") -> None:
    """Makes an empty bucket."""
    _client(port).create_bucket(Bucket=bucket)


def remove_bucket(bucket: str = "bucket") -> None:
    """Removes a bucket and all that is in it, at once."""
    _backend().buckets[bucket].keys.clear()
    _backend().delete_bucket(bucket)


def plant(bucket: str, key: str, content: bytes) -> None:
    """Puts an object under a key that clients would mend on the way."""
    _backend().put_object(bucket, key, content)


def _backend():
    from moto.backends import get_backend

    return get_backend("s3")["123456789012"]["aws"]


def _client(port: int):
    import boto3

    given = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **given)


class Proxy:
    """Stands before a server on a port of its own; `mode`, one of MODES, says what becomes of what passes.

    rate: bytes a second when slow. length: bytes after which a body is cut. forwards: whether seals that are held have
    reached the server. held: set once one is.
    """

    def __init__(self, port: int):
        self._upstream, self.mode = port, "open"
        self.rate, self.length, self.forwards, self.held = 400_000, 700, False, threading.Event()
        self._server: socketserver.ThreadingTCPServer | None = None
        self.port = 0
        self._listen()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_) -> None:
        self.turn("open")
        self._close()

    def turn(self, mode: str) -> None:
        """Passes to another mode."""
        assert mode in MODES
        self.mode = mode
        if mode == "refused":
            self._close()
        elif self._server is None:
            self._listen()

    def _listen(self) -> None:
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):
                    outer._pass(self.request)

        class Listener(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads, block_on_close = True, True, False
            request_queue_size = 100

        self._server = Listener(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _pass(self, client: socket.socket) -> None:
        """One request: the server closes the connection after each."""
        head = b""
        while b"\r\n\r\n" not in head:
            received = client.recv(1 << 16)
            if not received:
                return
            head += received
        method, path = head.split(b" ", 2)[:2]
        self._wait()
        mode = self.mode
        if mode == "skewed" or (mode == "full" and method == b"PUT"):
            status, body = _REFUSALS[mode]
            client.sendall(_ANSWER.format(status, len(body), body).encode())
            return
        seals = mode == "hold seals" and method == b"PUT" and path.endswith(b"/SEAL")
        if seals and not self.forwards:
            self.held.set()
            while self.mode == "hold seals":
                time.sleep(0.01)
            return
        with socket.create_connection(("127.0.0.1", self._upstream)) as upstream:
            cut = mode == "cut" and b"?" not in path
            back = threading.Thread(target=self._relay, args=(upstream, client, cut and method == b"GET", seals))
            upstream.sendall(head)
            back.start()
            self._relay(client, upstream, cut and method == b"PUT", False)
            back.join()

    def _relay(self, source: socket.socket, target: socket.socket, cut: bool, hold: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 14):
                self._wait()
                if hold:
                    self.held.set()
                    while self.mode == "hold seals":
                        time.sleep(0.01)
                    break
                if self.mode == "slow":
                    time.sleep(len(chunk) / self.rate)
                passed += len(chunk)
                if self.mode == "refused" or (cut and passed > self.length):
                    target.sendall(chunk[: max(0, len(chunk) - (passed - self.length))] if cut else b"")
                    break
                target.sendall(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait(self) -> None:
        while self.mode == "paused":
            time.sleep(0.01)


def environment(port: int) -> dict[str, str]:
    """What a process needs to find a server behind s3://."""
    return {**os.environ, **ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
