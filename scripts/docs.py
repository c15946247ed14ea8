"""Read the README of a room: configs, data, optim, lm or scripts; or build them all as a site.

    steppe docs [ROOM]
    steppe docs --site=DIR

The site holds every README of the source tree, the notebook, an example of a model card, linked files, and the API of
steppe.optim.
"""

import html
import json
import os
import pydoc
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from steppe.configs.packages import folder_of
from steppe.scripts import command, process

ROOMS = ("configs", "data", "optim", "lm", "scripts")
README, INDEX, API = "README.md", "index.html", "api/steppe/optim.html"
MORE = ("optim/first_steps.ipynb", "lm/hub/CARD.md")  # pages that are no README
# Links of Markdown and of HTML to files of the tree: no addresses, no places on the same page.
LINK = re.compile(r'(?<=href="|.src=")(?![a-z]+:|#)([^"#]+)')
EXTRAS = ["tables", "fenced-code-blocks", "header-ids", "cuddled-lists"]
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ margin: 0 auto; max-width: 60rem; padding: 0 1rem 4rem; font: 1rem/1.5 system-ui, sans-serif; color: #222; }}
nav {{ border-bottom: 1px solid #ccc; padding: .7rem 0; }} nav a {{ margin-right: 1rem; }}
a {{ color: #0b5cad; }} img {{ max-width: 100%; }} h1, h2, h3 {{ line-height: 1.2; }}
pre {{ background: #f5f5f5; overflow-x: auto; padding: .7rem; }} pre.output {{ background: none; }}
code {{ font-size: .9em; overflow-wrap: anywhere; }} pre code {{ overflow-wrap: normal; }}
nav, h1, h2, h3, p, li, a {{ overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; }}
</style></head><body><nav>{links}</nav>
{body}
</body></html>
"""


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Shows a README, lists them, or builds the site; returns the exit status, 2 for bad input."""
    parser = command.parser("docs", __doc__, config=False)
    parser.add_argument("room", nargs="?", choices=ROOMS, metavar="ROOM", help=", ".join(ROOMS))
    parser.add_argument("--site", metavar="DIR", help="a new directory for the site")
    options = command.options_of(argv, parser)
    if options.site:
        return build(Path(folder_of("steppe.optim")).parent, Path(options.site))
    pages = {name: (folder_of(f"steppe.{name}") / README).read_text(encoding="utf-8") for name in ROOMS}
    if options.room:
        pydoc.pager(pages[options.room])
        return 0
    for name, text in pages.items():
        print(f"steppe docs {name:<10}{text.partition(':')[2].splitlines()[0].strip()}")
    return 0


def build(root: Path, out: Path) -> int:
    """Writes the site of a source tree into a new directory; returns the exit status."""
    if not (root / README).is_file():
        return process.fail(f"--site={out}: needs a clone of Steppe's repository, not an installed package")
    if out.exists():
        return process.fail(f"--site={out}: exists; choose a new directory")
    import markdown2
    import pdoc

    making = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        pages = [path.relative_to(root) for path in _sources(root)]
        render = partial(markdown2.markdown, extras=EXTRAS)
        for page in pages:
            text = (root / page).read_text(encoding="utf-8")
            body = _notebook(text, render) if page.suffix == ".ipynb" else render(_without_head(text))
            _write(making, page, _placed(root, making, page, body), pages)
        pdoc.pdoc("steppe.optim", output_directory=making / "api")
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    print(f"wrote {out / INDEX}")
    return 0


def _sources(root: Path) -> list[Path]:
    """The README at the top, those of the rooms and the studies, and MORE."""
    readmes = (path for room in ROOMS for path in sorted((root / room).rglob(README)))
    return [root / README, *readmes, *(root / page for page in MORE)]


def _page_of(source: str) -> str:
    """The name of the page that is made of a source; any other file keeps its name."""
    made = re.sub(rf"{README}$", INDEX, source)
    return re.sub(r"\.(ipynb|md)$", ".html", made)


def _without_head(text: str) -> str:
    """Markdown whose metadata, between lines of ---, are a code block."""
    return re.sub(r"\A---\n(.*?)\n---\n", r"```yaml\n\1\n```\n", text, flags=re.DOTALL)


def _notebook(text: str, render: Callable[[str], str]) -> str:
    """The body of a page of an executed notebook: its text, its code and their outputs."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(render(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="the figure that this code draws" src="data:image/png;base64,{picture}">')
            elif said := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f'<pre class="output">{html.escape(said)}</pre>')
    return "\n".join(parts)


def _placed(root: Path, out: Path, page: Path, body: str) -> str:
    """The body with links to READMEs as links to their pages. Copies the other files that it links to."""
    for target in set(LINK.findall(body)):
        source = (root / page.parent / target).resolve()
        if source.is_file() and _page_of(source.name) == source.name:
            copy = out / source.relative_to(root.resolve())
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    body = LINK.sub(lambda link: _page_of(link[1]), body)
    return re.sub(
        r'(<img [^>]*src="((?!data:)[^"]+)"[^>]*>)', r'<a href="\2">\1</a>', body
    )  # at full size, on a small screen


def _title(page: Path) -> str:
    """The name of a page among the links."""
    if page.name == README:
        return str(page.parent).removeprefix("configs/") if page.parent.name else "Steppe"
    return {".ipynb": "notebook", ".md": "model card"}[page.suffix]


def _write(out: Path, page: Path, body: str, pages: Sequence[Path]) -> None:
    """Writes a page with links to all others and to the API."""
    place = out / _page_of(str(page))
    place.parent.mkdir(parents=True, exist_ok=True)
    targets = {_title(each): Path(_page_of(str(each))) for each in pages}
    links = " ".join(
        f'<a href="{os.path.relpath(target, page.parent)}">{html.escape(name)}</a>'
        for name, target in {**targets, "API": Path(API)}.items()
    )
    title = re.sub(r"<.*?>", "", body.partition("<h1")[2].partition(">")[2].partition("</h1>")[0]).strip()
    place.write_text(PAGE.format(title=title, links=links, body=body), encoding="utf-8")
