"""Bring the repository's own pages into the site, and what any page links to outside docs/.

On GitHub and in an editor, README.md links to docs/models.md and a page to a file of figures. Here
both must lead somewhere too: README.md becomes the first page, and a linked file of the repository
is copied below `files/`. A link to nothing is left as it is, and `strict` refuses it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|/|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, then follow every page's links through the repository."""
    root = Path(config.config_file_path).parent
    waiting = {name: place for name, place in ROOT_PAGES.items() if (root / name).is_file()}
    waiting |= {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    done: dict[str, str] = {}
    while waiting:
        source, place = waiting.popitem()
        done[source] = place
        text = (root / source).read_text()
        found = {target: posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
                 for target, _ in LINK.findall("".join(FENCE.split(text)[::2]))}  # fmt: skip
        for target in found.values():
            if target not in done and target not in waiting and _linkable(root, target):
                waiting |= _bring(root, target, files, config)
        known = done | waiting
        places = {link: _where(root, target, known) for link, target in found.items()}
        text = _relinked(text, places, posixpath.dirname(place) or ".")
        _write(place, text, files, config)
    return files


def _linkable(root: Path, target: str) -> bool:
    return not target.startswith(("..", "docs/")) and (root / target).exists()


def _bring(root: Path, target: str, files: Files, config: MkDocsConfig) -> dict[str, str]:
    """Copy a linked file, or make a page of a linked folder; give the pages still to be read."""
    if target.endswith(".md"):
        return {target: f"files/{target}"}
    inside = sorted(p for p in (root / target).rglob("*") if p.is_file())
    for path in inside or [root / target]:
        uri = f"files/{path.relative_to(root).as_posix()}"
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    if inside:
        names = [path.relative_to(root / target).as_posix() for path in inside]
        lines = [f"# {posixpath.basename(target)}", "", *(f"- [{name}]({name})" for name in names)]
        _write(_place_of(root, target), "\n".join(lines), files, config)
    return {}


def _place_of(root: Path, target: str) -> str:
    """Give the place in the site of something outside docs/ that is linked to."""
    return f"files/{target}/index.md" if (root / target).is_dir() else f"files/{target}"


def _where(root: Path, target: str, known: dict[str, str]) -> str:
    if target in known:
        return known[target]
    return _place_of(root, target) if _linkable(root, target) else target.removeprefix("docs/")


def _relinked(text: str, places: dict[str, str], here: str) -> str:
    def new(link: re.Match[str]) -> str:
        return posixpath.relpath(places[link[1]], here) + (link[2] or "")

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(new, part) for part in parts[::2]]
    return "".join(parts)


def _write(place: str, text: str, files: Files, config: MkDocsConfig) -> None:
    page = files.get_file_from_path(place)
    if page is None:
        files.append(page := File.generated(config, place, content=text))
    page.content_string = text
