"use strict";
/* Batches to begin with. A picture is a list of things: shape, color, x, y, radius. */

const RED = [["circle", "red", 30, 34, 18]], RED_AGAIN = [["circle", "red", 35, 28, 17]];
const BLUE = [["square", "blue", 20, 20, 8], ["star", "yellow", 45, 44, 10]];
const GREEN = [["triangle", "green", 32, 30, 11]];
const PINK = [["circle", "pink", 18, 44, 7], ["square", "orange", 46, 20, 11]];
const OF_RED = "a large red circle", OF_BLUE = "a small blue square, a medium yellow star";
const OF_GREEN = "a medium green triangle", OF_PINK = "a small pink circle, a medium orange square";

const TRIES = [
  {
    name: "Four pairs",
    pairs: [[RED, OF_RED], [BLUE, OF_BLUE], [GREEN, OF_GREEN], [PINK, OF_PINK]],
    cell: [0, 0],
    say: "Every picture has its own caption, and no caption fits another picture. Both losses are small.",
  },
  {
    name: "One caption twice",
    pairs: [[RED, OF_RED], [RED_AGAIN, OF_RED], [BLUE, OF_BLUE], [PINK, OF_PINK]],
    cell: [0, 1],
    say: "Pictures 1 and 2 both show a large red circle, and their captions are equal. CLIP has to choose between two right "
      + "answers: each gets about half, and each of these choices costs about log 2 = 0.69. SigLIP says yes to all four "
      + "cells. It is told that two of them are wrong, and pays for each alone. No other row or column notices.",
  },
  {
    name: "A caption for nothing",
    pairs: [[RED, OF_RED], [BLUE, OF_BLUE], [GREEN, "a small purple star"], [PINK, OF_PINK]],
    cell: [2, 0],
    say: "There is no purple star. CLIP lets picture 3 choose all the same, and its row sums to 1: most of it goes to the large "
      + "red circle. SigLIP says no to the whole row: for it, nothing may fit.",
  },
  {
    name: "Two captions swapped",
    pairs: [[RED, OF_BLUE], [BLUE, OF_RED], [GREEN, OF_GREEN], [PINK, OF_PINK]],
    cell: [0, 1],
    say: "Captions 1 and 2 have changed places, as a wrong line in the data would have it. The towers are sure of the other "
      + "order, so both losses are large. Training would now teach them something false.",
  },
  {
    name: "Shapes alone",
    pairs: [[RED, "a circle"], [BLUE, "a square, a star"], [GREEN, "a triangle"], [PINK, "a circle, a square"]],
    cell: [1, 1],
    say: "True, but short. These towers have only read captions with sizes and colors, so every cosine falls. CLIP compares: "
      + "three of four pictures still choose their own caption. SigLIP says no to all pairs.",
  },
];

/* For a batch that grows. */
const MORE_PAIRS = [
  [[["star", "purple", 32, 32, 16]], "a large purple star"],
  [[["triangle", "cyan", 18, 22, 10], ["circle", "blue", 46, 42, 7]], "a medium cyan triangle, a small blue circle"],
];

/** @param {any[]} pair @returns {Pair} */
function as_pair([things, caption]) {
  const thing = ([shape, color, x, y, radius]) => ({ shape, color, x, y, radius, rgb: DRAWN_WORLD.colors[color] });
  return { scene: { background: 215, things: things.map(thing) }, caption };
}
