"""Add pages to the site that live elsewhere in the repository: start page, results, changelog …"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "analysis/RESULTS.md": "results.md",
    "analysis/RESULTS-details.md": "results-details.md",
    "analysis/README.md": "studies.md",
    "tests/benchmarks/README.md": "benchmarks.md",
}
ADDRESS = re.compile(r'(?:href|src)="([^"#]*)(?:#([^"]*))?"')
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add each page with its links rewritten to the site, and the pictures that it shows."""
    for source, target in PAGES.items():
        file = ROOT / source
        if not file.is_file():
            continue
        text = LINK.sub(
            lambda match, file=file: _on_site(match, file, files, config), file.read_text("utf-8")
        )
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links that leave the folder of pages, as from docs/ to CONTRIBUTING.md, to the site."""
    if page.file.abs_src_path is None:
        return markdown
    file = Path(page.file.abs_src_path)
    return LINK.sub(
        lambda match: _on_site(match, file, files, config) if match[2][:3] == "../" else match[0],
        markdown,
    )


def on_post_build(config: Any) -> None:
    """Refuse a site with a broken link; mkdocs overlooks those that leave the folder of pages."""
    site = Path(config.site_dir)
    pages = {
        file: file.read_text("utf-8") for file in site.rglob("*.html") if file.name != "404.html"
    }
    ids = {file: set(re.findall(r'\bid="([^"]+)"', text)) for file, text in pages.items()}
    broken = []
    for file, text in pages.items():
        for address, anchor in ADDRESS.findall(text):
            if ":" in address:
                continue
            target = (file.parent / unquote(html.unescape(address))).resolve() if address else file
            target = target / "index.html" if target.is_dir() else target
            is_there = target.is_file() and (
                not anchor or anchor[:2] == "__" or unquote(anchor) in ids.get(target, {anchor})
            )
            if not is_there:
                broken.append(f"{file.relative_to(site)}: {address}#{anchor}")
    if broken:
        raise PluginError("broken links: " + "; ".join(broken))


def _on_site(match: re.Match[str], page: Path, files: Files, config: Any) -> str:
    """Return a link as the site needs it; files that are not on the site become code."""
    label, address, anchor = match[1], match[2], match[3] or ""
    if "://" in address:
        return match[0]
    path = (page.parent / address).resolve()
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return f"{label}({PAGES[name]}{anchor})"
    if name.startswith("docs/"):
        return f"{label}({name.removeprefix('docs/')}{anchor})"
    if path.suffix in (".png", ".svg"):
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(path)))
        return f"{label}({name})"
    return label.strip("[]") if label.startswith("[`") else f"`{name}`"
