"""From a name to a folder, local or from the Hub, and to the JSON files in it."""

from __future__ import annotations

import errno
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minivlm.checkpoints.checksums import check_sums
from minivlm.checkpoints.patience import TooSlow, no_endless_downloads
from minivlm.errors import InputError

SHIPPED = Path(__file__).parents[1] / "assets" / "tiny"  # the small checkpoint that ships with the package
PICTURES, TOKENIZER = "preprocessor_config.json", "tokenizer.json"  # files of a folder, for messages
GENERATION = "generation_config.json"
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The archives that OpenAI published, and repos of the Hub with the same weights in safetensors.
ARCHIVES = {
    "RN50.pt": "timm/resnet50_clip.openai",
    "RN101.pt": "timm/resnet101_clip.openai",
    "RN50x4.pt": "timm/resnet50x4_clip.openai",
    "RN50x16.pt": "timm/resnet50x16_clip.openai",
    "RN50x64.pt": "timm/resnet50x64_clip.openai",
    "ViT-B-32.pt": "openai/clip-vit-base-patch32",
    "ViT-B-16.pt": "openai/clip-vit-base-patch16",
    "ViT-L-14.pt": "openai/clip-vit-large-patch14",
    "ViT-L-14-336px.pt": "openai/clip-vit-large-patch14-336",
}
LARGEST_JSON = 100 * 2**20  # bytes; the largest index of a published checkpoint has a few MB
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def find_folder(
    name: str | Path, revision: str | None = None, *, files: Sequence[str] = ("*.json", "*.safetensors")
) -> Path:
    """The folder of a checkpoint: a local one, or a Hub repo id such as "google/paligemma-3b-mix-224".

    A repo is downloaded once, into the Hub's own cache, and found there without a network afterwards. An
    interrupted download leaves no partial file in the cache: the next call downloads what is missing. Where
    the cache names files by their SHA-256, as it does for weights except on some Windows machines, each is
    compared with its name once. A few gigabytes take some seconds.

    Args:
        revision: a branch, tag or commit of the repo; without one, its main branch.
        files: patterns of the files to download.

    Raises:
        InputError: there is no such folder, repo or revision, access is denied, the Hub is out of reach, the
            cache cannot be written, a file in it is damaged, the repo has its weights in pickles alone, or a
            local folder is given with a revision or was cloned without its large files.
    """
    folder = Path(name)
    try:
        folder.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, not permitted, a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(name)[:100]!r} cannot be opened ({reason}): check the name") from error
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"{folder} is a local folder, but revision {revision!r} belongs to a repo of the Hub: omit "
                "the revision, or give a repo id"
            )
        _check_pointers(folder)
        return folder
    if folder.exists():
        refuse_pickles(folder.parent, [folder.name])
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
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough free disk space", UserWarning)
            with no_endless_downloads():
                path = snapshot_download(repo_id, revision=revision, allow_patterns=list(files))
    except TooSlow as error:
        raise InputError(
            f"the download of {repo_id} hardly moves ({error}): try again later or over another connection; "
            "what has arrived is kept"
        ) from error
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
        reason = _unwritable(error)
        if reason is not None:
            raise InputError(
                f"{repo_id} cannot be written to the cache of the Hub ({reason}): free some space, or choose "
                "another folder for the cache with the environment variable HF_HUB_CACHE"
            ) from error
        raise InputError(
            f"there is no folder {repo_id}, and it is not available from the Hub or its cache on this "
            f"machine ({type(error).__name__}: {_first_line(error)}): check the connection, or copy the "
            "folder here"
        ) from error
    folder = Path(path)
    if any(pattern.endswith(".safetensors") for pattern in files):
        check_sums(folder)
        if not any(folder.glob("*.safetensors")):
            refuse_pickles(repo_id, _names_on_the_hub(repo_id, revision))
    return folder


def _unwritable(error: BaseException | None) -> str | None:
    """What kept the cache from being written, from an error or from those that led to it."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    while error is not None:
        # A firewall denies, too, but names no file.
        denied = isinstance(error, PermissionError) and error.filename is not None
        if isinstance(error, OSError) and (denied or error.errno in codes):
            return error.strerror
        if isinstance(error, UserWarning):  # of the Hub's library, about a file larger than what is free
            return _first_line(error)
        error = error.__cause__ or error.__context__
    return None


def _names_on_the_hub(repo_id: str, revision: str | None) -> list[str]:
    import huggingface_hub

    try:
        return huggingface_hub.list_repo_files(repo_id, revision=revision)
    except Exception:  # out of reach: then nothing is known
        return []


def refuse_pickles(place: Path | str, names: Iterable[str]) -> None:
    """Raise InputError if some of the names are of files that hold pickled weights."""
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    for name in pickled:
        if name in ARCHIVES:
            raise InputError(
                f"{place} has {name}, an archive of TorchScript: it holds code and pickles, which would run "
                f"here, so it is refused. The same weights are in {ARCHIVES[name]} on the Hub, as safetensors"
            )
    if pickled:
        raise InputError(
            f"{place} has its weights in {few(pickled)}: a pickle can run code that is hidden in it, so it "
            "is refused. Download the safetensors version, or convert it on a machine without secrets"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json. Raises InputError when it is missing or not a JSON object."""
    return read_json(folder, "config.json")


def describe(folder: Path) -> dict[str, Any]:
    """What a folder says of its model: config.json, or else open_clip's config, as of type "open_clip".

    A folder may have both. What counts is config.json, unless it is timm's, which has no `model_type`.

    Raises InputError: it has neither; as `read_config`.
    """
    has_config = (folder / "config.json").is_file()
    if (folder / OPEN_CLIP[0]).is_file() and not (has_config and "model_type" in read_config(folder)):
        return read_json(folder, OPEN_CLIP[0]) | {"model_type": "open_clip"}
    if not has_config:
        refuse_pickles(folder, (path.name for path in folder.iterdir()))
    return read_config(folder)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder. Raises InputError: no such file, or not a JSON object."""
    path = folder / name
    if not path.is_file():  # nor a device, which may have no end
        raise InputError(f"{folder} has no {name}: is it a checkpoint folder?")
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def check_vocabulary(folder: Path, vocab_size: int, ids: Iterable[int]) -> None:
    """Raise InputError if the tokenizer has an id for which the model has no embedding."""
    largest = max(ids)
    if largest >= vocab_size:
        raise InputError(
            f"in {folder}, tokenizer.json has the id {largest} but the model knows only {vocab_size} tokens: "
            "take all files from the same checkpoint"
        )


def few(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
