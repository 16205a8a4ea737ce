"""One self-contained HTML page from what experiments wrote: tables and pictures inline, no scripts, no other files.

Every text is escaped here; callers give plain text, of any content.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["contents", "page", "paragraph", "picture", "section", "table", "verdict_cards"]

Row = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
img { width: 100%; min-width: 40rem; background: white; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border: 1px solid var(--line); padding: 0.2rem 0.5rem; text-align: left; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.faint { color: var(--faint); font-size: 0.85rem; }
.card { border: 1px solid var(--line); border-left: 0.4rem solid var(--faint); padding: 0.5rem 0.8rem; }
.card { margin: 0.7rem 0; }
.card p { margin: 0.2rem 0; }
.holds { border-left-color: #2a7f3f; }
.holds-partly { border-left-color: #b07a00; }
.does-not-hold { border-left-color: #b3261e; }
pre, code { white-space: pre-wrap; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return the whole document, which can be encoded as UTF-8: what cannot is shown as an escape."""
    document = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
    return document.encode("utf-8", "backslashreplace").decode("utf-8")


def contents(entries: Iterable[tuple[str, str]]) -> str:
    """Return a list of links to sections: the name of each, and what is said of it."""
    lines = [f'<li><a href="#{_link(name)}">{_text(name)}</a>: {_text(said)}</li>' for name, said in entries]
    return "<ul>\n" + "\n".join(lines) + "\n</ul>"


def section(name: str, title: str, body: Iterable[str]) -> str:
    """Return a part of the page with a heading that can be linked to."""
    return f'<section id="{_text(name)}">\n<h2>{_text(title)}</h2>\n' + "\n".join(body) + "\n</section>"


def paragraph(text: str, *, faint: bool = False) -> str:
    """Return a paragraph of plain text."""
    return f"<p{' class=' + chr(34) + 'faint' + chr(34) if faint else ''}>{_text(text)}</p>"


def picture(path: Path, description: str) -> str:
    """Return a PNG file inline; on a narrow screen it scrolls by itself, so that its text can be read."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    source = f"data:image/png;base64,{data}"
    return f'<div class="wide"><img src="{source}" alt="{_text(description)}"></div>'


def table(rows: Sequence[Row], title: str) -> str:
    """Return rows as a table that is folded away at first and scrolls by itself where it is wide."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_text(str(key).replace('_', ' '))}</th>" for key in columns)
    body = "\n".join(f"<tr>{''.join(_cell(row.get(key)) for key in columns)}</tr>" for row in rows)
    parts = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    summary = f"<summary>{_text(title)}: {len(rows)} rows</summary>"
    return f'<details>{summary}\n<div class="wide"><table>\n{parts}\n</table></div></details>'


def verdict_cards(rows: Iterable[Row]) -> str:
    """Return the rows of the claims ledger, each as a card that a narrow screen can show."""
    cards = []
    for row in rows:
        lines = [
            f"<p><strong>{_text(row['statement'])}</strong> ({_text(row['origin'])})</p>",
            f"<p><em>{_text(row['verdict'])}</em>: {_text(row['measured'] or row['reason'])}</p>",
        ]
        if row["measured"] and row["reason"]:
            lines.append(f"<p>{_text(row['reason'])}</p>")
        published = f"published: {row['published']} ({row['source']}); measured by {row['command']}"
        if row.get("device"):
            published += f" on {row['device']}, commit {row['commit']}, {row['date']}"
        lines.append(paragraph(published, faint=True))
        colour = re.sub("[^a-z]+", "-", str(row["verdict"]).lower())  # a class of the style, if it is a known verdict
        cards.append(f'<div class="card {colour}">\n' + "\n".join(lines) + "\n</div>")
    return "\n".join(cards)


def _link(name: Any) -> str:
    """Return a section's name as a link spells it; what UTF-8 has no bytes for is the escape that `page` shows."""
    return quote(_plain(name).encode("utf-8", "backslashreplace"))


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "<td>–</td>"
    if isinstance(value, float):
        text = f"{value:.4g}" if math.isfinite(value) and abs(value) < 1e5 else f"{value:,.0f}"
        return f'<td class="number">{text}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{_text(value)}</td>"


def _text(value: Any) -> str:
    """Return a value as text that cannot become markup, between tags or in an attribute in double quotes."""
    return html.escape(_plain(value), quote=True)


def _plain(value: Any) -> str:
    return "" if value is None else str(value)
