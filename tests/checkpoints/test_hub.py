"""A repo id leads to a model, or to a refusal that says what to do. The Hub here is our own server."""

import errno
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import TINY, assert_differs, assert_equal, randomize
from hub_server import Files, HubServer, Repo, commit, serve
from open_clip_folders import RESNET, write_folder
from safetensors.torch import load_file, save_file

import minivlm
from minivlm import PaliGemma, Processor
from minivlm.checkpoints import checksums, patience
from minivlm.checkpoints.hub import find_folder
from minivlm.checkpoints.weights import INDEX, WEIGHTS
from minivlm.cli import main
from minivlm.errors import InputError
from minivlm.models.clip_resnet import ResNetCLIP
from minivlm.models.load import kind_of
from minivlm.processing import ImageProcessor, Tokenizer, build_tokenizer

STUBS = {
    "config.json": b'{"model_type": "paligemma"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"text",
}
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path, seed: int) -> Files:
    """A complete checkpoint in two shards, and what else a repo has."""
    tokenizer = Tokenizer(build_tokenizer(["what is it"]))
    Processor(tokenizer, ImageProcessor(image_size=28, image_seq_length=4)).save_pretrained(folder)
    text = replace(TINY.text, vocab_size=tokenizer.vocab_size)
    randomize(PaliGemma(replace(TINY, text=text, image_token_id=tokenizer.image_id)), seed).save_pretrained(
        folder
    )
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: (SHARD_1, SHARD_2)[number % 2] for number, name in enumerate(tensors)}
    for shard in (SHARD_1, SHARD_2):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"text"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """Two trainings of one model."""
    return [sharded(tmp_path_factory.mktemp(f"seed-{seed}"), seed) for seed in (0, 1)]


@pytest.fixture
def hub(checkpoints: list[Files]) -> Iterator[HubServer]:
    """owner/open with stubs; owner/real, whose branch "other" and tag "v1" are the second training."""
    with serve() as server:
        server.repos["owner/open"] = Repo({commit(1): STUBS})
        server.repos["owner/real"] = Repo(
            {commit(1): checkpoints[0], commit(2): checkpoints[1]},
            {"main": commit(1), "other": commit(2), "v1": commit(2)},
        )
        yield server


Use = Callable[[int], None]
CLOSED = 9  # nothing listens on this port


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Use:
    """Set the port of the Hub; the cache is a fresh folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    download = huggingface_hub.snapshot_download

    def at(port: int) -> None:
        endpoint = f"http://127.0.0.1:{port}"
        replacement = functools.partial(download, endpoint=endpoint, cache_dir=cache)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", replacement)
        names = huggingface_hub.HfApi(endpoint=endpoint).list_repo_files
        monkeypatch.setattr(huggingface_hub, "list_repo_files", names)

    return at


@torch.no_grad()
def logits(model: PaliGemma, processor: Processor) -> torch.Tensor:
    return model(**processor(None, "what is it")).logits


def snapshot(cache: Path, number: int = 1) -> Path:
    return cache / "models--owner--real" / "snapshots" / commit(number)


# Folders and names


def test_a_local_folder_needs_no_hub(tmp_path: Path, use: Use):
    use(CLOSED)
    assert find_folder(tmp_path) == tmp_path
    assert find_folder(str(tmp_path)) == tmp_path


def test_only_what_can_be_used_is_downloaded(hub: HubServer, use: Use):
    """No pickles, no texts."""
    use(hub.server_port)
    folder = find_folder("owner/open")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: STUBS[name] for name in ("config.json", "model.safetensors")
    }
    assert set(hub.bodies()) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a b/c", "owner/repo/more", "../up"])
def test_neither_folder_nor_repo_id(name: str, use: Use):
    use(CLOSED)
    with pytest.raises(InputError, match="neither a folder nor a repo id"):
        find_folder(name)


def test_a_path_is_never_looked_up(tmp_path: Path, use: Use):
    use(CLOSED)
    with pytest.raises(InputError, match="neither a folder nor a repo id"):
        find_folder(Path("owner/open"))
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match="is a file: give the folder"):
        find_folder(file)


# The whole path


def test_a_repo_becomes_a_model_and_is_downloaded_once(
    hub: HubServer, use: Use, checkpoints: list[Files], tmp_path: Path
):
    use(hub.server_port)
    first = logits(*minivlm.load("owner/real"))
    for name, data in checkpoints[0].items():
        (tmp_path / name).write_bytes(data)
    assert_equal(first, logits(*minivlm.load(tmp_path)))
    bodies = hub.bodies()
    assert set(bodies) == set(checkpoints[0]) - {"README.md"}
    assert {name: sent for name, ((_, sent),) in bodies.items()} == {
        name: len(checkpoints[0][name]) for name in bodies
    }

    hub.requests.clear()
    assert_equal(logits(*minivlm.load("owner/real")), first)
    assert hub.bodies() == {}  # asked only whether it is still the same
    use(CLOSED)
    assert_equal(logits(*minivlm.load("owner/real")), first)


def test_a_commit_in_the_cache_needs_no_question(hub: HubServer, use: Use):
    use(hub.server_port)
    minivlm.load("owner/real", revision=commit(2))
    hub.requests.clear()
    minivlm.load("owner/real", revision=commit(2))
    assert hub.requests == []


def test_a_new_version_is_downloaded_where_it_differs(hub: HubServer, use: Use, checkpoints: list[Files]):
    use(hub.server_port)
    old = logits(*minivlm.load("owner/real"))
    hub.repos["owner/real"].refs["main"] = commit(2)
    hub.requests.clear()
    assert_differs(logits(*minivlm.load("owner/real")), old)
    assert set(hub.bodies()) == {SHARD_1, SHARD_2}  # the small files are the same


@pytest.mark.parametrize("revision", ["other", "v1", commit(2)], ids=["branch", "tag", "commit"])
def test_revision(hub: HubServer, use: Use, revision: str):
    use(hub.server_port)
    main_branch = logits(*minivlm.load("owner/real"))
    other = logits(*minivlm.load("owner/real", revision=revision))
    assert_differs(other, main_branch)
    assert_equal(logits(*minivlm.models.load.load_answering("owner/real", revision=revision)), other)
    assert_equal(logits(*minivlm.load("owner/real", revision="main")), main_branch)


def test_revision_on_the_command_line(
    hub: HubServer, use: Use, capsys: pytest.CaptureFixture[str], cache: Path, tmp_path: Path
):
    use(hub.server_port)
    picture = str(Path(__file__).parents[2] / "figures" / "samples" / "scene_1.png")
    ask = ["ask", picture, "--prompt", "what is it", "--max-new-tokens", "1", "--json"]
    assert main([*ask, "--model", "owner/real", "--revision", "v1"]) == 0
    assert snapshot(cache, 2).is_dir()
    assert not snapshot(cache, 1).exists()
    capsys.readouterr()
    assert main([*ask, "--model", "owner/real", "--revision", "v2"]) == 2
    assert "owner/real has no revision 'v2'" in capsys.readouterr().err
    assert main([*ask, "--revision", "v1"]) == 2
    assert "--revision is of a repo of the Hub: add --model OWNER/NAME" in capsys.readouterr().err
    assert main([*ask, "--model", str(tmp_path), "--revision", "v1"]) == 2
    assert "is a local folder, but revision 'v1' belongs to a repo of the Hub" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["no-such-branch", "f" * 40], ids=["branch", "commit"])
def test_unknown_revision(hub: HubServer, use: Use, revision: str):
    use(hub.server_port)
    with pytest.raises(
        InputError, match=rf"owner/real has no revision '{revision}': give a branch, a tag or a commit"
    ):
        minivlm.load("owner/real", revision=revision)


def test_another_system_is_refused_before_its_weights_are_downloaded(hub: HubServer, use: Use):
    hub.repos["owner/next"] = Repo({commit(1): STUBS | {"config.json": b'{"model_type": "llava_next"}'}})
    use(hub.server_port)
    with pytest.raises(
        InputError,
        match=r"owner/next holds a model of type 'llava_next', and only paligemma, .*vit.* can",
    ):
        minivlm.load("owner/next")
    assert set(hub.bodies()) == {"config.json"}


def test_of_a_folder_of_open_clip_its_own_files_are_downloaded(hub: HubServer, use: Use, tmp_path: Path):
    """timm's repos also hold the image tower for timm, once more."""
    files = {path.name: path.read_bytes() for path in write_folder(tmp_path / "clip", RESNET).iterdir()}
    timm = {"config.json": b'{"architecture": "resnet50_clip"}', "model.safetensors": b"tower"}
    hub.repos["owner/clip"] = Repo({commit(1): files | timm | {"open_clip_pytorch_model.bin": b"pickle"}})
    use(hub.server_port)
    assert kind_of("owner/clip") == "matches"
    assert set(hub.bodies()) == {"config.json", "open_clip_config.json"}
    model, _ = minivlm.load("owner/clip")
    assert isinstance(model, ResNetCLIP)
    assert set(hub.bodies()) == {*files, "config.json"}
    weights = files.pop("open_clip_model.safetensors")
    hub.repos["owner/pickle"] = Repo({commit(1): files | timm | {"open_clip_pytorch_model.bin": weights}})
    with pytest.raises(InputError, match=r"has its weights in open_clip_pytorch_model\.bin: a pickle"):
        minivlm.load("owner/pickle")


def test_a_dtype_is_refused_before_anything_is_downloaded(hub: HubServer, use: Use):
    use(hub.server_port)
    with pytest.raises(InputError, match=r"dtype is torch\.int8"):
        minivlm.load("owner/real", dtype=torch.int8)
    assert hub.requests == []


# Interrupted downloads


CHUNK = 1000


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps whole chunks of what came before the interruption, 10 MB each by default."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)


@pytest.mark.usefixtures("small_chunks")
def test_a_broken_connection_goes_on_where_it_broke(hub: HubServer, use: Use, checkpoints: list[Files]):
    hub.cuts[SHARD_1] = 1
    use(hub.server_port)
    model, processor = minivlm.load("owner/real")
    size = len(checkpoints[0][SHARD_1])
    kept = size // 2 // CHUNK * CHUNK
    assert hub.bodies()[SHARD_1] == [(None, size // 2), (f"bytes={kept}-", size - kept)]
    use(CLOSED)
    assert_equal(logits(*minivlm.load("owner/real")), logits(model, processor))


@pytest.mark.usefixtures("small_chunks")
def test_a_store_that_ignores_ranges_begins_again(hub: HubServer, use: Use, checkpoints: list[Files]):
    hub.cuts[SHARD_1], hub.ignores_ranges = 1, True
    use(hub.server_port)
    model, processor = minivlm.load("owner/real")
    size = len(checkpoints[0][SHARD_1])
    kept = size // 2 // CHUNK * CHUNK
    assert hub.bodies()[SHARD_1] == [(None, size // 2), (f"bytes={kept}-", size)]
    assert torch.isfinite(logits(model, processor)).all()


def test_a_load_that_failed_is_finished_by_the_next(
    hub: HubServer, use: Use, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """The Hub goes away in the middle of the second shard; the next day it is back."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cuts[SHARD_2] = 1000
    use(hub.server_port)
    with pytest.raises(
        InputError, match=r"owner/real.* is not available from the Hub .*: check the connection"
    ):
        minivlm.load("owner/real")
    assert not (snapshot(cache) / SHARD_2).exists()  # never a partial file under the name of the complete one
    use(CLOSED)
    with pytest.raises(InputError, match=r"owner/real.* is not available"):
        minivlm.load("owner/real")

    hub.cuts.clear()
    hub.requests.clear()
    use(hub.server_port)
    assert torch.isfinite(logits(*minivlm.load("owner/real"))).all()
    assert SHARD_2 in hub.bodies()
    assert "config.json" not in hub.bodies()  # what was complete is not requested again


def test_what_a_killed_download_left_is_never_read(hub: HubServer, use: Use, cache: Path):
    """Half a shard, under the names that versions of the Hub's library give it."""
    use(hub.server_port)
    expected = logits(*minivlm.load("owner/real"))
    blob = (snapshot(cache) / SHARD_1).resolve()
    for name in (f"{blob.name}.incomplete", f"{blob.name}.0a1b2c3d.incomplete"):
        blob.with_name(name).write_bytes(b"\0" * 100)
    blob.unlink()
    (snapshot(cache) / SHARD_1).unlink()
    assert_equal(logits(*minivlm.load("owner/real")), expected)


def test_a_damaged_file_of_the_cache_is_named_where_it_lies(hub: HubServer, use: Use, cache: Path):
    use(hub.server_port)
    expected = logits(*minivlm.load("owner/real"))
    blob = (snapshot(cache) / SHARD_1).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=f"{SHARD_1} is damaged or incomplete .*: delete {blob} and download it"
    ):
        minivlm.load("owner/real")
    blob.unlink()  # as the message says
    assert_equal(logits(*minivlm.load("owner/real")), expected)


def test_a_server_that_trickles_is_told(hub: HubServer, use: Use, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "SECONDS", 0.5)
    hub.pauses[SHARD_1] = 0.2  # 400 bytes a second
    use(hub.server_port)
    with pytest.raises(
        InputError, match=r"download of owner/real hardly moves \(it sends \d{2,3} bytes a second"
    ):
        minivlm.load("owner/real")
    assert huggingface_hub.get_session().event_hooks["response"] == []
    hub.pauses.clear()
    assert torch.isfinite(logits(*minivlm.load("owner/real"))).all()


@pytest.mark.parametrize(
    ("piece", "seconds", "fair"),
    [(80, 1.0, False), (1000, 1.0, False), (1024, 1.0, True), (70_000, 61.0, True), (60_000, 61.0, False)],
)
def test_what_is_too_slow(piece: int, seconds: float, fair: bool):
    """A clock of its own; writing each piece takes a minute, which does not count."""
    clock = [0.0]

    def arrivals() -> Iterator[bytes]:
        for _ in range(200):
            clock.append(clock[-1] + seconds)
            yield bytes(piece)

    def received() -> Iterator[bytes]:
        for arrived in patience.at_a_fair_pace(arrivals(), lambda: clock[-1]):
            clock.append(clock[-1] + 60)
            yield arrived

    if fair:
        assert len(list(received())) == 200
    else:
        with pytest.raises(patience.TooSlow, match="bytes a second"):
            list(received())


# Checksums


def test_a_flipped_bit_is_noticed_until_the_file_is_whole(
    hub: HubServer, use: Use, cache: Path, checkpoints: list[Files]
):
    """All other checks let it pass: the header is intact, and the weight is a number."""
    hub.flips.add(SHARD_2)
    use(hub.server_port)
    for _ in range(2):
        with pytest.raises(InputError, match=f"{SHARD_2} is damaged or incomplete .its SHA-256 is not"):
            minivlm.load("owner/real")
    blob = (snapshot(cache) / SHARD_2).resolve()
    assert len(blob.read_bytes()) == len(checkpoints[0][SHARD_2])
    hub.flips.clear()
    blob.unlink()  # as the message says
    assert torch.isfinite(logits(*minivlm.load("owner/real"))).all()


def test_a_file_is_compared_once(hub: HubServer, use: Use, cache: Path, monkeypatch: pytest.MonkeyPatch):
    compared: list[str] = []
    check = checksums._check
    monkeypatch.setattr(checksums, "_check", lambda path, sha: (compared.append(path.name), check(path, sha)))
    use(hub.server_port)
    minivlm.load("owner/real")
    assert compared == [SHARD_1, SHARD_2]
    minivlm.load("owner/real")
    assert len(compared) == 2
    blob = (snapshot(cache) / SHARD_1).resolve()
    blob.write_bytes(blob.read_bytes())
    minivlm.load("owner/real")
    assert compared[2:] == [SHARD_1]  # written again, compared again

    note = cache / "models--owner--real" / checksums.NOTE
    note.unlink()
    note.mkdir()  # cannot be written
    minivlm.load("owner/real")
    assert compared[3:] == [SHARD_1, SHARD_2]


# Refusals


def test_a_repo_that_has_only_pickles(hub: HubServer, use: Use):
    files = {name: data for name, data in STUBS.items() if not name.endswith(".safetensors")}
    hub.repos["owner/pickles"] = Repo({commit(1): files})
    use(hub.server_port)
    with pytest.raises(InputError, match=r"owner/pickles has its weights in pytorch_model.bin: a pickle can"):
        minivlm.load("owner/pickles")
    assert set(hub.bodies()) == {"config.json"}


def test_a_repo_without_weights(hub: HubServer, use: Use):
    hub.repos["owner/none"] = Repo({commit(1): {"config.json": STUBS["config.json"]}})
    use(hub.server_port)
    assert find_folder("owner/none").is_dir()  # what is missing is said by what reads it


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written(hub: HubServer, use: Use, monkeypatch: pytest.MonkeyPatch, code: int):
    def move(*_: object) -> None:
        raise OSError(code, os.strerror(code), "blob")

    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", move)
    use(hub.server_port)
    message = rf"cannot be written to the cache .*{os.strerror(code)}.*: free some space, or choose"
    with pytest.raises(InputError, match=message):
        minivlm.load("owner/real")


def test_a_file_larger_than_the_disk(hub: HubServer, use: Use):
    hub.claims[SHARD_1] = 10**15
    use(hub.server_port)
    with pytest.raises(InputError, match=r"cannot be written to the cache .*Not enough free disk space"):
        minivlm.load("owner/real")
    assert SHARD_1 not in hub.bodies()


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_names_that_no_folder_has(name: str, use: Use):
    use(CLOSED)
    with pytest.raises(InputError, match=r"cannot be opened \(.*\): check the name"):
        find_folder(name)


def test_unknown_repo(hub: HubServer, use: Use):
    use(hub.server_port)
    with pytest.raises(
        InputError, match="no folder owner/unknown, and the Hub has no public repo of that name"
    ):
        minivlm.load("owner/unknown")


@pytest.mark.parametrize("status", [401, 403], ids=["logged-out", "not-accepted"])
def test_gated_repo(hub: HubServer, use: Use, status: int):
    hub.repos["owner/gated"] = replace(
        hub.repos["owner/real"], files_refused=(status, {"X-Error-Code": "GatedRepo"})
    )
    use(hub.server_port)
    with pytest.raises(InputError, match=r"accept its license.*huggingface.co/owner/gated, then log in"):
        minivlm.load("owner/gated")


def test_a_token_that_is_no_longer_good(hub: HubServer, use: Use):
    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.repos["owner/private"] = Repo({commit(1): STUBS}, refused=(401, message))
    use(hub.server_port)
    with pytest.raises(
        InputError, match=r"the Hub denies you access to owner/private .*: log in again with `hf auth login`"
    ):
        minivlm.load("owner/private")


def test_no_network_and_nothing_in_the_cache(use: Use):
    use(CLOSED)
    with pytest.raises(InputError, match=r"no folder owner/open.*is not available.*check the connection"):
        find_folder("owner/open")


def test_offline_by_environment(hub: HubServer, use: Use, cache: Path):
    """HF_HUB_OFFLINE=1 is read when the Hub's library is imported: a process of its own."""
    use(hub.server_port)
    minivlm.load("owner/real")
    minivlm.load("owner/real", revision="v1")
    hub.requests.clear()
    variables = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": hub.url}
    cases = [("owner/real", revision) for revision in ("main", "v1", commit(2), "other")]
    code = f"""
import minivlm
for name, revision in {[*cases, ("owner/open", "main")]}:
    try:
        model, processor = minivlm.load(name, revision=revision)
        print("loaded", revision)
    except minivlm.InputError as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables, check=True
    )
    *loaded, no_revision, no_repo = result.stdout.splitlines()
    assert loaded == ["loaded main", "loaded v1", f"loaded {commit(2)}"]
    assert "owner/real, and it is not available from the Hub or its cache" in no_revision
    assert "owner/open, and it is not available from the Hub or its cache" in no_repo
    assert hub.requests == []
