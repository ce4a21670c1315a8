"""Answers that point before they conclude, and what follows from the boxes that they name.

    think is the red circle above the blue star?
    <loc0102><loc0611>... red circle ; <loc0560><loc0087>... blue star ; yes
    `---------------- evidence: boxes, as `detect` answers ----------' ; conclusion

Evidence in boxes can be checked: whether they are true, by the scene, and whether the conclusion follows from
them, by `conclude`, which looks at question and boxes and at no picture. Words for what a model "thinks" are
elsewhere in the literature (chain of thought, https://arxiv.org/abs/2201.11903); few can be checked so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from minivlm.processing.boxes import Box, boxes_to_text, text_to_boxes
from minivlm.world.questions import Example
from minivlm.world.scenes import COLORS, SHAPES, WORLD, Scene

THINK = "think "  # how a prompt begins that asks for evidence
END = " ; "  # between two boxes, and between the last one and the conclusion

_NAME = rf"(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"
_RELATION = re.compile(rf"is the ({_NAME}) (left of|right of|above|below) the ({_NAME})\?")
_LARGER = re.compile(rf"is the ({_NAME}) larger than the ({_NAME})\?")
_NEARER = re.compile(rf"which is nearer to the ({_NAME}), the ({_NAME}) or the ({_NAME})\?")
_LEFT_COUNT = re.compile(rf"how many objects are left of the ({_NAME})\?")
_EXISTENCE = re.compile(rf"is there an? ({_NAME})\?")


def think(example: Example, width: float = WORLD, height: float = WORLD) -> Example:
    """The same question as one to think about: its answer points to `example.things` first.

    Raises ValueError: an example without things.
    """
    if not example.things:
        raise ValueError(f"{example.prefix!r} rests on no things: there is nothing to point at")
    boxes = boxes_to_text([Box(*thing.box, thing.name) for thing in example.things], width, height)
    return replace(example, prefix=THINK + example.prefix, suffix=f"{boxes}{END}{example.suffix}")


def conclusion(answer: str) -> str:
    """What is left of an answer without its evidence; all of an answer that names none."""
    return answer.rpartition(END)[2].strip() if END in answer else answer


def evidence(answer: str, width: float = WORLD, height: float = WORLD) -> list[Box]:
    """The boxes that an answer names before it concludes."""
    return text_to_boxes(answer, width, height)


def boxes_of(scene: Scene) -> list[Box]:
    """All there is in a scene, as evidence."""
    return [Box(*thing.box, thing.name) for thing in scene.things]


def conclude(prompt: str, boxes: Sequence[Box]) -> str | None:
    """The answer that follows from boxes alone; None where they do not say, or the question is no such one.

    Only the form of a question decides how boxes are compared: their middles, their areas, their number. A
    name has to be that of one box. To count what lies to the left, all boxes are evidence.
    """
    question = prompt.removeprefix(THINK)
    if match := _EXISTENCE.fullmatch(question):
        return "yes" if any(box.name == match[1] for box in boxes) else "no"
    if match := _LEFT_COUNT.fullmatch(question):
        named = _named(boxes, match[1])
        if named is None:
            return None
        return str(sum(_middle(box)[0] < _middle(named)[0] for box in boxes))
    if match := _LARGER.fullmatch(question):
        first, second = (_named(boxes, name) for name in match.groups())
        if first is None or second is None:
            return None
        return "yes" if _area(first) > _area(second) else "no"
    if match := _RELATION.fullmatch(question):
        first, second = _named(boxes, match[1]), _named(boxes, match[3])
        if first is None or second is None:
            return None
        (x, y), (other_x, other_y) = _middle(first), _middle(second)
        holds = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}
        return "yes" if holds[match[2]] else "no"
    if match := _NEARER.fullmatch(question):
        middle, first, second = (_named(boxes, name) for name in match.groups())
        if middle is None or first is None or second is None:
            return None
        return min(first, second, key=lambda box: math.dist(_middle(box), _middle(middle))).name
    return None


def _named(boxes: Sequence[Box], name: str) -> Box | None:
    """The one box of this name."""
    found = [box for box in boxes if box.name == name]
    return found[0] if len(found) == 1 else None


def _middle(box: Box) -> tuple[float, float]:
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


def _area(box: Box) -> float:
    return (box.x1 - box.x0) * (box.y1 - box.y0)
