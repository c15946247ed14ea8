"""One HTML page that stands alone: tables, figures as inline SVG, the data behind each as a link within the page."""

import base64
import gzip
import re
from collections.abc import Callable, Sequence
from html import escape

import pandas as pd

from steppe.scripts.report.drawing import Drawing
from steppe.scripts.report.tables import Table, to_csv

_LONG = 10  # rows from which a table has a filter
_STYLE = """
body { font: 15px/1.45 system-ui, "Helvetica Neue", Arial, sans-serif; color: #000; background: #fff; max-width: 76rem;
  margin: 0 auto; padding: 1rem clamp(0.6rem, 2vw, 1.5rem) 4rem; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; border-bottom: 2px solid #000; padding-bottom: 0.2rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.2rem; }
section > p, figcaption, .caption { max-width: 62rem; }
.answer { font-size: 1.15rem; margin: 0.4rem 0; }
.caption, figcaption, nav { color: #333; font-size: 0.87rem; }
nav a { margin-right: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.5rem 0; }
th, td { padding: 0.22rem 0.6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #000; vertical-align: bottom; cursor: pointer; }
thead th[aria-sort=ascending]::after { content: " ↑"; }
thead th[aria-sort=descending]::after { content: " ↓"; }
th.group { padding-top: 0.9rem; background: #f3f3f3b0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
tbody th[scope=row] { font-weight: normal; }
figure { margin: 1rem 0; }
figure svg { width: 100%; max-width: 46rem; height: auto;
  font-family: "DejaVu Sans", Verdana, sans-serif; }
details { margin: 0.5rem 0; }
pre { overflow-x: auto; font-size: 0.8rem; }
summary { cursor: pointer; }
details.part > summary { font-weight: bold; }
a { color: #0050a0; }
a:focus-visible, summary:focus-visible, th:focus-visible { outline: 3px solid #E69F00; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .data, input { display: none; }
  h2, h3, .caption, thead, tr.group { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: 1pt 4pt; }
  td.number { white-space: normal; }
  figure svg { max-height: 165mm; }
}
"""
# a click on a heading sorts the rows of each group, text in the field above a table keeps those that have it
_SCRIPT = """
const value = cell => {
  const found = /^[\\u2212+]?[\\d.]+([kMGTP]?)/.exec(cell.innerText.trim());
  if (!found) return cell.innerText;
  const size = parseFloat(found[0].replace("\\u2212", "-"));
  return size * 1000 ** (" kMGTP".indexOf(found[1] || " "));
};
const before = (a, b) => typeof a == typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a == "number" ? -1 : 1;
for (const head of document.querySelectorAll("thead th")) {
  head.tabIndex = 0;
  head.onclick = () => {
    const rising = head.ariaSort != "ascending", place = head.cellIndex;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.ariaSort = rising ? "ascending" : "descending";
    for (const body of head.closest("table").tBodies) {
      const rows = [...body.rows].filter(row => row.className != "group");
      rows.sort((a, b) => (rising ? 1 : -1) * before(value(a.cells[place]), value(b.cells[place])));
      body.append(...rows);
    }
  };
  head.onkeydown = event => event.key == "Enter" && head.onclick();
}
for (const field of document.querySelectorAll("input")) field.oninput = () => {
  const words = field.value.toLowerCase().split(" ");
  for (const body of field.parentNode.querySelectorAll("tbody")) for (const row of body.rows) {
    const text = (body.rows[0].innerText + " " + row.innerText).toLowerCase();
    row.hidden = row.className != "group" && !words.every(word => text.includes(word));
  }
};
const open = () => document.querySelectorAll("details").forEach(each => each.open = true);
addEventListener("beforeprint", open);
"""


class Section:
    """A heading with the parts under it, in order: text, tables and figures."""

    def __init__(self, title: str):
        self.title, self.name = title, "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
        self.parts: list[str | Callable[[], str]] = []  # functions are called when the page is made

    def body(self) -> str:
        return "\n".join(part if isinstance(part, str) else part() for part in self.parts)

    def text(self, *paragraphs: str, kind: str = "") -> "Section":
        self.parts += [f"<p{f' class={kind}' * bool(kind)}>{escape(paragraph)}</p>" for paragraph in paragraphs]
        return self

    def code(self, text: str) -> "Section":
        self.parts.append(f"<pre>{escape(text)}</pre>")
        return self

    def points(self, items: Sequence[str]) -> "Section":
        if items:
            self.parts.append("<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>")
        return self

    def table(self, table: Table, folded: bool = False) -> "Section":
        if len(table.frame):
            search = f'<input type="search" placeholder="filter" aria-label="filter: {escape(table.title)}">'
            about = f'<p class="caption" id="about-{table.name}">{escape(table.caption)}</p>\n'
            wide = search * (len(table.frame) >= _LONG) + f'<div class="wide">{_table(table)}</div>'
            data = f'<p class="data">{_download(table.name, table.frame)}</p>'
            body = f"{about}<div>{wide}</div>\n{data}"
            self.parts.append(_part(table.title, f"title-{table.name}", body, folded))
        return self

    def figure(self, drawing: Drawing, svg: str | Callable[[], str], folded: bool = False) -> "Section":
        def part() -> str:
            head, rest = (svg if isinstance(svg, str) else svg()).split(">", 1)
            alt = escape(drawing.alt)
            image = f'{head} role="img" aria-label="{alt}">\n<title>{alt}</title>{rest}'
            body = (
                f'<figure id="figure-{drawing.name}">\n<div class="wide">{image}</div>\n'
                f"<figcaption>{escape(drawing.caption)}</figcaption>\n"
                f'<p class="data">{_download(drawing.name, drawing.frame)}</p>\n</figure>'
            )
            return _part(drawing.title, f"of-{drawing.name}", body, folded)

        self.parts.append(part)
        return self


def _part(title: str, name: str, body: str, folded: bool) -> str:
    if folded:
        return f'<details class="part"><summary id="{name}">{escape(title)}</summary>\n{body}\n</details>'
    return f'<h3 id="{name}">{escape(title)}</h3>\n{body}'


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The whole page; it names no address outside itself."""
    sections = [section for section in sections if section.parts]
    links = "\n".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in sections)
    body = "\n".join(
        f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n' + section.body() + "\n</section>"
        for section in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n"
        f"<h1>{escape(title)}</h1>\n"
        f'<p>{escape(introduction)}</p>\n</header>\n<nav aria-label="Sections">\n{links}\n</nav>\n'
        f"<main>\n{body}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    rows = table.frame.to_dict("records")
    cells = [[column.of(row) for column in table.columns] for row in rows]
    numbers = [all(re.match(r"[−\d—∞]|default|$", cell) for cell in column) for column in zip(*cells, strict=True)]
    kinds = [' class="number"' if number else "" for number in numbers]
    lines, group = [], None
    for row, shown in zip(rows, cells, strict=True):
        if table.group and row[table.group] != group:
            group = row[table.group]
            heading = f'<th scope="rowgroup" class="group" colspan="{len(kinds)}">{escape(str(group))}</th>'
            lines.append(f'</tbody><tbody>\n<tr class="group">{heading}</tr>')
        first, *others = (escape(cell).replace("\n", "<br>") for cell in shown)
        data = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], others, strict=True))
        lines.append(f'<tr><th scope="row"{kinds[0]}>{first}</th>{data}</tr>')
    pairs = zip(table.columns, kinds, strict=True)
    heads = "".join(f'<th scope="col"{kind}>{escape(column.header)}</th>' for column, kind in pairs)
    return (
        f'<table aria-labelledby="title-{table.name}" aria-describedby="about-{table.name}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
    )


def _download(name: str, frame: pd.DataFrame) -> str:
    packed = base64.b64encode(gzip.compress(to_csv(frame).encode(), mtime=0)).decode()
    return f'<a download="{name}.csv.gz" href="data:application/gzip;base64,{packed}">{name}.csv.gz</a>'
