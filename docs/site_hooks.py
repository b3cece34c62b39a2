"""What mkdocs asks when it builds the site: pages that are made join those of docs/site."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# mkdocs runs this file by its path, outside of the package.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from mkdocs.structure.files import File, Files  # noqa: E402

from docs import pages  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Every page is taken from `docs.pages`, those of docs/site too: their links are led there."""
    site = pages.site()
    found = pages.broken_links(site.pages, site.pictures)
    if found:
        raise SystemExit("links that lead nowhere:\n" + "\n".join(found))
    for name, text in site.pages.items():
        existing = files.get_file_from_path(name)
        if existing is not None:
            files.remove(existing)
        files.append(File.generated(config, name, content=text))
    for name, path in site.pictures.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
