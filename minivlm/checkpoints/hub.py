"""From a name to a folder, local or from the Hub, and to the JSON files in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minivlm.errors import InputError

PICTURES, TOKENIZER = "preprocessor_config.json", "tokenizer.json"  # files of a folder, for messages
GENERATION = "generation_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def find_folder(
    name: str | Path, revision: str | None = None, *, files: Sequence[str] = ("*.json", "*.safetensors")
) -> Path:
    """The folder of a checkpoint: a local one, or a Hub repo id such as "google/paligemma-3b-mix-224".

    A repo is downloaded once, into the Hub's own cache, and found there without a network afterwards. An
    interrupted download leaves no partial file in the cache: the next call downloads what is missing.

    Args:
        revision: a branch, tag or commit of the repo; without one, its main branch.
        files: patterns of the files to download.

    Raises:
        InputError: there is no such folder, repo or revision, access is denied, the Hub is out of reach, or a
            local folder is given with a revision or was cloned without its large files.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"{folder} is a local folder, but revision {revision!r} belongs to a repo of the Hub: omit "
                "the revision, or give a repo id"
            )
        _check_pointers(folder)
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file: give the folder that contains config.json")
    if isinstance(name, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise InputError(f"{name} is neither a folder nor a repo id (owner/name) on the Hub: check the name")
    return _download(name, revision, files)


def _check_pointers(folder: Path) -> None:
    """Without git-lfs, git clones large files as pointers of some 130 bytes."""
    pointers = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors") and path.is_file():
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    pointers.append(path.name)
    if pointers:
        raise InputError(
            f"{folder} has only Git LFS pointers in place of {few(pointers)}: run `git lfs install` and "
            "`git lfs pull` there, or give the repo id instead"
        )


def _download(repo_id: str, revision: str | None, files: Sequence[str]) -> Path:
    # Imported only when needed: most loads are local, and this import is slow.
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(files))
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repo_id} asks you to accept its license: do so on https://huggingface.co/{repo_id}, then log "
            "in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder {repo_id}, and the Hub has no public repo of that name: check the spelling; "
            "if the repo is private, log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit from "
            f"https://huggingface.co/{repo_id}/tree/main"
        ) from error
    except Exception as error:  # whatever its HTTP library raises, which changes from version to version
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise InputError(
                f"the Hub denies you access to {repo_id} ({_first_line(error)}): log in again with "
                "`hf auth login`, with a token that may read it"
            ) from error
        raise InputError(
            f"there is no folder {repo_id}, and it is not available from the Hub or its cache on this "
            f"machine ({type(error).__name__}: {_first_line(error)}): check the connection, or copy the "
            "folder here"
        ) from error
    return Path(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json. Raises InputError when it is missing or not a JSON object."""
    return read_json(folder, "config.json")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder. Raises InputError: no such file, or not a JSON object."""
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {name}: is it a checkpoint folder?") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name} cannot be read ({error}): download the file again") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{folder / name} contains a {type(values).__name__}, expected a JSON object: download the file "
            "again"
        )
    return values


def special_ids(*places: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of pad, bos and eos, each from the first of several places that has it. Lists become tuples."""
    found: dict[str, Any] = {}
    for values in places:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = values.get(name)
            if value not in (None, []):
                found.setdefault(name, tuple(value) if isinstance(value, list) else value)
    return found


def require_equal(folder: Path, what: str, expected: int, found: int, file: str) -> None:
    """Raises InputError: a number differs between config.json and another file of a folder."""
    if found != expected:
        raise InputError(
            f"in {folder}, {what} is {expected} in config.json and {found} in {file}: take all files from "
            "the same checkpoint"
        )


def few(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
