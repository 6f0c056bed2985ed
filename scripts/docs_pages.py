"""Hook of MkDocs: pages of the site that stand outside docs/, and links that lead out of docs/.

On a code host the links in Markdown files name files of the repository. On the site a link to a page leads to that
page, and of a link to any other file only its text is kept.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "config/README.md": "configuration.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make links between files of the repository links between pages."""
    sources = {name: source for source, name in OUTSIDE.items()}
    folder = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        found = OUTSIDE.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(found) is None or not (path in OUTSIDE or path.startswith("docs/")):
            return text
        return f"{image}[{text}]({found}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, markdown)
