"""Lays `spectrumkv_kernels` out as Hugging Face's kernel-builder and its loader take it.

`python kernels/hub_layout.py FOLDER` makes a folder with what the builder reads: build.toml, flake.nix, the card, and
sources in `torch-ext`, where it would follow no link. The loader needs no builder: it takes `build` in that folder.
"""

import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent


def lay_out(target: Path, source: Path = HERE) -> None:
    """Make the folder.

    A build's id is the name under which the loader imports it. It has a checksum of all files in it, so that versions
    which differ are different modules.

    Args:
        target: Does not exist.
        source: The folder with build.toml and the package.
    """
    config = tomllib.loads((source / "build.toml").read_text(encoding="utf-8"))
    general, suffixes = config["general"], config["torch-noarch"]["pyext"]
    name = general["name"].replace("-", "_")
    package = source / name
    files = sorted(path.relative_to(package) for path in package.rglob("*") if path.suffix[1:] in suffixes)
    contents = hashlib.sha256()
    for file in files:
        contents.update(b"%s\0%s\0" % (file.as_posix().encode(), (package / file).read_bytes()))

    def copy(folder: Path) -> None:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / file, folder / file)

    target.mkdir(parents=True)
    for file in ("build.toml", "flake.nix"):
        shutil.copyfile(source / file, target / file)
    copy(target / "torch-ext" / name)
    for backend in general["backends"]:
        variant = target / "build" / f"torch-{backend}"
        copy(variant)
        about = {
            "name": general["name"],
            "id": f"_{name}_{backend}_{contents.hexdigest()[:12]}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for folder in (target, target / "build"):  # where the builder reads it, and where it uploads from
        shutil.copyfile(source / "README.md", folder / "CARD.md")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
