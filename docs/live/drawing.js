"use strict";
/* Small helpers of the editor: pictures in and out, boxes, names. */

/* "a large red circle": the size in words is that of the nearest range of the drawn world. */
function describe(thing) {
  const far = (name) => Math.abs(thing.radius - (DRAWN_WORLD.sizes[name][0] + DRAWN_WORLD.sizes[name][1]) / 2);
  const size = Object.keys(DRAWN_WORLD.sizes).reduce((best, name) => (far(name) < far(best) ? name : best));
  return `${size} ${thing.color} ${thing.shape}`;
}

function load_sample(number) {
  const { background, things } = structuredClone(DRAWN_WORLD.samples[number]);
  Object.assign(page, { scene: { background, things }, sample: number, upload: null, token: null });
  changed();
}

/* Pixels as they are; the style sheet makes them large. */
function draw_picture(canvas, picture) {
  const pen = canvas.getContext("2d"), image = pen.createImageData(picture.width, picture.height);
  for (let i = 0; i < picture.width * picture.height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = picture.data[3 * i + c];
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}

/* A box of the answer, with its name, and its outline if the answer has one. */
function drawn_box({ x0, y0, x1, y1, name, codes }) {
  const frame = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  const label = make_svg("text", { x: x0, y: y0 > 5 ? y0 - 1 : y1 + 3.5, class: "box_name" }, name);
  const drawn = [make_svg("rect", { ...frame, class: "box_under" }), make_svg("rect", { ...frame, class: "box" }), label];
  if (codes) drawn.unshift(drawn_mask(codebook.decode(codes), frame));
  return drawn;
}

/* A mask [64, 64] stretched over a box: one small rectangle for each run of pixels that lie inside. */
function drawn_mask(mask, { x, y, width, height }) {
  const side = Math.sqrt(mask.length), [across, down] = [width / side, height / side];
  let path = "";
  for (let row = 0; row < side; row++)
    for (let from = 0, to; from < side; from = to) {
      const inside = mask[row * side + from] > 0;
      for (to = from + 1; to < side && mask[row * side + to] > 0 === inside; ) to++;
      if (inside) path += `M${x + from * across} ${y + row * down}h${(to - from) * across}v${down}h${(from - to) * across}z`;
    }
  return make_svg("path", { d: path, class: "outlined" });
}

/* The pixels of a file, RGB; white lies under what is transparent. */
async function read_picture(file) {
  const bitmap = await createImageBitmap(file), { width, height } = bitmap;
  const canvas = make("canvas", { width, height }), pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0);
  const rgba = pen.getImageData(0, 0, width, height).data, data = new Uint8ClampedArray((rgba.length / 4) * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) for (let c = 0; c < 3; c++) data[j++] = rgba[i + c];
  return { width, height, data };
}
