"""What the site shows besides docs/: the documents of the root, and the pictures and tables that documents link to."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "kernels-hub.md",
    **{
        path.relative_to(ROOT).as_posix(): f"kernels-{path.parent.name}.md"
        for path in sorted(ROOT.glob("kernels/spectrumkv_kernels/*/README.md"))
    },
}
LINK = re.compile(r"(?<=\]\()[^)#\s]+")


def moved(text: str, folder: str) -> str:
    """The text of a document in `folder` of the repository, with its links as they are on the site.

    There docs/ and the root are one folder.
    """

    def link(found: re.Match[str]) -> str:
        target = found[0]
        if "://" in target:
            return target
        place = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
        return PAGES.get(place, place.removeprefix("docs/"))

    return LINK.sub(link, text)


def on_files(files: Files, config: Any) -> Files:
    texts = {
        page: moved((ROOT / name).read_text(encoding="utf-8"), str(Path(name).parent)) for name, page in PAGES.items()
    }
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    own = (moved(path.read_text(encoding="utf-8"), "docs") for path in (ROOT / "docs").glob("*.md"))
    linked = {target for text in (*texts.values(), *own) for target in LINK.findall(text)}
    for target in linked:
        if not target.endswith(".md") and (ROOT / target).is_file():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Documents of docs/ itself; those in its folders link to nothing outside."""
    source = page.file.src_uri
    return markdown if "/" in source or source in PAGES.values() else moved(markdown, "docs")
