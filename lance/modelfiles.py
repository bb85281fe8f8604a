"""Model folders: a config.json that names the sha256 of every weight file, checked on load."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lance.errors import ModelError

FORMAT = 1


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_model_config(folder: Path, meta: dict[str, Any], files: list[str]) -> None:
    """Write config.json with the format and the sha256 of the named files."""
    data = {"format": FORMAT, **meta, "sha256": {name: file_sha256(folder / name) for name in files}}
    (folder / "config.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read and check config.json of a model folder, with the sha256 of every file that it names.

    Raises
    ------
    ModelError
        When it is missing, unreadable, of another format, or a named file is missing or changed.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"no model in {str(folder)!r}: config.json is missing; give a folder written by save_pretrained or `lance train`")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, files = meta["format"], meta["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{str(path)!r} is not a model description ({error}); restore it or train again") from error
    if version != FORMAT:
        raise ModelError(f"{str(path)!r} has format {version!r}, this version reads {FORMAT}; train again or install the version that wrote it")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise ModelError(f"{str(folder / name)!r} is missing; restore it or train again")
        if (found := file_sha256(folder / name)) != expected:
            raise ModelError(f"{str(folder / name)!r} was changed: sha256 {found}, expected {expected}; restore it or train again")
    return dict(meta)
