"""One self-contained HTML page from what experiments wrote: tables and pictures inline, no scripts, no other files."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["page", "paragraph", "picture", "section", "table", "verdict_cards"]

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
    """Return the whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def section(name: str, title: str, body: Iterable[str]) -> str:
    """Return a part of the page with a heading that can be linked to."""
    return f'<section id="{html.escape(name)}">\n<h2>{html.escape(title)}</h2>\n' + "\n".join(body) + "\n</section>"


def paragraph(text: str, *, faint: bool = False) -> str:
    """Return a paragraph of plain text."""
    return f"<p{' class=' + chr(34) + 'faint' + chr(34) if faint else ''}>{html.escape(text)}</p>"


def picture(path: Path, description: str) -> str:
    """Return a PNG file inline; on a narrow screen it scrolls by itself, so that its text can be read."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    source = f"data:image/png;base64,{data}"
    return f'<div class="wide"><img src="{source}" alt="{html.escape(description, quote=True)}"></div>'


def table(rows: Sequence[Row], title: str) -> str:
    """Return rows as a table that is folded away at first and scrolls by itself where it is wide."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in columns)
    body = "\n".join(f"<tr>{''.join(_cell(row.get(key)) for key in columns)}</tr>" for row in rows)
    parts = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    summary = f"<summary>{html.escape(title)}: {len(rows)} rows</summary>"
    return f'<details>{summary}\n<div class="wide"><table>\n{parts}\n</table></div></details>'


def verdict_cards(rows: Iterable[Row]) -> str:
    """Return the rows of the claims ledger, each as a card that a narrow screen can show."""
    cards = []
    for row in rows:
        lines = [
            f"<p><strong>{html.escape(row['statement'])}</strong> ({html.escape(row['origin'])})</p>",
            f"<p><em>{html.escape(row['verdict'])}</em>: {html.escape(row['measured'] or row['reason'])}</p>",
        ]
        if row["measured"] and row["reason"]:
            lines.append(f"<p>{html.escape(row['reason'])}</p>")
        published = f"published: {row['published']} ({row['source']}); measured by {row['command']}"
        if row.get("device"):
            published += f" on {row['device']}, commit {row['commit']}, {row['date']}"
        lines.append(paragraph(published, faint=True))
        cards.append(f'<div class="card {row["verdict"].replace(" ", "-")}">\n' + "\n".join(lines) + "\n</div>")
    return "\n".join(cards)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "<td>–</td>"
    if isinstance(value, float):
        text = f"{value:.4g}" if math.isfinite(value) and abs(value) < 1e5 else f"{value:,.0f}"
        return f'<td class="number">{text}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"
