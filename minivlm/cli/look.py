"""`minivlm look`: what goes on inside the model while it answers, as pictures in a folder."""

from __future__ import annotations

import argparse
import math
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.errors import InputError
from minivlm.files import check_output, write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

    from minivlm.cli.options import Commands
    from minivlm.looking.inspection import Inspection
    from minivlm.models.protocols import Answers, Matches, Tower
    from minivlm.processing import AnswerProcessor, PairProcessor

FILES = (
    "filters.png", "positions.png", "heads.png", "attention.png", "importance.png", "words.png", "mask.png",
    "mask.txt", "hover.html",
)  # fmt: skip
MOST_NEAREST = 16  # words listed for image tokens without a place
MOST_MAPS = 23  # words of an answer that get a map of their own


def add_to(commands: Commands) -> None:
    """Describe the command."""
    look = commands.add_parser(
        "look",
        help="look inside the model while it answers",
        description="Draw filters, positions, attention and its mask, occlusion, and words into a folder.",
    )
    look.add_argument("picture", metavar="PICTURE", help="a picture file, of any format that Pillow reads")
    look.add_argument("--prompt", default="caption en", help='question, or text (default: "caption en")')
    look.add_argument(
        "--out",
        type=shared.path,
        default=Path("look"),
        metavar="FOLDER",
        help="where to write (default: look)",
    )
    look.add_argument("--overwrite", action="store_true", help="replace files of the same names in FOLDER")
    shared.add_model(look, "a PaliGemma, LLaVA, Qwen-VL, CLIP or SigLIP checkpoint")
    look.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="length of an answer (default: 64)"
    )
    look.add_argument(
        "--no-occlusion",
        action="store_true",
        help="leave out occlusion, which reads the picture again for each of its patches",
    )
    look.add_argument(
        "--open", action="store_true", help="open hover.html in a browser, if the model answers"
    )
    look.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Answer, draw, and print what each file shows."""
    from minivlm.processing import load_picture, to_rgb

    if not options.prompt.strip():
        raise InputError('--prompt is empty: ask something, such as "caption en"')
    picture = to_rgb(load_picture(options.picture))
    _check_folder(options)
    kind, model, processor = shared.open_reading(options)
    look_at = _look_at_answer if kind == "answers" else _look_at_match
    look_at(model, processor, picture, options)
    shared.say(f"drawn: {options.out}")
    if options.open:
        _open(options.out / "hover.html", kind)


def _open(page: Path, kind: str) -> None:
    if kind != "answers":
        shared.say("(nothing to open: hover.html is for models that answer)")
    elif not webbrowser.open(page.resolve().as_uri()):
        shared.say(f"(no browser was found: open {page} yourself)")


# Drawing takes half a second more to import: each function imports what it draws with.


def _look_at_answer(
    model: Answers, processor: AnswerProcessor, picture: Image.Image, options: argparse.Namespace
) -> None:
    """A model that answers: its answer, and where the words come from."""
    from minivlm.looking import plots
    from minivlm.looking.hover import hover_document, hover_page
    from minivlm.looking.inspection import inspect_answer
    from minivlm.models.protocols import place_size

    seen = inspect_answer(model, processor, picture, options.prompt, options.max_new_tokens)
    shared.say(f"{options.picture} | {options.prompt}\n{seen.answer}")
    _draw_tower(model.vision_tower, seen.tower, seen.pixel_values, options.out)

    whole: dict[str, Tensor] = {}
    if seen.attention is None or seen.rollout is None:
        shared.say("  (no attention.png: the decoder gets the picture as a whole, without places to look at)")
    else:
        by_word = seen.attention.mean(dim=(1, 2))  # [A, N]
        maps = {f"{i + 1} {word}": by_word[i] for i, word in enumerate(seen.words[:MOST_MAPS])}
        _save(
            plots.draw_patch_scores(seen.pixel_values, maps),
            options.out / "attention.png",
            f"where the writer of each word looks; {float(by_word.sum(dim=1).mean()):.0%} of it on patches",
        )
        whole = {"attention": by_word.mean(dim=0), "rollout": seen.rollout.mean(dim=0)}
    if not options.no_occlusion:
        whole |= _occlusions(seen.sureness, seen.pixel_values, place_size(model.vision_tower))
    if whole:
        _draw_importance(seen.pixel_values, whole, options.out)

    words = _draw_words(model, processor, seen, options.out)
    _draw_mask(seen.tokens, seen.visible, options.out)
    page = hover_page(seen.pixel_values, whole, words, f"{options.prompt}: {seen.answer}")
    with write_aside(options.out / "hover.html") as temporary:
        name = Path(options.picture).name
        temporary.write_text(hover_document(name, options.prompt, seen.answer, page), encoding="utf-8")
    shared.say("  hover.html      the same to explore: open it in a browser")


def _draw_words(model: Answers, processor: AnswerProcessor, seen: Inspection, out: Path) -> list[list[str]]:
    """The nearest words of each patch, as far as image tokens are patches among words; and their figure."""
    from minivlm.looking import measures, plots
    from minivlm.models.protocols import place_size

    patches = math.prod(side // place_size(model.vision_tower) for side in seen.pixel_values.shape[1:])
    no_words: list[list[str]] = [[]] * patches
    if seen.image_tokens is None:
        shared.say("  (no words.png: the picture is not among the words that the decoder reads)")
        return no_words
    table = model.language_model.embed_tokens.weight.detach()
    cosines, ids = (best.cpu() for best in measures.nearest_words(seen.image_tokens, table, k=3))
    decode = processor.tokenizer.decode
    words = [[decode([i], skip_special_tokens=False).strip() for i in row] for row in ids.tolist()]
    span = f"cosines {cosines[:, 0].min():.2f} to {cosines[:, 0].max():.2f}"
    if len(words) != len(no_words):  # image tokens that are no patches have no place in a figure
        nearest = ", ".join(row[0] for row in words[:MOST_NEAREST]) + ", ..." * (len(words) > MOST_NEAREST)
        shared.say(
            f"  (no words.png: {len(words)} image tokens of no place, nearest words {nearest}; {span})"
        )
        return no_words
    _save(
        plots.draw_words(seen.pixel_values, [row[0] for row in words], cosines[:, 0]),
        out / "words.png",
        f"nearest word of each image token, {span}",
    )
    return words


def _draw_mask(tokens: list[str], visible: Tensor, out: Path) -> None:
    """Who looks at whom in the decoder, as a figure and as text."""
    from minivlm.looking.visible import as_text, draw_mask, share_rows

    names, mask = share_rows(tokens, visible)
    hidden = 1 - float(visible.float().mean())
    _save(draw_mask(names, mask), out / "mask.png", f"which token looks at which; {hidden:.0%} is hidden")
    with write_aside(out / "mask.txt") as temporary:
        temporary.write_text(as_text(names, mask) + "\n", encoding="utf-8")
    shared.say("  mask.txt        the same as text")


def _look_at_match(
    model: Matches, processor: PairProcessor, picture: Image.Image, options: argparse.Namespace
) -> None:
    """A model that matches: how well the prompt fits the picture, and by which patches."""
    from minivlm.looking import plots
    from minivlm.looking.inspection import inspect_match
    from minivlm.models.protocols import ConvolutionalTower

    seen = inspect_match(model, processor, picture, options.prompt)
    shared.say(f"{options.picture} | {options.prompt}\ncosine {seen.cosine:.3f}")
    whole = {"attention": seen.pooling.mean(dim=0)}
    tower = model.vision_model
    if isinstance(tower, ConvolutionalTower):
        shared.say("  no filters, positions and heads of patches: this tower is convolutional")
        patch_size = tower.place_size
    else:
        _draw_tower(tower, seen.tower, seen.pixel_values, options.out)
        whole["rollout"] = seen.rollout
        patch_size = tower.config.patch_size
    _save(
        plots.draw_patch_scores(
            seen.pixel_values, {f"head {i + 1}": scores for i, scores in enumerate(seen.pooling)}
        ),
        options.out / "attention.png",
        "from which patches the picture's vector is made, by head",
    )
    if not options.no_occlusion:
        whole |= _occlusions(seen.match, seen.pixel_values, patch_size)
    _draw_importance(seen.pixel_values, whole, options.out)


def _draw_tower(tower: Tower, maps: Tensor | None, pixel_values: Tensor, out: Path) -> None:
    """Filters, positions and heads of an image tower, with its attention maps [layers, H, N, N] or None."""
    import torch

    from minivlm.looking import measures, plots
    from minivlm.models.protocols import MergesPatches

    filters = tower.embeddings.patch_embedding.weight.detach().float()
    if filters.dim() == 5:  # patches of several frames, which show a picture again
        filters = filters.sum(dim=2)
    components, shares = measures.filter_components(filters)
    _save(
        plots.draw_filters({"filters": filters, "components": components}),
        out / "filters.png",
        f"12 components explain {float(shares[:12].sum()):.0%} of the filters' variance",
    )
    if isinstance(tower, MergesPatches):
        shared.say("  (no positions.png: rows and columns are angles, and nothing is learned about them)")
    else:
        table = tower.embeddings.position_embedding.weight.detach()
        positions = table[len(table) - math.isqrt(len(table)) ** 2 :]  # without a class token's
        _save(
            plots.draw_positions({"positions": measures.position_similarity(positions)}),
            out / "positions.png",
            "similarity of each position with all others",
        )
    if maps is None:
        shared.say("  (no heads.png: nothing in the tower attends, it is made of convolutions)")
        return
    count = maps.shape[-1]
    columns = plots.grid_of(count, pixel_values)[1]
    distances = torch.stack([measures.attention_distance(layer[None], columns) for layer in maps])
    entropies = torch.stack([measures.attention_entropy(layer[None]) for layer in maps])
    evenly = float(measures.patch_distances(count, columns).mean())
    _save(
        plots.draw_heads(distances.cpu(), entropies.cpu(), evenly, math.log(count)),
        out / "heads.png",
        f"heads look {float(distances.min()):.1f} to {float(distances.max()):.1f} patches away",
    )


def _occlusions(
    score: Callable[[Tensor], Tensor], pixel_values: Tensor, patch_size: int
) -> dict[str, Tensor]:
    """How much the score of a picture falls where one patch, or three by three, are hidden: [N] each."""
    from minivlm.looking.measures import occlusion

    return {
        "occlusion": occlusion(score, pixel_values, patch_size),
        "occlusion, 3 x 3": occlusion(score, pixel_values, patch_size, reach=1),
    }


def _draw_importance(pixel_values: Tensor, scores: dict[str, Tensor], out: Path) -> None:
    """Maps [N] of one picture side by side."""
    from minivlm.looking import plots

    columns = {name: plots.grid_of(len(values), pixel_values)[1] for name, values in scores.items()}
    where = {name: divmod(int(values.argmax()), columns[name]) for name, values in scores.items()}
    listed = ", ".join(f"{name} {row + 1}/{column + 1}" for name, (row, column) in where.items())
    _save(
        plots.draw_patch_scores(pixel_values, scores),
        out / "importance.png",
        f"the most important patch, row/column: {listed}",
    )


def _check_folder(options: argparse.Namespace) -> None:
    """Raises InputError: the files cannot be written, or would replace others of the same names."""
    for path in (options.out / name for name in FILES):
        check_output(path, [options.picture])
        if path.exists() and not options.overwrite:
            raise InputError(f"{path} exists: choose another folder with --out, or add --overwrite")


def _save(figure: Figure, path: Path, fact: str) -> None:
    with write_aside(path) as temporary:
        figure.savefig(temporary, format="png")
    shared.say(f"  {path.name:15} {fact}")
