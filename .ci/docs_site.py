"""Build the documentation as a site in ``build/site``; ``make docs-site``.

README.md is its first page. What the pages link outside of ``docs`` (code, examples) has no page, so such a link
becomes the path in words. Fails where a page is not in the navigation, a link or an anchor leads nowhere, or the site
would load something from another host.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
PAGES = REPO / "build" / "site-pages"
SITE = REPO / "build" / "site"
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_LOADED = re.compile(
    r'<(?:script|img|iframe)[^>]*\ssrc="https?://|<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="https?://|url\(["\']?https?://'
)


def as_page(text: str, page: Path) -> str:
    """The Markdown of ``page`` with its links as the site has them."""

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found[1], found[2], found[3] or ""
        target = (page.parent / path).resolve()
        docs = REPO / "docs"
        if target == REPO / "README.md":
            return f"[{words}]({_up(page)}index.md{anchor})"
        if target.suffix in (".md", ".png") and target.is_relative_to(docs):
            below = target.relative_to(docs)
            return f"[{words}]({_up(page)}{below}{anchor})"
        shown = target.relative_to(REPO)
        return words if str(shown) in words else f"{words} (`{shown}`)"

    return _LINK.sub(link, text)


def _up(page: Path) -> str:
    """From a page to the root of the site's pages."""
    return "" if page.parent == REPO else "../" * (len(page.relative_to(REPO / "docs").parts) - 1)


def lay_out() -> None:
    """The pages that mkdocs reads, in :data:`PAGES`."""
    shutil.rmtree(PAGES, ignore_errors=True)
    sources = {PAGES / path.relative_to(REPO / "docs"): path for path in (REPO / "docs").rglob("*.md")}
    sources[PAGES / "index.md"] = REPO / "README.md"
    for made, source in sources.items():
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(as_page(source.read_text(encoding="utf-8"), source), encoding="utf-8")
    for picture in (REPO / "docs").rglob("*.png"):
        shutil.copy(picture, PAGES / picture.relative_to(REPO / "docs"))


def loaded_from_elsewhere() -> list[str]:
    """Pages and styles of the site that would load a file of another host."""
    files = [path for kind in ("*.html", "*.css") for path in SITE.rglob(kind)]
    return [str(path.relative_to(SITE)) for path in files if _LOADED.search(path.read_text(encoding="utf-8"))]


def main(mkdocs: str) -> int:
    lay_out()
    command = [mkdocs, "build", "--strict", "--config-file", str(REPO / "mkdocs.yml")]
    # Or else it advertises its successor at each build.
    if subprocess.run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False).returncode != 0:
        return 1
    if found := loaded_from_elsewhere():
        print(f"loads from another host: {', '.join(found)}")
        return 1
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(REPO)}; open {SITE / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
