"""Questions about a clip, each with its one exact answer.

A question about one second calls a thing what it is called then; a question about the whole clip uses its
first name. Two events of the same second are never put in an order, a place near a border of two ninths of
the picture is not asked for, and motion is not asked for unless the frames show it. Boxes stand at a second:
"detect red circle at second 3", or at every second: "track red circle".

Every second that is asked about is whole, so that each frame rate has its picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import TypeVar

import numpy as np

from minivlm.processing.boxes import Box, boxes_to_text
from minivlm.world.clips import DIRECTIONS, STANDING, Actor, Clip, Event
from minivlm.world.questions import Ask, Example, detection_text, in_rounds, with_article
from minivlm.world.scenes import ALL_PAIRS, COLORS, SEEN_PAIRS, SHAPES, SIZES

Option = TypeVar("Option")

TASKS = (
    "direction", "first", "order", "seconds", "length", "place", "presence", "color", "count", "caption",
    "detect", "track",
)  # fmt: skip
QUESTION_TASKS = TASKS[:9]  # answered by a word or a few
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)

_SEEN_WAY = 6.0  # units that a thing moves between its first and its last frame, at least
_BORDER = 2.0  # units around a border of two ninths where a place has no name
_PLAIN = {"appears": "appear", "vanishes": "vanish", "turns": "turn"}


def ask(clip: Clip, task: str, rng: np.random.Generator) -> Example | None:
    """A random prompt for a task, or None if the clip allows none."""
    return _ASK[task](clip, rng)


def examples(clip: Clip, rng: np.random.Generator) -> Iterator[Example]:
    """Endless prompts with answers for training, in rounds of all tasks in random order."""
    return in_rounds([*_ASK.values()], clip, rng)


def place_name(x: float, y: float, width: float, height: float) -> str | None:
    """In which ninth of the picture a point is, or None if it is close to another ninth."""
    ninth = []
    for value, side in ((x, width), (y, height)):
        if min(abs(value - side / 3), abs(value - 2 * side / 3)) < _BORDER:
            return None
        ninth.append(int(3 * value / side))
    column, row = ninth
    return PLACES[row][column]


def track_text(clip: Clip, actor: Actor) -> str:
    """The answer to `track`: seconds with boxes, "0 <loc…> ; 1 <loc…>", for each second when it is there."""
    parts = []
    for second in range(clip.seconds):
        thing = actor.at(second)
        if thing is not None:
            parts.append(f"{second} {boxes_to_text([Box(*thing.box)], clip.width, clip.height)}")
    return " ; ".join(parts)


# ---- questions ---------------------------------------------------------------------------------------------
# Each function makes a random prompt for its task, or None if the clip allows none.


def _ask_direction(clip: Clip, rng: np.random.Generator) -> Example | None:
    actors = [actor for actor in clip.actors if _is_seen_to_move_or_stand(clip, actor)]
    if not actors:
        return None
    actor = _choose(actors, rng)
    return Example("direction", f"which way does the {actor.name} move?", actor.motion)


def _is_seen_to_move_or_stand(clip: Clip, actor: Actor) -> bool:
    shown = [second for second in clip.times if actor.at(second) is not None]
    if len(shown) < 2:
        return False
    return actor.motion == STANDING or actor.speed * (shown[-1] - shown[0]) >= _SEEN_WAY


def _ask_first(clip: Clip, rng: np.random.Generator) -> Example | None:
    if len(clip.events) < 2 or clip.events[0][1].second == clip.events[1][1].second:
        return None
    actor, event = clip.events[0]
    return Example("first", "what happens first?", f"the {actor.name} {event.words}")


def _ask_order(clip: Clip, rng: np.random.Generator) -> Example | None:
    pairs = [(a, b) for a, b in permutations(clip.events, 2) if a[1].second != b[1].second]
    if not pairs:
        return None
    (actor, event), (other, later) = _choose(pairs, rng)
    question = f"does the {actor.name} {_plain(event)} before the {other.name} {later.words}?"
    return Example("order", question, "yes" if event.second < later.second else "no")


def _plain(event: Event) -> str:
    return f"{_PLAIN[event.verb]} {event.color}".rstrip()


def _ask_seconds(clip: Clip, rng: np.random.Generator) -> Example | None:
    if not clip.events:
        return None
    actor, event = _choose(clip.events, rng)
    return Example("seconds", f"how many seconds until the {actor.name} {event.words}?", str(event.second))


def _ask_length(clip: Clip, rng: np.random.Generator) -> Example | None:
    return Example("length", "how many seconds does the clip last?", str(clip.seconds))


def _ask_place(clip: Clip, rng: np.random.Generator) -> Example | None:
    second = _some_second(clip, rng)
    placed = [
        (thing.name, place)
        for thing in clip.at(second).things
        if (place := place_name(thing.x, thing.y, clip.width, clip.height)) is not None
    ]
    if not placed:
        return None
    name, place = _choose(placed, rng)
    return Example("place", f"where is the {name} at second {second}?", place)


def _ask_presence(clip: Clip, rng: np.random.Generator) -> Example | None:
    second, name = _some_second(clip, rng), _present_or_missing_name(clip, rng)
    found = clip.at(second).find(name)
    question = f"is there {with_article(name)} at second {second}?"
    return Example("presence", question, "yes" if found else "no")


def _ask_color(clip: Clip, rng: np.random.Generator) -> Example | None:
    second = _some_second(clip, rng)
    things = clip.at(second).things
    shapes = [thing.shape for thing in things]
    unique = [thing for thing in things if shapes.count(thing.shape) == 1]
    if not unique:
        return None
    thing = _choose(unique, rng)
    return Example("color", f"what color is the {thing.shape} at second {second}?", thing.color)


def _ask_count(clip: Clip, rng: np.random.Generator) -> Example | None:
    second = _some_second(clip, rng)
    number = len(clip.at(second).things)
    return Example("count", f"how many objects are there at second {second}?", str(number))


def _ask_caption(clip: Clip, rng: np.random.Generator) -> Example | None:
    return Example("caption", "caption en", clip.caption())


def _ask_detect(clip: Clip, rng: np.random.Generator) -> Example | None:
    second, name = _some_second(clip, rng), _present_or_missing_name(clip, rng)
    things = clip.at(second).find(name)
    text = detection_text(things, clip.width, clip.height)
    return Example("detect", f"detect {name} at second {second}", text, things)


def _ask_track(clip: Clip, rng: np.random.Generator) -> Example | None:
    actor = _choose(clip.actors, rng)
    return Example("track", f"track {actor.name}", track_text(clip, actor))


_ASK: dict[str, Ask[Clip]] = {
    "direction": _ask_direction,
    "first": _ask_first,
    "order": _ask_order,
    "seconds": _ask_seconds,
    "length": _ask_length,
    "place": _ask_place,
    "presence": _ask_presence,
    "color": _ask_color,
    "count": _ask_count,
    "caption": _ask_caption,
    "detect": _ask_detect,
    "track": _ask_track,
}


def _choose(options: Sequence[Option], rng: np.random.Generator) -> Option:
    return options[int(rng.integers(len(options)))]


def _some_second(clip: Clip, rng: np.random.Generator) -> int:
    """A whole second of the clip, half of the time one just before or just after something happens."""
    if clip.events and rng.random() < 0.5:
        _, event = _choose(clip.events, rng)
        return event.second - int(rng.integers(2))
    return int(rng.integers(clip.seconds))


def _present_or_missing_name(clip: Clip, rng: np.random.Generator) -> str:
    """Mostly the name of a thing of the clip, whether it has this name at the second in question or not."""
    if rng.random() < 0.8:
        names = [actor.name for actor in clip.actors]
        names += [f"{event.color} {actor.thing.shape}" for actor, event in clip.events if event.color]
        return _choose(names, rng)
    color, shape = _choose(ALL_PAIRS if clip.unseen_pairs else SEEN_PAIRS, rng)
    return f"{color} {shape}"


def vocabulary() -> Iterator[str]:
    """Texts that contain every word of this world, for building a tokenizer."""
    for color in COLORS:
        for shape in SHAPES:
            name = f"{color} {shape}"
            for size in SIZES:
                yield f"a {size} {name} stands still and turns {color} at second 1 ; a {size} {name}"
            yield f"does the {name} turn {color} before the {name} vanishes?\nis there {with_article(name)}"
            yield f"detect {name} at second 1\ntrack {name}\nwhat color is the {shape} at second 1?\n{color}"
            yield f"how many seconds until the {name} appears?\n1"
            yield f"where is the {name} at second 1?\nwhich way does the {name} move?\n{STANDING}"
    for direction in DIRECTIONS:
        yield f"a small red circle moves {direction} and appears at second 1\n{direction}"
    for verb, plain in _PLAIN.items():
        yield f"the red circle {verb}, does the red circle {plain}"
    yield from (place for row in PLACES for place in row)
    yield from (f"{number} at second {number}" for number in range(10))
    yield from ("yes", "no", "none", "caption en\n", "what happens first?\n")
    yield "how many seconds does the clip last?\n"
    yield "how many objects are there at second 1?\n1 <loc0000> ; 2 <loc0000> red circle"
