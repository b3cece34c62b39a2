"""Pieces of a page: everything is in the file itself, and every text is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #666; --line: #ddd; --tint: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1.5rem 1rem 4rem; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 75ch; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .6rem; }
.tile { background: var(--tint); border-radius: 6px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.figures img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); max-width: 15rem; }
td { font-variant-numeric: tabular-nums; overflow-wrap: break-word; min-width: 4.5rem;
  max-width: 60ch; }
.samples { table-layout: fixed; min-width: 720px; width: 100%; }
.samples td, .samples tbody th { white-space: pre-wrap; font-size: .86rem;
  overflow-wrap: anywhere; padding-right: .9rem; }
code, pre { font: .86rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--tint); border-radius: 6px; padding: .6rem .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre.drawn { white-space: pre; overflow-x: auto; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
section.run { border-top: 2px solid var(--line); margin-top: 2.5rem; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML file."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def text(value: Any) -> str:
    """Escaped; characters that cannot be seen are shown as \\x.."""
    visible = "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode()
        for one in str(value)
    )
    return html.escape(visible)


def heading(level: int, words: str) -> str:
    return f"<h{level}>{text(words)}</h{level}>"


def paragraph(words: str, soft: bool = False) -> str:
    return f'<p class="soft">{text(words)}</p>' if soft else f"<p>{text(words)}</p>"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    css_class: str = "",
    first_is_head: bool = True,
) -> str:
    """A table that scrolls by itself where the page is narrow."""
    lines = [f'<div class="scroll"><table class="{css_class}">']
    if head:
        lines.append("<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>")
    for row in rows:
        cells = [f"<td>{text(cell)}</td>" for cell in row]
        if first_is_head:
            cells[0] = f"<th>{text(row[0])}</th>"
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """(number, what it is) side by side."""
    shown = [f'<div class="tile"><b>{text(a)}</b><span>{text(b)}</span></div>' for a, b in facts]
    return f'<div class="tiles">{"".join(shown)}</div>'


def figures(drawn: dict[str, Any]) -> str:
    """matplotlib Figures by name, as vector images inside the page."""
    images = [
        f'<img alt="{text(name)}" src="data:image/svg+xml;base64,{_svg(figure)}">'
        for name, figure in drawn.items()
    ]
    return f'<div class="figures">{"".join(images)}</div>'


def preformatted(lines: Iterable[str], css_class: str = "") -> str:
    """Lines as they are; of class `drawn` they are never broken, and scroll where the page is
    narrow."""
    return f'<pre class="{css_class}">{text(chr(10).join(lines))}</pre>'


def folded(summary: str, inside: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{inside}</details>"


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    # Without a date the same run gives the same page.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()
