"""One HTML page that stands alone: tables, figures as inline SVG, the data behind each as a link within the page."""

import base64
from html import escape

import pandas as pd

from steppe.scripts.report.drawing import Drawing
from steppe.scripts.report.tables import Table, to_csv

_LONGEST = 400  # rows of data shown as a table; more are only in the CSV
_STYLE = """
body { font: 15px/1.45 system-ui, "Helvetica Neue", Arial, sans-serif; color: #000; background: #fff; max-width: 76rem;
  margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; border-bottom: 2px solid #000; padding-bottom: 0.2rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.2rem; }
p, figcaption, .caption { max-width: 60rem; }
.caption, figcaption, nav { color: #333; font-size: 0.9rem; }
nav a { margin-right: 1rem; }
/* a table that goes on is shaded at that side, as long as there is more of it */
.wide { overflow-x: auto; background:
  linear-gradient(to right, #fff 30%, #fff0) left / 3rem 100% local no-repeat,
  linear-gradient(to left, #fff 30%, #fff0) right / 3rem 100% local no-repeat,
  linear-gradient(to right, #0005, #0000) left / 1.1rem 100% scroll no-repeat,
  linear-gradient(to left, #0005, #0000) right / 1.1rem 100% scroll no-repeat; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.5rem 0; }
th, td { padding: 0.22rem 0.6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #000; vertical-align: bottom; }
th.group { padding-top: 0.9rem; background: #f3f3f3b0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
tbody th[scope=row] { font-weight: normal; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; }
details { margin: 0.3rem 0; font-size: 0.9rem; }
summary { cursor: pointer; }
a { color: #0050a0; }
a:focus-visible, summary:focus-visible { outline: 3px solid #E69F00; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .data { display: none; }
  h2, h3, .caption, thead, tr.group { break-after: avoid; }
  tbody tr:nth-child(-n+3), tr.group + tr { break-after: avoid; } /* no row alone below a heading, */
  tbody tr:nth-last-child(-n+3) { break-before: avoid; } /* or at the top of a page */
  figure, tr { break-inside: avoid; }
  .wide { overflow: visible; background: none; }
  table { font-size: 7.5pt; }
  th, td { padding: 1pt 4pt; }
  td.number { white-space: normal; }
  figure svg { max-height: 165mm; }
}
"""


class Section:
    """A heading with what stands under it, in order: text, tables and figures."""

    def __init__(self, title: str):
        self.title, self.name = title, "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
        self.parts: list[str] = []

    def text(self, *paragraphs: str) -> "Section":
        self.parts += [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs if paragraph]
        return self

    def points(self, items: list[str]) -> "Section":
        if items:
            self.parts.append("<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>")
        return self

    def table(self, table: Table) -> "Section":
        if len(table.frame):
            self.parts.append(
                f'<h3 id="title-{table.name}">{escape(table.title)}</h3>\n'
                f'<p class="caption" id="about-{table.name}">{escape(table.caption)}</p>\n'
                f'<div class="wide">{_table(table)}</div>\n<p class="data">{_download(table.name, table.frame)}</p>'
            )
        return self

    def figure(self, drawing: Drawing | None, svg: str) -> "Section":
        if drawing is not None:
            self.parts.append(
                f'<h3>{escape(drawing.title)}</h3>\n<figure id="figure-{drawing.name}">\n'
                f"{_described(svg, drawing.alt)}\n"
                f"<figcaption>{escape(drawing.caption)}</figcaption>\n{_data(drawing)}\n</figure>"
            )
        return self


def page(title: str, introduction: str, sections: list[Section]) -> str:
    """The whole page; it names no address outside itself."""
    sections = [section for section in sections if section.parts]
    links = "\n".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in sections)
    body = "\n".join(
        f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n' + "\n".join(section.parts) + "\n</section>"
        for section in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n"
        f"<h1>{escape(title)}</h1>\n"
        f'<p>{escape(introduction)}</p>\n</header>\n<nav aria-label="Sections">\n{links}\n</nav>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col"{_class(column.number)}>{escape(column.header)}</th>' for column in table.columns)
    lines, group = [], None
    for row in table.frame.to_dict("records"):
        if table.group and row[table.group] != group:
            group = row[table.group]
            lines.append(
                f'<tr class="group"><th scope="rowgroup" class="group" colspan="{len(table.columns)}">'
                f"{escape(str(group))}</th></tr>"
            )
        cells = []
        for number, column in enumerate(table.columns):
            kind = 'th scope="row"' if number == 0 else "td"
            shown = escape(column.of(row)).replace("\n", "<br>")
            cells.append(f"<{kind}{_class(column.number)}>{shown}</{kind.split()[0]}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<table aria-labelledby="title-{table.name}" aria-describedby="about-{table.name}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
    )


def _class(number: bool) -> str:
    return ' class="number"' if number else ""


def _described(svg: str, alt: str) -> str:
    """The <svg> as one image with a text for those who do not see it."""
    head, rest = svg.split(">", 1)
    return f'{head} role="img" aria-label="{escape(alt, quote=True)}">\n<title>{escape(alt)}</title>{rest}'


def _download(name: str, frame: pd.DataFrame) -> str:
    text = base64.b64encode(to_csv(frame).encode()).decode()
    return f'<a download="{name}.csv" href="data:text/csv;charset=utf-8;base64,{text}">{name}.csv</a>'


def _data(drawing: Drawing) -> str:
    frame, shown = drawing.frame, ""
    if len(frame) <= _LONGEST:
        heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in frame)
        lines = "\n".join(
            "<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row) + "</tr>"
            for row in frame.itertuples(index=False, name=None)
        )
        shown = f'\n<div class="wide"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    return (
        f'<details class="data"><summary>Data behind this figure ({len(frame)} rows)</summary>\n'
        f"<p>{_download(drawing.name, frame)}</p>{shown}\n</details>"
    )


def _cell(value) -> str:
    return "" if pd.isna(value) else f"{value:.6g}" if isinstance(value, float) else str(value)
