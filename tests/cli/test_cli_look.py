"""`minivlm look`, and the figures and the page that it draws."""

from __future__ import annotations

import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from minivlm.cli import main
from minivlm.looking import plots
from minivlm.looking.hover import hover_document, hover_page
from minivlm.looking.inspection import inspect_match
from minivlm.models.vit import ViT
from minivlm.processing import ViTImageProcessor
from minivlm.training import contrastive_recipe
from minivlm.training.recipe import TrainingConfig, build
from minivlm.vision.vit import ViTConfig

FILES = {
    "filters.png",
    "positions.png",
    "heads.png",
    "attention.png",
    "importance.png",
    "mask.png",
    "mask.txt",
    "words.png",
    "hover.html",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with a tower of four layers with two heads, and 5 x 5 patches."""
    folder = tmp_path_factory.mktemp("untrained")
    model, processor = build(TrainingConfig(image_size=40, tower_layers=4, tower_heads=2))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (90, 50), (200, 30, 30)).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def look(*arguments: str | Path, code: int = 0) -> None:
    assert main(["look", *map(str, arguments)]) == code


def test_everything_is_drawn_for_another_model(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "look"
    look(picture, "--prompt", "what $1 is <b>it?", "--model", folder, "--out", out, "--max-new-tokens", 3)
    assert {path.name for path in out.iterdir()} == FILES
    for path in out.glob("*.png"):
        assert min(Image.open(path).size) > 60
    printed, err = capsys.readouterr()
    assert err == ""
    lines = printed.splitlines()
    assert lines[0] == f"{picture} | what $1 is <b>it?"
    assert all(any(name in line for line in lines) for name in FILES)
    assert re.search(r"occlusion \d/\d", printed)
    assert (out / "hover.html").read_text(encoding="utf-8").count("<rect") == 25


def test_occlusion_can_be_left_out(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    look(picture, "--model", folder, "--out", tmp_path / "out", "--max-new-tokens", 1, "--no-occlusion")
    facts = capsys.readouterr().out.splitlines()[2:-1]
    assert not any("occlusion" in fact for fact in facts)
    assert "occlusion" not in (tmp_path / "out" / "hover.html").read_text(encoding="utf-8")


def test_the_shipped_model_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look("figures/samples/scene_6.png", "--prompt", "detect cyan triangle", "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "cyan triangle" in printed.splitlines()[1]
    row, column = map(int, re.search(r"occlusion (\d)/(\d)", printed).groups())  # type: ignore[union-attr]
    assert row in (6, 7, 8)  # where the triangle is drawn
    assert column in (2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.png"], "no.png: no such file"),
        (["."], r"\. .*"),
        (["PICTURE", "--prompt", "  "], "--prompt is empty: ask something"),
        (["PICTURE", "--model", "PICTURE"], "wide.png"),
        (["PICTURE", "--out", "PICTURE"], "cannot write .*wide.png/filters.png: .*wide.png is not a folder"),
        (["PICTURE", "--out", "PICTURE/in"], "cannot write .*wide.png is not a folder"),
        (["PICTURE", "--prompt", "a " * 600], "shorten the prompt"),
        (["PICTURE", "--max-new-tokens", "0"], "ask for at least 1 new token"),
        (["PICTURE", "--device", "nonsense"], "device 'nonsense' cannot be used"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    message: str,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    look(*(argument.replace("PICTURE", str(picture)) for argument in arguments), code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert "Traceback" not in err


def test_a_folder_that_may_not_be_written(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *rest: False)  # root may write anywhere
    look(picture, "--out", tmp_path / "locked", code=2)
    assert "may not be written into. Choose another folder" in capsys.readouterr().err
    assert not (tmp_path / "locked").exists()


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_others_stay(
    name: str, folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    look(picture, "--model", folder, "--out", tmp_path, code=2)
    assert f"{name} exists: choose another folder with --out, or add --overwrite" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_files_are_replaced_where_asked(folder: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "filters.png").write_text("mine")
    arguments = (picture, "--model", folder, "--max-new-tokens", 1, "--no-occlusion", "--overwrite")
    look(*arguments, "--out", tmp_path)
    assert Image.open(tmp_path / "filters.png").width > 60
    shutil.copy(picture, tmp_path / "heads.png")
    look(tmp_path / "heads.png", *arguments[1:], "--out", tmp_path, code=2)  # not what it looks at


# The page


class Tags(HTMLParser):
    """Which tags and attributes occur, and whether every tag that opens is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":  # it has no end
            self.opened.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.opened and self.opened[-1] == "title":
            self.titles.append(data)


def a_page(label: str = "label") -> str:
    scores = {"attention": torch.tensor([0.1, 0.2, 0.0, 0.4]), "a < b & c": torch.tensor([-1.0, -2, 0, -1])}
    words = [["red", "</script><b>"], ['"&'], [], ["x"]]
    return hover_page(torch.zeros(3, 4, 4), scores, words, label)


def test_the_page_is_whole_and_asks_nobody() -> None:
    page, tags = a_page('what? "it"</div>'), Tags()
    tags.feed(page)
    assert tags.opened == []
    addresses = [value for name, value in tags.attributes if name in ("src", "href")]
    assert len(addresses) == 1
    assert str(addresses[0]).startswith("data:image/bmp;base64,")
    assert "http" not in page.replace("http-equiv", "")
    assert ("aria-label", 'what? "it"</div>') in tags.attributes


def test_each_patch_tells_what_is_known_of_it() -> None:
    tags = Tags()
    tags.feed(a_page())
    assert tags.titles == [
        "row 1, column 1; attention: 25 %; a < b & c: 0 %; nearest words: red, </script><b>",
        'row 1, column 2; attention: 50 %; a < b & c: 0 %; nearest words: "&',
        "row 2, column 1; attention: 0 %; a < b & c: 0 %",
        "row 2, column 2; attention: 100 %; a < b & c: 0 %; nearest words: x",
    ]
    assert "maps = [[25,50,0,100],[0,0,0,0]]" in a_page()


def test_the_same_page_has_the_same_name() -> None:
    first, again, other = (re.search(r'id="(look-\w+)"', a_page(label)) for label in ("a", "a", "b"))
    assert first is not None
    assert again is not None
    assert other is not None
    assert first[1] == again[1] != other[1]


def test_a_map_of_next_to_nothing_is_pale() -> None:
    """A share of 0.05 %, or log-odds that fall by 0.05, are not drawn like much."""
    few = torch.zeros(64)
    few[5] = 0.0005
    page = hover_page(
        torch.zeros(3, 64, 64),
        {"attention": few, "rollout": 200 * few, "occlusion, 3 x 3": 100 * few, "hidden 1 x 1": 4000 * few},
        [[]] * 64,
        "label",
    )
    assert "attention: 1 %; rollout: 100 %; occlusion, 3 x 3: 10 %; hidden 1 x 1: 100 %" in page
    for full in (
        "5.0% of the attention.",
        "10.0% of what attention carries",
        "log-odds of the answer that fall by 0.5 without",
        "log-odds of the answer that fall by 2.0 without",
    ):
        assert f'data-scale="Full red, 100 %, stands for {full}' in page


def test_a_share_counts_by_how_many_patches_there_are() -> None:
    even = torch.full((256,), 1 / 256)
    page = hover_page(torch.zeros(3, 64, 64), {"attention": even}, [[]] * 256, "label")
    assert page.count("attention: 31 %") == 256


ODD = "\"'><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>&amp;{name}</title>"


def test_names_prompts_and_answers_stay_text() -> None:
    document, tags = hover_document(ODD, f"a{ODD}", f"b{ODD}", a_page(ODD)), Tags()
    assert document.count("<script") == 1
    assert document.count("<img") == 0
    tags.feed(document)
    assert tags.opened == []
    assert tags.titles[0] == f"{ODD}: a{ODD}"
    assert hover_document("a", "b", " ", "").count("(nothing)") == 1


def test_it_looks_like_the_live_page() -> None:
    style = Path("docs/live/style.css").read_text(encoding="utf-8")
    document = hover_document("a", "b", "c", a_page())
    for name in ("ground", "card", "ink", "soft", "line", "accent"):
        (both,) = re.findall(rf"--{name}: light-dark\((#\w+), (#\w+)\);", style)
        colors = list(both)
        assert re.findall(rf"--{name}: (#\w+);", document) == colors
        assert set(re.findall(rf"var\(--{name}, (#\w+)\)", document)) <= {colors[0]}
    (heat,) = re.findall(r"--heat: (?:light-dark\()?(#\w+)", style)
    assert f'fill="{heat}"' in document


@pytest.mark.parametrize("works", [True, False])
def test_the_page_is_opened(
    works: bool,
    folder: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or works)
    arguments = ("--model", folder, "--out", tmp_path / "out", "--max-new-tokens", 1, "--no-occlusion")
    look(picture, *arguments)
    assert opened == []
    look(picture, *arguments, "--overwrite", "--open")
    assert opened == [(tmp_path / "out" / "hover.html").as_uri()]
    assert ("no browser was found" in capsys.readouterr().out) == (not works)


def test_a_large_picture_is_stored_small() -> None:
    page = hover_page(torch.zeros(3, 896, 896), {}, [["x"]] * 4, "large")
    assert len(page) < 220_000


# Figures


def test_marked_patches_are_outlined_where_they_end() -> None:
    """Two patches side by side have six outer edges, and none between them."""
    marked = torch.tensor([True, True, False, False])
    figure = plots.draw_patch_scores(torch.zeros(3, 4, 4), {"s": torch.rand(4)}, marked)
    axis = figure.axes[1]
    lines = {tuple(map(tuple, line.get_xydata().tolist())) for line in axis.lines}
    assert len(lines) == 6
    assert ((0.5, -0.5), (0.5, 0.5)) not in lines


def test_maps_with_a_label_share_one_scale() -> None:
    scores = {"a": torch.tensor([0.0, 1.0, 0.0, 0.0]), "b": torch.tensor([0.0, 4.0, 0.0, 0.0])}
    pixel_values = torch.zeros(3, 4, 4)
    shared = plots.draw_patch_scores(pixel_values, scores, label="share").axes
    own = plots.draw_patch_scores(pixel_values, scores).axes
    assert [axis.images[0].get_clim()[1] for axis in shared[1:3]] == [4, 4]
    assert shared[3].get_ylabel() == "share"
    assert [axis.images[0].get_clim()[1] for axis in own[1:]] == [1, 4]


def test_figures_hold_what_they_are_given() -> None:
    values = torch.tensor([[0.25, 1.0]])
    figure = plots.draw_table(values, ["row"], ["a", "b"], "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.25", "1.00"]
    figure = plots.draw_heads(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.ones(2, 2), 4.0, 2.0)
    heads = [line.get_ydata() for line in figure.axes[0].lines]
    assert [list(values) for values in heads[:3]] == [[1, 2], [3, 5], [1.5, 4]]
    figure = plots.draw_words(torch.zeros(3, 4, 4), ["a", "$b$", "c", "d" * 12], torch.tensor([0.5] * 4))
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == ["a", "0.50", "$b$", "0.50", "c", "0.50", "dddddddd…", "0.50"]
    assert isinstance(plots.draw_positions({"a": torch.eye(4), "b": torch.eye(4)}), Figure)


def test_pictures_are_shown_as_they_were() -> None:
    assert plots.to_image(torch.tensor([-1.0, 0.0, 1.0, 1.2]).view(1, 1, 4)).flatten().tolist() == [
        0,
        0.5,
        1,
        1,
    ]


# Two towers


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_two_towers_are_drawn(
    objective: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    towers, its_processor = contrastive_recipe.build(
        contrastive_recipe.ContrastiveConfig(objective=objective)
    )
    towers.save_pretrained(tmp_path / "model")
    its_processor.save_pretrained(tmp_path / "model")
    look(picture, "--prompt", "a large red circle", "--model", tmp_path / "model", "--out", tmp_path / "look")
    names = {path.name for path in (tmp_path / "look").iterdir()}
    assert names == FILES - {"words.png", "mask.png", "mask.txt", "hover.html"}
    printed = capsys.readouterr().out
    assert re.search(r"\| a large red circle\ncosine -?0\.\d{3}\n", printed)

    inputs = its_processor(images=[Image.open(picture)], texts=["a large red circle"])
    seen = inspect_match(towers, its_processor, Image.open(picture), "a large red circle")
    out = towers(**inputs)
    cosine = (out.image_embeds * out.text_embeds).sum().item()
    assert seen.cosine == pytest.approx(cosine, abs=1e-5)
    assert f"cosine {cosine:.3f}" in printed
    torch.testing.assert_close(seen.match(inputs["pixel_values"]), out.logits_per_image[0])
    patches = towers.config.vision.num_patches
    layers, heads = towers.config.vision.num_hidden_layers, towers.config.vision.num_attention_heads
    assert seen.tower.shape == (layers, heads, patches, patches)
    assert seen.rollout.shape == (patches,)
    assert seen.pooling.shape == (heads, patches)
    # What is missing to 1 is what a class token reads from itself.
    whole = torch.ones(heads)
    if objective == "siglip":
        torch.testing.assert_close(seen.pooling.sum(dim=1), whole)
        assert seen.rollout.sum() == pytest.approx(1, abs=1e-5)
    else:
        assert bool((seen.pooling.sum(dim=1) < whole).all())
        assert 0 < float(seen.rollout.sum()) < 1


def test_a_model_that_reads_no_text_is_refused(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ViTConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    ViT(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(image_size=16).save_pretrained(tmp_path / "vit")
    look(picture, "--model", tmp_path / "vit", "--out", tmp_path / "look", code=2)
    assert "holds a model that reads no text" in capsys.readouterr().err
