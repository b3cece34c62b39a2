"""The pages of the site: those of docs/site, and those made from the repository's own pages and
from the code, so that nothing is written twice.

A page of the repository keeps its text; its links are led to the site's pages, or left out where
they lead to a file that is none.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"


class Part(NamedTuple):
    """A page of the site that is a part of a page of the repository."""

    page: str  # of the repository
    headings: tuple[str, ...] = ()  # its sections of this level-2 name; none: all of it
    title: str | None = None  # none: as it begins there


# Page of the site -> where it comes from.
PARTS = {
    "readme.md": Part("README.md", title="The project's first page"),
    "reference/losses.md": Part("REFERENCE.md", ("Losses",), "Losses"),
    "reference/formats.md": Part("REFERENCE.md", ("Formats of rows",), "Data formats"),
    "reference/settings.md": Part("REFERENCE.md", ("Settings",), "Settings"),
    "reference/memory.md": Part("REFERENCE.md", ("Memory",), "The memory plan"),
    "reference/metrics.md": Part("REFERENCE.md", ("Metrics",), "Metrics"),
    "reference/after.md": Part("REFERENCE.md", ("After a run",), "After a run"),
    "reference/trl.md": Part(
        "REFERENCE.md", ("Where fasttr differs from TRL 1.16", "Keys of TRL"), "Beside TRL"
    ),
    "ops.md": Part("kernels/README.md"),
    "on_policy.md": Part("ON_POLICY.md"),
    "many_gpus.md": Part("MANY_GPUS.md"),
    "benchmarks.md": Part("bench/README.md"),
    "studies.md": Part("bench/paper/README.md"),
    "contributing.md": Part("CONTRIBUTING.md"),
    "changelog.md": Part("CHANGELOG.md"),
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|^(?: {4}|\t).*?$)", re.DOTALL | re.MULTILINE)


class Site(NamedTuple):
    """What is built: text of pages and places of pictures, by their address on the site."""

    pages: dict[str, str]
    pictures: dict[str, Path]


def site() -> Site:
    """Every page and picture. A docs/site page that has the name of a made one is an error."""
    from docs.ops_page import ops_page

    made: dict[str, Callable[[], str]] = {"reference/ops.md": ops_page}
    pages = {name: make() for name, make in made.items()}
    pictures: dict[str, Path] = {}
    for name, part in PARTS.items():
        pages[name] = _page(name, part, pictures)
    for path in sorted(SITE.rglob("*.md")):
        name = path.relative_to(SITE).as_posix()
        if name in pages:
            raise ValueError(f"docs/site/{name}: got a page that is made; wanted another name")
        text = path.read_text()
        pages[name] = _with_places(text, name, f"docs/site/{name}", pictures)
    return Site(pages, pictures)


def _page(name: str, part: Part, pictures: dict[str, Path]) -> str:
    text = (ROOT / part.page).read_text()
    text = re.sub(r"<!-- /?[\w:]+ -->\n?", "", text)
    if part.headings:
        sections = _sections(text)
        text = "\n".join(sections[heading] for heading in part.headings)
        if len(part.headings) == 1:
            text = text.split("\n", 1)[1]
            text = re.sub(r"^#(#+ )", r"\1", text, flags=re.MULTILINE)
        text = f"# {part.title}\n\n{text}"
    elif part.title is not None:
        text = re.sub(r"\A# .*\n", f"# {part.title}\n", text)
    return _with_places(text, name, part.page, pictures)


def _sections(text: str) -> dict[str, str]:
    """The level-2 sections of a page, each with its heading."""
    pieces = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return {piece.split("\n", 1)[0].removeprefix("## ").strip(): piece for piece in pieces[1:]}


def _with_places(text: str, name: str, source: str, pictures: dict[str, Path]) -> str:
    """The text with its links and pictures as they lie on the site. Code stays as it is."""
    pieces = CODE.split(text)
    for number in range(0, len(pieces), 2):
        piece = PICTURE.sub(lambda m: _picture(m, name, source, pictures), pieces[number])
        pieces[number] = LINK.sub(lambda m: _link(m, name, source), piece)
    return "".join(pieces)


def _picture(match: re.Match[str], name: str, source: str, pictures: dict[str, Path]) -> str:
    path = _in_repository(source, match[2])
    place = f"pictures/{path.replace('/', '-')}"
    pictures[place] = ROOT / path
    return f"![{match[1]}]({_relative(place, name)})"


def _link(match: re.Match[str], name: str, source: str) -> str:
    text, target = match[1], match[2]
    if "://" in target or target.startswith(("#", "mailto:")):
        return match[0]
    path, _, anchor = target.partition("#")
    if source.startswith("docs/site/"):
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        if inside in PARTS or inside == "reference/ops.md" or (SITE / inside).is_file():
            return match[0]
    place = _place_of(_in_repository(source, path), anchor)
    if place is None:
        return f"`{text.strip('`')}`"  # a file of the repository
    page, anchor = place
    return f"[{text}]({_relative(page, name)}{'#' + anchor if anchor else ''})"


def _in_repository(source: str, target: str) -> str:
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / path).exists():
        raise ValueError(f"{source}: got a link to {target}, which is not there")
    return path


def _place_of(path: str, anchor: str) -> tuple[str, str] | None:
    """(page, anchor) of the site for a page of the repository, or None."""
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    homes = [name for name, part in PARTS.items() if part.page == path]
    if not homes:
        return None
    for name in homes:
        for heading in PARTS[name].headings:
            if slug(heading) == anchor:
                return name, "" if len(PARTS[name].headings) == 1 else anchor
    return homes[0], anchor


def _relative(place: str, name: str) -> str:
    return os.path.relpath(place, posixpath.dirname(name) or ".").replace(os.sep, "/")


def slug(heading: str) -> str:
    """The anchor of a heading, as Markdown's table of contents makes it."""
    text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def broken_links(pages: dict[str, str], pictures: dict[str, Path]) -> list[str]:
    """Links and pictures that lead nowhere on the site, each in a line."""
    anchors = {name: _anchors(text) for name, text in pages.items()}
    found = []
    for name, text in pages.items():
        prose = "".join(CODE.split(text)[::2])
        for match in PICTURE.finditer(prose):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), match[2]))
            if place not in pictures or not pictures[place].is_file():
                found.append(f"{name}: picture {match[2]}")
        for match in LINK.finditer(prose):
            target = match[2]
            if "://" in target or target.startswith("mailto:"):
                continue
            path, _, anchor = target.partition("#")
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            page = place if path else name
            if page not in pages:
                found.append(f"{name}: {target}")
            elif anchor and anchor not in anchors[page]:
                found.append(f"{name}: {target} (no such heading)")
    return found


def _anchors(text: str) -> set[str]:
    prose = "".join(CODE.split(text)[::2])
    return {slug(match[1]) for match in re.finditer(r"^#+ (.*)$", prose, re.MULTILINE)}
