"use strict";
/* Which pixels a circle or a polygon covers, row by row. The rules are those of Pillow's ImageDraw, so that pictures are
   the same as in Python; corners are whole numbers. `fill(y, from, to)` is called for runs of pixels, ends included. */

/* An ellipse in the box [[x0, y0], [x1, y1]]. From the rightmost point of a quarter up to its top, always the neighbor
   that is nearest to x^2 / a^2 + y^2 / b^2 = 1; a row ends at the first point that is reached in it. */
function fill_ellipse([[x0, y0], [x1, y1]], fill) {
  const a = x1 - x0, b = y1 - y0;
  if (a < 0 || b < 0) return;
  const off = (x, y) => Math.abs(a * a * y * y + b * b * x * x - a * a * b * b);
  let x = a, y = b % 2, row = -1; // twice the distance from the middle, so that it is a whole number
  for (;;) {
    if (y !== row) {
      row = y;
      for (const up of new Set([y, -y])) fill(y0 + (up + b) / 2, x0 + (a - x) / 2, x0 + (a + x) / 2);
    }
    if (x === a % 2 && y === b) return;
    const steps = x > 1 ? [[x, y + 2], [x - 2, y + 2], [x - 2, y]] : [[x, y + 2]];
    let best = steps[0];
    for (const step of steps) if (off(...step) < off(...best)) best = step;
    [x, y] = best;
  }
}

/* A polygon. In each row, the edges are crossed from left to right, and every second stretch between them is inside. */
function fill_polygon(corners, height, fill) {
  const edges = [];
  corners.forEach(([x0, y0], i) => {
    const [x1, y1] = corners[(i + 1) % corners.length];
    if (y0 === y1) fill(y0, Math.min(x0, x1), Math.max(x0, x1));
    else edges.push({ x0, y0, top: Math.min(y0, y1), bottom: Math.max(y0, y1), slope: f32((x1 - x0) / (y1 - y0)) });
  });
  const ys = corners.map(([, y]) => y);
  const top = Math.max(Math.min(...ys), 0), bottom = Math.min(Math.max(...ys), height);
  for (let y = top; y <= bottom; y++) {
    const crossed = [];
    edges.forEach((edge, i) => {
      if (y < edge.top || y > edge.bottom) return;
      let x = crossing(edge, y);
      if (y === edge.bottom && y < bottom) crossed.push(x); // the lower end counts twice
      else if ((y === edge.top || y === edge.bottom) && edge.slope !== 0) x = pointed(x, y, edge, edges.slice(0, i));
      crossed.push(x);
    });
    crossed.sort((p, q) => p - q);
    for (let i = 1; i < crossed.length; i += 2) fill(y, half_up(crossed[i - 1]), half_down(crossed[i]));
  }
}

/* Where an edge crosses a row, in 32 bits. */
function crossing(edge, y) {
  return f32(f32((y - edge.y0) * edge.slope) + edge.x0);
}

/* The tip of a flat corner. Where two edges meet, the row holds one pixel, and the next row may begin far beside it:
   the tip is drawn longer, so that they touch. */
function pointed(x, y, edge, others) {
  const next = y === edge.bottom ? y - 1 : y + 1;
  for (const other of others) {
    if ((y !== other.top && y !== other.bottom) || other.slope === 0) continue;
    if (away(x) !== away(crossing(other, y)) || next < other.top || next > other.bottom) continue;
    const [near, far] = [crossing(edge, next), crossing(other, next)];
    if (x > near + 1 && x > far + 1) return away(Math.max(near, far)) + 1;
    if (x < near - 1 && x < far - 1) return away(Math.min(near, far)) - 1;
    return x;
  }
  return x;
}

const f32 = Math.fround;
const away = (x) => Math.sign(x) * Math.floor(Math.abs(x) + 0.5); // halves away from 0
const half_up = away;
const half_down = (x) => Math.sign(x) * Math.ceil(Math.abs(x) - 0.5); // halves toward 0
