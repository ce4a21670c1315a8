"""Clips tell the truth about themselves: what is drawn, what is answered, and what is labeled.

What happens is derived a second time here: from the scenes at eight moments a second, never from the clip's
own description of its events.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minivlm.errors import InputError
from minivlm.processing import Tokenizer, build_tokenizer, text_to_boxes
from minivlm.world.clip_files import save_clip
from minivlm.world.clip_making import FRAME_RATES, make_clip
from minivlm.world.clip_questions import PLACES, TASKS, ask, examples, place_name, vocabulary
from minivlm.world.clips import DIRECTIONS, MOTIONS, Actor, Clip, Event
from minivlm.world.questions import Example
from minivlm.world.rows import WEIGHTS, answer_weights
from minivlm.world.scenes import COLORS, HELD_OUT_PAIRS, SHAPES, Split, Thing

SPLITS: tuple[Split, ...] = ("train", "test", "unseen")
SHAPES_OF_PICTURES = [(64, 64), (96, 48), (40, 80)]
COLOR, SHAPE = "|".join(COLORS), "|".join(SHAPES)


def clips(number: int, split: Split = "train", width: float = 64, height: float = 64) -> list[Clip]:
    return [
        make_clip(np.random.default_rng(seed), split, width=width, height=height) for seed in range(number)
    ]


def asked(clip: Clip, seed: int, number: int = 2 * len(TASKS)) -> list[Example]:
    return list(islice(examples(clip, np.random.default_rng([seed, 7])), number))


def red_circle(motion: str = "right", event: Event | None = None, **options: Any) -> Clip:
    """One thing, 12 units from the left at first, of 4 units a second."""
    thing = Thing("circle", "red", "small", 12, 32, 8, COLORS["red"])
    actor = Actor(thing, motion, 0 if motion == "nowhere" else 4, event)
    clip = Clip((actor,), seconds=6, fps=2, background=200, noise=0, noise_seed=0)
    return replace(clip, **options)


# Pictures


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_is_a_clip_and_its_pictures(split: Split) -> None:
    first, again = clips(20, split), clips(20, split)
    assert first == again
    assert len(set(first)) == 20
    for a, b in zip(first[:3], again[:3], strict=True):
        assert [frame.tobytes() for frame in a.frames(32)] == [frame.tobytes() for frame in b.frames(32)]


def pixels_of(drawn: np.ndarray, thing: Thing) -> np.ndarray:
    """Where a picture without noise has exactly the color of a thing."""
    return (drawn == thing.rgb).all(axis=2)


@pytest.mark.parametrize(("width", "height"), SHAPES_OF_PICTURES)
@pytest.mark.parametrize("pixels", [128, 77])
def test_in_every_frame_things_are_where_the_clip_says(width: int, height: int, pixels: int) -> None:
    scale = pixels / width
    checked = 0
    for clip in (replace(clip, noise=0.0) for clip in clips(6, "unseen", width, height)):
        for second, frame in zip(clip.times, clip.frames(pixels), strict=True):
            assert frame.size == (pixels, round(pixels * height / width))
            drawn = np.asarray(frame)
            for actor in clip.actors:
                thing = actor.at(second)
                if thing is None:
                    assert not pixels_of(drawn, actor.thing).any()
                    continue
                rows, columns = np.nonzero(pixels_of(drawn, thing))
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                tolerance = 1.5 if thing.shape in ("circle", "square") else 3.5  # tips are blended
                assert np.abs(np.array(box) - scale * np.array(thing.box)).max() <= tolerance
                checked += 1
    assert checked > 200


def test_a_thing_moves_as_far_as_its_speed_says() -> None:
    for motion, (dx, dy) in DIRECTIONS.items():
        clip = red_circle(motion)
        places = [(thing.x, thing.y) for second in clip.times for thing in clip.at(second).things]
        steps = np.diff(np.array(places), axis=0)
        assert np.allclose(steps, [[2 * dx, 2 * dy]] * 11)  # 4 units a second, 2 frames a second
    assert len({thing.x for second in range(6) for thing in red_circle("nowhere").at(second).things}) == 1


def test_the_picture_of_a_second_shows_what_happens_then() -> None:
    appearing = red_circle(event=Event("appears", 2))
    assert [len(appearing.at(second).things) for second in (0, 1.5, 2, 5.5)] == [0, 0, 1, 1]
    vanishing = red_circle(event=Event("vanishes", 2))
    assert [len(vanishing.at(second).things) for second in (0, 1.5, 2, 5.5)] == [1, 1, 0, 0]
    turning = red_circle(event=Event("turns", 2, "blue", (1, 2, 3)))
    things = [turning.at(second).things[0] for second in (0, 1.5, 2, 5.5)]
    assert [(thing.color, thing.rgb) for thing in things] == [
        ("red", COLORS["red"]),
        ("red", COLORS["red"]),
        ("blue", (1, 2, 3)),
        ("blue", (1, 2, 3)),
    ]


@pytest.mark.parametrize("fps", [1, 2, 3, 4, 5, 8])
def test_every_frame_rate_shows_the_same_seconds(fps: int) -> None:
    for clip in clips(5):
        shown = replace(clip, fps=fps)
        assert len(shown.times) == fps * clip.seconds
        assert set(range(clip.seconds)) <= set(shown.times)
        pictures = dict(zip(shown.times, shown.frames(24), strict=True))
        assert all(pictures[second] == clip.at(second).draw(24) for second in range(clip.seconds))


def test_noise_is_new_in_every_frame() -> None:
    frames = [np.asarray(frame) for frame in red_circle("nowhere", noise=5).frames(32)]
    assert all((a != b).mean() > 0.5 for a, b in combinations(frames, 2))


# What is made


@pytest.mark.parametrize(("width", "height"), SHAPES_OF_PICTURES)
def test_things_stay_inside_and_never_meet(width: int, height: int) -> None:
    for clip in clips(60, "train", width, height):
        for second in np.arange(0, clip.seconds, 1 / 16).tolist():
            things = clip.at(second).things
            for thing in things:
                x0, y0, x1, y1 = thing.box
                assert x0 >= 0
                assert y0 >= 0
                assert x1 <= width
                assert y1 <= height
            for a, b in combinations(things, 2):
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 1


@pytest.mark.parametrize("split", SPLITS)
def test_no_two_things_ever_share_a_name(split: Split) -> None:
    for clip in clips(200, split):
        names = [{f"{t.color} {t.shape}" for second in range(clip.seconds) if (t := actor.at(second))}
                 for actor in clip.actors]  # fmt: skip
        assert sum(map(len, names)) == len(set().union(*names))


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_held_out_pair_in_training(split: Split) -> None:
    """Neither in pictures, before or after a change of color, nor in questions and answers."""
    named: Counter[tuple[str, str]] = Counter()
    for seed, clip in enumerate(clips(300, split)):
        for second in range(clip.seconds):
            assert HELD_OUT_PAIRS.isdisjoint((t.color, t.shape) for t in clip.at(second).things)
        for example in asked(clip, seed):
            named.update(re.findall(rf"({COLOR}) ({SHAPE})", f"{example.prefix} {example.suffix}"))
    assert len(named) == len(COLORS) * len(SHAPES) - len(HELD_OUT_PAIRS)  # all others do occur
    assert HELD_OUT_PAIRS.isdisjoint(named)


def test_every_unseen_clip_has_a_held_out_pair() -> None:
    found = [
        HELD_OUT_PAIRS.intersection((a.thing.color, a.thing.shape) for a in clip.actors)
        for clip in clips(200, "unseen")
    ]
    assert all(found)
    assert set().union(*found) == HELD_OUT_PAIRS


def test_what_happens_is_varied() -> None:
    made = clips(600)
    assert {clip.fps for clip in made} == set(FRAME_RATES)
    assert {clip.seconds for clip in made} == {3, 4, 5, 6, 7, 8}
    assert {len(clip.actors) for clip in made} == {2, 3}
    motions = Counter(actor.motion for clip in made for actor in clip.actors)
    assert set(motions) == set(MOTIONS[1:])
    assert max(motions.values()) < 0.4 * sum(motions.values())
    assert all(0.7 < motions[a] / motions[b] < 1.4 for a, b in combinations(DIRECTIONS, 2))
    assert {len(clip.events) for clip in made} == {1, 2}
    verbs = Counter(event.verb for clip in made for _, event in clip.events)
    assert all(0.25 < verbs[verb] / sum(verbs.values()) < 0.42 for verb in ("appears", "vanishes", "turns"))
    assert {actor.thing.size for clip in made for actor in clip.actors} == {"small", "medium"}


def test_easy_clips_have_one_or_two_things_and_one_event() -> None:
    made = [make_clip(np.random.default_rng(seed), easy=True) for seed in range(100)]
    assert {len(clip.actors) for clip in made} == {1, 2}
    assert {len(clip.events) for clip in made} == {1}


def test_what_is_asked_for_is_made() -> None:
    clip = make_clip(np.random.default_rng(0), seconds=2, fps=5, width=32, height=64)
    assert (clip.seconds, clip.fps, clip.width, clip.height) == (2, 5, 32, 64)
    assert len(list(clip.frames(16))) == 10
    assert {len(clip.actors) for clip in clips(20, "train", 32, 32)} == {1}  # as many as have room


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 1}, r"1 seconds is too short.*at least 2"),
        ({"fps": 0}, r"0 frames per second.*1 to 8"),
        ({"fps": 9}, r"9 frames per second.*1 to 8"),
        ({"width": 20}, r"20 x 64 units is too small.*at least 32"),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_clip(np.random.default_rng(0), **options)  # type: ignore[arg-type]


# Answers, derived a second time


class Seen:
    """What a viewer of eight frames a second writes down: every thing by its first name, with its places."""

    def __init__(self, clip: Clip) -> None:
        self.moments = np.arange(0, clip.seconds, 1 / 8).tolist()
        tracks: list[list[tuple[float, Thing]]] = []
        for moment in self.moments:
            for thing in clip.at(moment).things:
                # The same thing has the same shape, size and radius; no two of a clip have.
                known = [track for track in tracks if track[0][1].radius == thing.radius]
                if known:
                    known[0].append((moment, thing))
                else:
                    tracks.append([(moment, thing)])
        self.tracks = {track[0][1].name: track for track in tracks}
        self.events: dict[tuple[str, str], float] = {}
        for name, track in self.tracks.items():
            (first, _), (last, _) = track[0], track[-1]
            assert len(track) == round(8 * (last - first)) + 1  # without a gap
            if first > 0:
                self.events[name, "appears"] = first
            if last < self.moments[-1]:
                self.events[name, "vanishes"] = last + 1 / 8
            for (_, before), (moment, after) in pairwise(track):
                if before.color != after.color:
                    self.events[name, f"turns {after.color}"] = moment

    def motion(self, name: str) -> str:
        """From all places of the thing."""
        places = np.array([(thing.x, thing.y) for _, thing in self.tracks[name]])
        steps = np.diff(places, axis=0)
        assert np.allclose(steps, steps[0])  # straight and even
        dx, dy = steps[0]
        if dx == dy == 0:
            return "nowhere"
        assert 0 in (dx, dy)
        return ("left" if dx < 0 else "right") if dx else ("up" if dy < 0 else "down")


SECOND = r"at second (?P<second>\d+)"
NAME = rf"(?P<name>(?:{COLOR}) (?:{SHAPE}))"
FORMS = {
    "direction": rf"which way does the {NAME} move\?",
    "first": r"what happens first\?",
    "order": rf"does the {NAME} (?P<what>appear|vanish|turn [a-z]+) before the "
    rf"(?P<other>(?:{COLOR}) (?:{SHAPE})) (?P<later>appears|vanishes|turns [a-z]+)\?",
    "seconds": rf"how many seconds until the {NAME} (?P<what>appears|vanishes|turns [a-z]+)\?",
    "length": r"how many seconds does the clip last\?",
    "place": rf"where is the {NAME} {SECOND}\?",
    "presence": rf"is there an? {NAME} {SECOND}\?",
    "color": rf"what color is the (?P<shape>{SHAPE}) {SECOND}\?",
    "count": rf"how many objects are there {SECOND}\?",
    "caption": r"caption en",
    "detect": rf"detect {NAME} {SECOND}",
    "track": rf"track {NAME}",
}
THIRD = {"appear": "appears", "vanish": "vanishes"}


def answer_again(clip: Clip, seen: Seen, prefix: str) -> tuple[str, str]:
    """Task and answer from the words of the prompt. Fails if it has none, or more than one."""
    matches = {task: re.fullmatch(form, prefix) for task, form in FORMS.items()}
    ((task, match),) = [(task, match) for task, match in matches.items() if match]
    words = match.groupdict()
    name = words.get("name", "")
    then = clip.at(int(words["second"])).things if "second" in words else ()
    if "second" in words:
        assert int(words["second"]) in clip.times  # it has a picture
    if task == "direction":
        shown = [second for second in clip.times if any(second == moment for moment, _ in seen.tracks[name])]
        assert len(shown) >= 2  # frames show the motion
        return task, seen.motion(name)
    if task == "first":
        (who, what), second = min(seen.events.items(), key=lambda item: item[1])
        assert len(seen.events) > 1
        assert list(seen.events.values()).count(second) == 1  # no tie
        return task, f"the {who} {what}"
    if task == "order":
        what = words["what"].replace("turn ", "turns ")
        one = seen.events[name, THIRD.get(what, what)]
        two = seen.events[words["other"], words["later"]]
        assert one != two
        return task, "yes" if one < two else "no"
    if task == "seconds":
        second = seen.events[name, words["what"]]
        assert second == int(second)
        return task, str(int(second))
    if task == "length":  # the last frame lasts as long as the others
        return task, str(round(clip.times[-1] + clip.times[1]))
    if task == "place":
        (thing,) = [thing for thing in then if thing.name == name]
        column, row = 3 * thing.x / clip.width, 3 * thing.y / clip.height
        for share, side in ((column, clip.width), (row, clip.height)):
            assert min(abs(share - 1), abs(share - 2)) * side / 3 >= 2  # clearly in one ninth
        return task, PLACES[int(row)][int(column)]
    if task == "color":
        (thing,) = [thing for thing in then if thing.shape == words["shape"]]
        return task, thing.color
    if task == "count":
        return task, str(len(then))
    if task in ("presence", "detect"):
        found = [thing for thing in then if thing.name == name]
        assert len(found) <= 1
        if task == "presence":
            return task, "yes" if found else "no"
        return task, " ; ".join(f"{locs(thing, clip)} {thing.name}" for thing in found) or "none"
    if task == "track":
        at = [(moment, thing) for moment, thing in seen.tracks[name] if moment == int(moment)]
        return task, " ; ".join(f"{int(moment)} {locs(thing, clip)}" for moment, thing in at)
    return task, " ; ".join(sentence(seen, name) for name in by_first_place(seen))


def locs(thing: Thing, clip: Clip) -> str:
    x0, y0, x1, y1 = thing.box
    shares = y0 / clip.height, x0 / clip.width, y1 / clip.height, x1 / clip.width
    return "".join(f"<loc{round(1023 * share):04d}>" for share in shares)


def by_first_place(seen: Seen) -> list[str]:
    names = sorted(seen.tracks, key=lambda name: seen.tracks[name][0][1].x)
    places = [seen.tracks[name][0][1].x for name in names]
    assert all(left + 2.9 < right for left, right in pairwise(places))  # a clear order
    return names


def sentence(seen: Seen, name: str) -> str:
    motion = "stands still" if seen.motion(name) == "nowhere" else f"moves {seen.motion(name)}"
    told = {
        what: f"{what} at second {second:g}" for (who, what), second in seen.events.items() if who == name
    }
    parts = [*(told[what] for what in told if what == "appears"), motion]
    parts += [told[what] for what in told if what != "appears"]
    return f"a {seen.tracks[name][0][1].size} {name} {' and '.join(parts)}"


@pytest.mark.parametrize(("width", "height"), SHAPES_OF_PICTURES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_follows_from_what_is_seen(split: Split, width: int, height: int) -> None:
    tasks: Counter[str] = Counter()
    for seed, clip in enumerate(clips(40, split, width, height)):
        seen = Seen(clip)
        assert len(seen.tracks) == len(clip.actors)
        for example in asked(clip, seed):
            assert (example.task, example.suffix) == answer_again(clip, seen, example.prefix), example
            tasks[example.task] += 1
    assert set(tasks) == set(TASKS)
    assert min(tasks.values()) > 5


def test_ties_are_not_asked_about() -> None:
    tied = 0
    for seed, clip in enumerate(clips(200)):
        if len({event.second for _, event in clip.events}) < len(clip.events):
            tied += 1
            rng = np.random.default_rng(seed)
            assert ask(clip, "first", rng) is None
            assert ask(clip, "order", rng) is None
            assert ask(clip, "seconds", rng) is not None
    assert tied > 10


def test_motion_that_no_frames_show_is_not_asked_about() -> None:
    rng = np.random.default_rng(0)
    late = Event("appears", 5)
    assert ask(red_circle(event=late, fps=1), "direction", rng) is None  # one frame
    assert ask(red_circle(event=Event("appears", 4), fps=1), "direction", rng) is None  # 4 units
    assert ask(red_circle("nowhere", late, fps=1), "direction", rng) is None  # one frame shows no rest either
    assert ask(red_circle("nowhere", late, fps=2), "direction", rng) is not None
    found = ask(red_circle(event=Event("appears", 3), fps=1), "direction", rng)  # 8 units
    assert found is not None
    assert found.suffix == "right"


def test_places_close_to_a_border_have_no_name() -> None:
    assert place_name(10, 50, 96, 60) == "bottom left"
    assert place_name(48, 30, 96, 60) == "middle"
    assert place_name(70, 5, 96, 60) == "top right"
    assert place_name(33, 30, 96, 60) is None
    assert place_name(48, 38.5, 96, 60) is None


def test_answers_are_balanced() -> None:
    answers: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    for seed, clip in enumerate(clips(500)):
        for example in asked(clip, seed, len(TASKS)):
            answers[example.task][example.suffix] += 1
    most = {task: counts.most_common(1)[0][1] / sum(counts.values()) for task, counts in answers.items()}
    assert most["direction"] < 0.4
    assert most["order"] < 0.6
    assert most["seconds"] < 0.35
    assert most["place"] < 0.25
    assert most["presence"] < 0.65
    assert most["color"] < 0.25
    assert most["count"] < 0.6


def test_boxes_of_an_answer_are_those_of_the_picture() -> None:
    clip = replace(red_circle(), width=96.0, height=48.0)
    for second in range(clip.seconds):
        (thing,) = clip.at(second).things
        text = next(iter(examples_of(clip, f"detect red circle at second {second}")))
        (box,) = text_to_boxes(text, 96, 48)
        assert box[:4] == pytest.approx(thing.box, abs=0.06)  # half a bin


def examples_of(clip: Clip, prefix: str) -> list[str]:
    """The answers to one prompt among many."""
    return [example.suffix for example in asked(clip, 0, 300) if example.prefix == prefix]


# Labels of merged tokens


@pytest.mark.parametrize(("rows", "columns", "temporal"), [(4, 4, 2), (3, 6, 2), (8, 8, 1), (4, 4, 3)])
def test_motion_labels_agree_with_the_pictures(rows: int, columns: int, temporal: int) -> None:
    checked = 0
    for clip in (replace(clip, noise=0.0, fps=fps) for fps in (1, 4) for clip in clips(8)):
        labels = clip.motion_labels(rows, columns, temporal)
        frames = [np.asarray(frame.resize((96, 96), 0)) for frame in clip.frames(192)]
        assert labels.shape == (-(-len(frames) // temporal), rows, columns)
        assert labels.dtype == np.int64
        for cell, of_cell in enumerate(labels):
            numbers = range(cell * temporal, min((cell + 1) * temporal, len(frames)))
            of_things = [
                (actor, thing, frames[number])
                for number in numbers
                for actor in clip.actors
                if (thing := actor.at(clip.times[number])) is not None
            ]
            for actor, thing, _ in of_things:  # where its center is, unless another thing is there, too
                row, column = int(rows * thing.y / 64), int(columns * thing.x / 64)
                near = {MOTIONS.index(a.motion) for a, t, _ in of_things
                        if np.hypot(t.x - thing.x, t.y - thing.y) < 32}  # fmt: skip
                assert of_cell[row, column] in near
                checked += near == {MOTIONS.index(actor.motion)}
            for row, column in np.ndindex(rows, columns):
                there = set()
                for actor, thing, frame in of_things:
                    cut = frame[
                        row * 96 // rows : (row + 1) * 96 // rows,
                        column * 96 // columns : (column + 1) * 96 // columns,
                    ]
                    if pixels_of(cut, thing).mean() > 0.3:
                        there.add(MOTIONS.index(actor.motion))
                if len(there) == 1:  # well filled by things that move alike
                    assert of_cell[row, column] != 0
                    if len(of_things) == len(numbers):  # by the only thing
                        assert {of_cell[row, column]} == there
    assert checked > 100


def test_motion_labels_of_one_thing() -> None:
    clip = red_circle("right", Event("appears", 2), seconds=5, fps=1)
    labels = clip.motion_labels(4, 4)  # cells of 16 units, pairs of frames
    assert labels.shape == (3, 4, 4)
    assert not labels[0].any()  # second 0 and 1
    right = MOTIONS.index("right")
    # At second 2 and 3 at x = 20 and 24 with radius 8, at y = 32, between the second and the third row.
    assert labels[1].tolist() == [[0] * 4, [right, right, 0, 0], [right, right, 0, 0], [0] * 4]
    assert labels[2].tolist() == [[0] * 4, [0, right, right, 0], [0, right, right, 0], [0] * 4]  # x = 28


# Files


@pytest.mark.parametrize("ending", [".gif", ".webp", ".GIF"])
def test_saved_clips_play_at_their_rate(ending: str, tmp_path: Path) -> None:
    for fps in (1, 3, 8):
        clip = replace(clips(1)[0], fps=fps, noise=3.0)
        path = tmp_path / f"clip_{fps}{ending}"
        save_clip(clip, path, 64)
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            assert frames == len(clip.times)
            ends = [0]
            for number, frame in enumerate(clip.frames(64)):
                file.seek(number)
                off = np.asarray(file.convert("RGB")).astype(int) - np.asarray(frame)
                assert np.abs(off).mean() < 6
                ends.append(ends[-1] + int(file.info["duration"]))
            assert np.abs(np.array(ends[:-1]) / 1000 - clip.times).max() <= 0.0051
            assert ends[-1] == 1000 * clip.seconds


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clip\.mov has an ending.*use \.gif, \.webp or \.mp4"):
        save_clip(clips(1)[0], tmp_path / "clip.mov")
    assert not list(tmp_path.iterdir())


def test_without_pyav_mp4_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match=r"av is not installed.*minivlm\[video\]"):
        save_clip(clips(1)[0], tmp_path / "clip.mp4", 32)
    assert not list(tmp_path.iterdir())


# Words


def test_the_tokenizer_knows_every_text() -> None:
    tokenizer = Tokenizer(build_tokenizer(vocabulary()))
    word = re.compile(r"<loc\d{4}>| ?[a-z]+| ?[0-9]| ?[?,;]|\n| ")
    texts = set(vocabulary())
    for split in SPLITS:
        for seed, clip in enumerate(clips(80, split)):
            for example in asked(clip, seed):
                texts |= {example.prefix + "\n", example.suffix}
    for text in texts:
        ids = tokenizer.encode(text)
        tokens = [tokenizer.backend.id_to_token(index) or "" for index in ids]
        assert [token.replace("▁", " ") for token in tokens] == word.findall(text), text  # nothing is split
        assert tokenizer.decode(ids) == text
    assert answer_weights(tokenizer, tokenizer.encode("middle"), "place") == [WEIGHTS["answer"]]
    assert answer_weights(tokenizer, tokenizer.encode("middle"), "caption") == [WEIGHTS["word"]]
    for answer in (*MOTIONS[1:], *COLORS, "yes", "no", "middle", *"0123456789"):
        assert len(tokenizer.encode(answer)) == 1
