"""Clips of the drawn world: things that move, stand, appear, vanish and change color.

A clip is a scene that changes: `clip.at(second)` is the scene of that moment, drawn like any other. What
happens is described in seconds and units, never in frames. So the same clip can be drawn at 1 or 8 frames a
second and at any size, and what is true about it stays true. Random clips are made in clip_making.py, and
questions about them are in clip_questions.py.

A thing moves straight and evenly as long as it is there, or stands. At most one other thing happens to it,
always at a whole second: it appears, it vanishes, or it turns to another color.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from minivlm.world.scenes import WORLD, Scene, Thing, cell_depths

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STANDING = "nowhere"  # where a thing moves that does not
MOTIONS = ("background", STANDING, *DIRECTIONS)  # the classes of `motion_labels`
VERBS = ("appears", "vanishes", "turns")


@dataclass(frozen=True)
class Event:
    """What happens to a thing: the picture of `second` is the first that shows it."""

    verb: str  # of VERBS
    second: int
    color: str = ""  # that it turns to
    rgb: tuple[int, int, int] = (0, 0, 0)

    @property
    def words(self) -> str:
        """What a sentence says of the thing: "appears", "turns blue"."""
        return f"{self.verb} {self.color}".rstrip()


@dataclass(frozen=True)
class Actor:
    """A thing and what it does. Its place is that of second 0, when it may be outside and not yet there."""

    thing: Thing
    motion: str  # STANDING, or one of DIRECTIONS
    speed: float  # units per second
    event: Event | None = None

    @property
    def name(self) -> str:
        """Its first name, such as "red circle"."""
        return self.thing.name

    @property
    def velocity(self) -> tuple[float, float]:
        """Units per second to the right and down."""
        dx, dy = DIRECTIONS.get(self.motion, (0, 0))
        return dx * self.speed, dy * self.speed

    def there(self, seconds: float = math.inf) -> tuple[float, float]:
        """From when until before when it is there, in a clip of so many seconds."""
        verb, second = ("", 0) if self.event is None else (self.event.verb, self.event.second)
        return (second if verb == "appears" else 0), (second if verb == "vanishes" else seconds)

    def at(self, second: float) -> Thing | None:
        """The thing as it is then, or None if it is not there."""
        first, last = self.there()
        if not first <= second < last:
            return None
        x, y = self.place(second)
        if self.event is not None and self.event.verb == "turns" and second >= self.event.second:
            return replace(self.thing, x=x, y=y, color=self.event.color, rgb=self.event.rgb)
        return replace(self.thing, x=x, y=y)

    def place(self, second: float) -> tuple[float, float]:
        """x and y of its center then, whether it is there or not."""
        dx, dy = self.velocity
        return self.thing.x + dx * second, self.thing.y + dy * second


@dataclass(frozen=True)
class Clip:
    """Actors on a gray background, for a number of seconds. `replace(clip, fps=8)` shows the same."""

    actors: tuple[Actor, ...]  # from left to right, by where each is first seen
    seconds: int
    fps: int  # frames per second
    background: int  # gray level
    noise: float  # standard deviation in gray levels, new in every frame
    noise_seed: int
    unseen_pairs: bool = False  # whether questions may name pairs that are held out from training
    width: float = WORLD  # of the picture, in units
    height: float = WORLD

    @cached_property
    def times(self) -> tuple[float, ...]:
        """The second of each frame. The last frame lasts until the end."""
        return tuple(number / self.fps for number in range(self.seconds * self.fps))

    @cached_property
    def events(self) -> tuple[tuple[Actor, Event], ...]:
        """What happens and to whom, in the order of time."""
        found = [(actor, actor.event) for actor in self.actors if actor.event is not None]
        return tuple(sorted(found, key=lambda pair: pair[1].second))

    def at(self, second: float) -> Scene:
        """The scene of a moment, with things from left to right."""
        things = [thing for actor in self.actors if (thing := actor.at(second)) is not None]
        return Scene(
            things=tuple(sorted(things, key=lambda thing: thing.x)),
            background=self.background,
            noise=self.noise,
            noise_seed=self.noise_seed + round(1000 * second),
            unseen_pairs=self.unseen_pairs,
            width=self.width,
            height=self.height,
        )

    def frames(self, pixels: int = 64) -> Iterator[Image.Image]:
        """The pictures of `times`, one after the other, `pixels` wide, RGB."""
        return (self.at(second).draw(pixels) for second in self.times)

    def caption(self) -> str:
        """Every thing from left to right: "a small red circle moves left and vanishes at second 3 ; ..."."""
        return " ; ".join(_sentence(actor) for actor in self.actors)

    def motion_labels(self, rows: int, columns: int, temporal_patch_size: int = 2) -> np.ndarray:
        """Where things move that lie on each cell of a grid, for a dense loss on merged tokens.

        Returns:
            [T, rows, columns] class numbers in MOTIONS, 0 for the background. F frames make
            T = ceil(F / temporal_patch_size) cells; what fills the last one is its frame again, as in models.
        """
        labels = np.zeros((math.ceil(len(self.times) / temporal_patch_size), rows * columns), dtype=np.int64)
        deepest = np.zeros(labels.shape)
        for number, second in enumerate(self.times):
            cell = number // temporal_patch_size
            for actor in self.actors:
                if actor.at(second) is None:
                    continue
                depths = cell_depths(
                    *actor.place(second), actor.thing.radius, rows, columns, self.width, self.height
                )
                mine = np.flatnonzero(depths > deepest[cell])
                deepest[cell, mine] = depths[mine]
                labels[cell, mine] = MOTIONS.index(actor.motion)
        return labels.reshape(-1, rows, columns)


def _sentence(actor: Actor) -> str:
    said = ["stands still" if actor.motion == STANDING else f"moves {actor.motion}"]
    if actor.event is not None:
        told = f"{actor.event.words} at second {actor.event.second}"
        said.insert(0 if actor.event.verb == "appears" else 1, told)
    return f"a {actor.thing.size} {actor.name} {' and '.join(said)}"
