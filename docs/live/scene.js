"use strict";
/* The drawn world, without noise: as minivlm/world/scenes.py, to the last bit.

   A scene is {things, background}, where background is a gray level, and a thing is {shape, color, size, x, y, radius,
   rgb}. The world is 64 units wide and high, and the model sees it in 64 pixels. A browser's own canvas is not asked to
   draw it: each one smooths edges in its own way, and the model was trained on the way that is written here. */

const WORLD = 64, SUPERSAMPLING = 4;
const CORNERS = { square: 4, triangle: 3, star: 10 };

/* Corners [x, y] in units; a circle is given by the two corners of its box. */
function outline(thing) {
  const { shape, x, y, radius } = thing;
  if (shape === "circle") return [[x - radius, y - radius], [x + radius, y + radius]];
  const corners = CORNERS[shape], start = shape === "square" ? Math.PI / 4 : -Math.PI / 2;
  return Array.from({ length: corners }, (_, i) => {
    const reach = radius * (shape === "star" && i % 2 ? 0.45 : 1);
    const angle = start + (2 * Math.PI * i) / corners;
    return [x + reach * Math.cos(angle), y + reach * Math.sin(angle)];
  });
}

/* x0, y0, x1, y1 in units: the smallest box around the drawn shape. */
function box_of(thing) {
  const xs = outline(thing).map(([x]) => x), ys = outline(thing).map(([, y]) => y);
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

/* The picture, RGB: drawn four times as large, then every 4 x 4 pixels averaged. */
function draw_scene(scene, pixels = WORLD) {
  const side = pixels * SUPERSAMPLING;
  const big = new Uint8Array(side * side); // 0 is the ground, n is thing number n - 1
  scene.things.forEach((thing, number) => {
    const points = outline(thing).map(([x, y]) => [(x * side) / WORLD, (y * side) / WORLD]);
    paint(big, side, points, thing.shape, number + 1);
  });
  const colors = [Array(3).fill(scene.background), ...scene.things.map((thing) => thing.rgb)];
  const data = new Uint8ClampedArray(3 * pixels * pixels);
  for (let y = 0; y < pixels; y++)
    for (let x = 0; x < pixels; x++)
      for (let c = 0; c < 3; c++) {
        let column = 0;
        for (let j = 0; j < 4; j++) {
          let row = 0;
          for (let i = 0; i < 4; i++) row += colors[big[(4 * y + j) * side + 4 * x + i]][c];
          column += (row + 2) >> 2; // rounded after each of the two passes, as Pillow does
        }
        data[3 * (y * pixels + x) + c] = (column + 2) >> 2;
      }
  return { width: pixels, height: pixels, data };
}

function paint(big, side, points, shape, ink) {
  const corners = points.map(([x, y]) => [Math.trunc(x), Math.trunc(y)]);
  const fill = (y, from, to) => {
    const first = Math.max(from, 0), end = Math.min(to + 1, side);
    if (y >= 0 && y < side && first < end) big.fill(ink, y * side + first, y * side + end);
  };
  if (shape === "circle") fill_ellipse(corners, fill);
  else fill_polygon(corners, side, fill);
}
