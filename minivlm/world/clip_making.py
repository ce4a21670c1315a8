"""Random clips: which things there are, what happens to them, and ways on which they never meet.

Things never overlap, never leave the picture, and no two of a clip ever have the same name, not even after
one of them has changed its color. So a name is enough to ask about a thing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from minivlm.errors import InputError
from minivlm.world.clips import DIRECTIONS, STANDING, VERBS, Actor, Clip, Event
from minivlm.world.scenes import (
    ALL_PAIRS,
    COLORS,
    HELD_OUT_PAIRS,
    ROOM,
    SEEN_PAIRS,
    SIZES,
    WORLD,
    Split,
    Thing,
    check_sides,
)

FRAME_RATES = (1, 2, 4, 8)  # frames per second; each has a frame at every whole second

_SIZE_NAMES = ("small", "medium")  # a large thing would have nowhere to go
_LEAST_WAY, _MOST_SPEED = 10.0, 16.0  # units, units per second: motion that is easy to see and to follow
_STANDING_SHARE = 0.25
_GAP = 1.5  # units between things
_ORDER_GAP = 3.0  # first places differ by at least this much from left to right, so that the order is clear

Pair = tuple[str, str]  # color and shape


def make_clip(
    rng: np.random.Generator,
    split: Split = "train",
    easy: bool = False,
    *,
    seconds: int | None = None,
    fps: int | None = None,
    width: float = WORLD,
    height: float = WORLD,
) -> Clip:
    """A random clip.

    Args:
        split: "train" and "test" have no held-out pair of color and shape, not even after a change of color;
            each clip of "unseen" has at least one.
        easy: one or two things and one event, for the start of training. Otherwise two or three things and
            one or two events.
        seconds: at least 2; None: 3 to 8.
        fps: frames per second, 1 to 8; None: one of FRAME_RATES.
        width, height: of the picture, in units. Small pictures have fewer things.

    Raises InputError: less than 2 seconds, other frame rates, a side under LEAST_SIDE.
    """
    check_sides(width, height)
    if seconds is not None and seconds < 2:
        raise InputError(f"a clip of {seconds} seconds is too short for anything to happen: give at least 2")
    if fps is not None and not 1 <= fps <= 8:
        raise InputError(f"{fps} frames per second cannot be drawn: give 1 to 8")
    seconds = int(rng.integers(3, 9)) if seconds is None else seconds
    fps = int(rng.choice(FRAME_RATES)) if fps is None else fps
    count = int(rng.integers(1, 3) if easy else rng.integers(2, 4))
    happening = 1 if easy else int(rng.integers(1, 3))
    count = min(count, int(width * height / ROOM))
    while True:
        pairs = _choose_pairs(rng, count, split)
        events = _choose_events(rng, pairs, happening, seconds, split)
        actors = _place(rng, pairs, events, seconds, width, height)
        if actors is not None:
            break
    return Clip(
        actors=tuple(sorted(actors, key=lambda actor: actor.place(actor.there()[0]))),
        seconds=seconds,
        fps=fps,
        background=int(rng.integers(165, 251)),
        noise=float(rng.uniform(0.0, 6.0)),
        noise_seed=int(rng.integers(2**31)),
        unseen_pairs=split == "unseen",
        width=width,
        height=height,
    )


def _choose_pairs(rng: np.random.Generator, count: int, split: Split) -> list[Pair]:
    """Different pairs of color and shape."""
    allowed = ALL_PAIRS if split == "unseen" else SEEN_PAIRS
    pairs = [allowed[i] for i in rng.choice(len(allowed), size=count, replace=False)]
    if split == "unseen" and not HELD_OUT_PAIRS.intersection(pairs):
        held_out = sorted(HELD_OUT_PAIRS)
        pairs[0] = held_out[rng.integers(len(held_out))]
    return pairs


def _choose_events(
    rng: np.random.Generator, pairs: list[Pair], happening: int, seconds: int, split: Split
) -> list[Event | None]:
    """Something for the first `happening` of the pairs, and nothing for the others."""
    events: list[Event | None] = [None] * len(pairs)
    taken = set(pairs) if split == "unseen" else {*pairs, *HELD_OUT_PAIRS}
    for number, (_, shape) in enumerate(pairs[:happening]):
        verb, second = VERBS[rng.integers(len(VERBS))], int(rng.integers(1, seconds))
        if verb == "turns":
            free = [color for color in COLORS if (color, shape) not in taken]
            color = free[rng.integers(len(free))]
            taken.add((color, shape))
            events[number] = Event(verb, second, color, _shade(rng, color))
        else:
            events[number] = Event(verb, second)
    return events


def _place(
    rng: np.random.Generator,
    pairs: list[Pair],
    events: list[Event | None],
    seconds: int,
    width: float,
    height: float,
) -> list[Actor] | None:
    """Find a free way for each thing, or give up (None) after 20 tries for one of them."""
    actors: list[Actor] = []
    for pair, event in zip(pairs, events, strict=True):
        for _ in range(20):
            actor = _on_some_way(rng, pair, event, seconds, width, height)
            if actor is not None and all(_apart(actor, other, seconds) for other in actors):
                actors.append(actor)
                break
        else:
            return None
    return actors


def _on_some_way(
    rng: np.random.Generator, pair: Pair, event: Event | None, seconds: int, width: float, height: float
) -> Actor | None:
    """A thing that stays in the picture while it is there, or None if it has no room to move."""
    color, shape = pair
    size = _SIZE_NAMES[rng.integers(len(_SIZE_NAMES))]
    radius = float(rng.uniform(*SIZES[size]))
    motion = STANDING if rng.random() < _STANDING_SHARE else list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
    share_of_way, *share_of_room = rng.random(3)
    actor = Actor(Thing(shape, color, size, 0.0, 0.0, radius, _shade(rng, color)), motion, 0.0, event)
    first, last = actor.there(seconds)
    room = np.array([width, height]) - 2 * radius - 1.0
    way = np.zeros(2)
    if motion != STANDING:
        most = min(float(room @ np.abs(DIRECTIONS[motion])), _MOST_SPEED * (last - first))
        least = max(_LEAST_WAY, most / 2)
        if least > most:
            return None
        way = (least + (most - least) * share_of_way) * np.array(DIRECTIONS[motion])
    # Where it is first seen: anywhere from which the way ends inside.
    start = radius + 0.5 - way.clip(max=0) + share_of_room * (room - np.abs(way))
    velocity = way / (last - first)
    x, y = (start - velocity * first).tolist()
    return replace(actor, thing=replace(actor.thing, x=x, y=y), speed=float(np.abs(velocity).sum()))


def _apart(actor: Actor, other: Actor, seconds: int) -> bool:
    """Whether two things stay apart while both are there, and are first seen in a clear order."""
    if abs(actor.place(actor.there()[0])[0] - other.place(other.there()[0])[0]) <= _ORDER_GAP:
        return False
    spans = actor.there(seconds), other.there(seconds)
    first, last = max(spans[0][0], spans[1][0]), min(spans[0][1], spans[1][1])
    if first > last:
        return True
    distance = np.subtract(actor.place(0), other.place(0))
    speed = np.subtract(actor.velocity, other.velocity)
    # |distance + t speed| is least where its derivative is 0, or at one end.
    closest = -(distance @ speed) / (speed @ speed) if speed.any() else first
    distance = distance + np.clip(closest, first, last) * speed
    return bool(np.linalg.norm(distance) > actor.thing.radius + other.thing.radius + _GAP)


def _shade(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    """A color, a little different for each thing."""
    red, green, blue = (min(max(v + int(rng.integers(-12, 13)), 0), 255) for v in COLORS[color])
    return red, green, blue
