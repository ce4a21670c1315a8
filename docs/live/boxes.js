"use strict";
/* Boxes as words: <loc0256><loc0128><loc0767><loc0895> red circle. As minivlm/processing/boxes.py.

   A coordinate is one of 1024 words, a share of the height or width. y comes before x: y0 x0 y1 x1. */

const NUM_BINS = 1024;
const OBJECT = /((?:<loc[0-9]{4}>)+)((?:<seg[0-9]{3}>)*)([^;]*?)(?=;|<loc[0-9]{4}>|$)/g;

/* The boxes in an answer, {x0, y0, x1, y1, name, codes}, in parts of the given size. A part counts only if it has exactly
   four coordinates and an area; everything else is skipped. `codes` are those of the outline, if there are 16. */
function text_to_boxes(text, width, height) {
  const boxes = [];
  for (const [, locs, segs, name] of text.matchAll(OBJECT)) {
    const numbers = (words) => [...words.matchAll(/[0-9]+/g)].map(([digits]) => Number(digits));
    const bins = numbers(locs), codes = numbers(segs);
    if (bins.length !== 4 || Math.max(...bins) >= NUM_BINS || /<seg[0-9]{3}>/.test(name)) continue;
    const [y0, x0, y1, x1] = bins.map((bin) => bin / (NUM_BINS - 1));
    if (x0 >= x1 || y0 >= y1) continue;
    const outlined = codes.length === 16 && Math.max(...codes) < 128;
    const box = { x0: x0 * width, y0: y0 * height, x1: x1 * width, y1: y1 * height };
    boxes.push({ ...box, name: name.trim(), codes: outlined ? codes : null });
  }
  return boxes;
}
