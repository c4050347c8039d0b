"""Checks that the relative links of the Markdown pages lead to a file, and to a heading of it (`make verify-docs`)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "benchmarks/**/*.md", "clients/**/*.md", "deploy/**/*.md", "docs/**/*.md")

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def broken_links(root: Path) -> Iterator[str]:
    """One line for each link that leads nowhere."""
    for page in sorted({page for pattern in PAGES for page in root.glob(pattern) if "node_modules" not in page.parts}):
        text = _CODE.sub("", _FENCE.sub("", page.read_text()))
        for match in _LINK.finditer(text):
            link = match[1] or match[2]
            if not _SCHEME.match(link) and not _leads_somewhere(root, page, link):
                yield f"{page.relative_to(root)}: {link} leads nowhere"


def _leads_somewhere(root: Path, page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or not target.is_relative_to(root.resolve()):
        return False
    return not anchor or target.suffix != ".md" or anchor in _anchors(target.read_text())


def _anchors(text: str) -> set[str]:
    """The anchors that Git hosts give to headings: lower case, hyphens for spaces, no punctuation."""
    headings = _HEADING.findall(_FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def main() -> int:
    """Prints the broken links. The exit code is 1 if there are any."""
    broken = list(broken_links(ROOT))
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
