"""A server on localhost that speaks the protocol of the Hugging Face hub, as its client asks: the API of a repository
and its tree in pages, and files that resolve at a commit, large ones through a redirect to another host's address."""

import contextlib
import hashlib
import http.server
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator

PAGE = 3  # entries of a tree in one answer
LARGE = 1000  # bytes; larger files are stored apart, with SHA-256


class Hub:
    """The repositories of a server, {"datasets/OWNER/NAME": [commit, ...]}, a commit being {path: bytes}.

    gated: repositories that need TOKEN. cut: how many of the next answers with a file break off in the middle. wrong:
    files that arrive with a byte changed. sizes: what a tree says of a file, if not the truth. asked: (method, path,
    range) of every request.
    """

    TOKEN = "hf_right"

    def __init__(self):
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.stored: dict[str, bytes] = {}
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.wrong: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        self.sizes: dict[str, int] = {}
        self.port = 0

    def put(self, repository: str, files: dict[str, bytes]) -> str:
        """A new commit of a repository, whose name it returns."""
        self.commits.setdefault(repository, []).append(dict(files))
        self.stored |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return self.commit(repository)

    def commit(self, repository: str, number: int = -1) -> str:
        listed = self.commits[repository]
        return hashlib.sha1(f"{repository} {number % len(listed)}".encode()).hexdigest()

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        names = [self.commit(repository, number) for number in range(len(self.commits[repository]))]
        if revision == "main":
            return self.commits[repository][-1]
        return self.commits[repository][names.index(revision)] if revision in names else None

    def downloads(self) -> list[str]:
        """The large files whose contents were sent, in order."""
        return [
            path.split("/", 3)[3] for method, path, _ in self.asked if method == "GET" and path.startswith("/stored/")
        ]


def _entry(path: str, content: bytes) -> dict:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": git}
    if len(content) > LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self._answer()

        def do_GET(self):
            self._answer()

        def _answer(self) -> None:
            address = urllib.parse.urlsplit(self.path)
            path = urllib.parse.unquote(address.path)
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            if path.startswith("/stored/"):
                digest, _, name = path.removeprefix("/stored/").partition("/")
                return self._content(name, hub.stored[digest], {})
            api = path.startswith("/api/")
            kind, repository, rest = self._split(path.removeprefix("/api"))
            key = f"{kind}/{repository}"
            if key not in hub.commits:
                return self._refuse(
                    401 if "Authorization" not in self.headers else 404, "RepoNotFound", "Repository not found"
                )
            if not api and key in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.TOKEN}":
                return self._refuse(401, "GatedRepo", "Access to this data set is restricted")
            files = hub.files(key, rest[1])
            if files is None:
                return self._refuse(404, "RevisionNotFound", "Invalid rev id")
            names = [hub.commit(key, number) for number in range(len(hub.commits[key]))]
            commit = rest[1] if rest[1] in names else hub.commit(key)
            if api and rest[0] == "revision":
                return self._json({"id": repository, "sha": commit, "siblings": [], "private": False, "tags": []}, {})
            if api:
                return self._tree(files, urllib.parse.parse_qs(address.query), address.path)
            name = "/".join(rest[2:])
            if name not in files:
                return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            headers = {"X-Repo-Commit": commit}
            if len(files[name]) <= LARGE:
                return self._content(name, files[name], headers | {"ETag": f'"{_entry(name, files[name])["oid"]}"'})
            digest = hashlib.sha256(files[name]).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[name]))}
            place = f"http://localhost:{hub.port}/stored/{digest}/{urllib.parse.quote(name)}"
            return self._send(302, b"", headers | {"Location": place})

        def _split(self, path: str) -> tuple[str, str, list[str]]:
            parts = path.strip("/").split("/")
            kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
            return kind, "/".join(parts[:2]), parts[2:] or ["revision", "main"]

        def _tree(self, files: dict[str, bytes], query: dict, path: str) -> None:
            entries = [_entry(*item) for item in sorted(files.items())]
            entries = [entry | {"size": hub.sizes.get(entry["path"], entry["size"])} for entry in entries]
            folders = {os.path.dirname(name) for name in files} - {""}
            entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
            start = int(query.get("cursor", ["0"])[0])
            following = f"http://127.0.0.1:{hub.port}{path}?recursive=True&cursor={start + PAGE}"
            more = {"Link": f'<{following}>; rel="next"'} if start + PAGE < len(entries) else {}
            self._json(entries[start : start + PAGE], more)

        def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
            if name in hub.wrong:
                content = content[:-1] + bytes([content[-1] ^ 1])
            status = 200
            if wanted := self.headers.get("Range"):
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                last = min(int(end or len(content)), len(content) - 1)
                headers = headers | {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
                status, content = 206, content[int(start) : last + 1]
            if self.command == "GET" and hub.cut.get(name, 0) > 0:
                hub.cut[name] -= 1
                return self._send(status, content, headers, len(content) // 2)
            return self._send(status, content, headers)

        def _json(self, value, headers: dict[str, str]) -> None:
            self._send(200, json.dumps(value).encode(), headers | {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            self._send(status, b"", (headers or {}) | {"X-Error-Code": code, "X-Error-Message": message})

        def _send(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:sent])
            if sent is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)

    return Handler


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories that answers at http://127.0.0.1:hub.port."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: Hub, home: str) -> dict[str, str]:
    """What a process needs to ask this hub, with caches of its own below `home`."""
    return {"HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HOME": f"{home}/hf", "STEPPE_CACHE": f"{home}/steppe"}
