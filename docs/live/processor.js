"use strict";
/* From the pixels of a picture to what the tower reads. As minivlm/processing/images.py.

   A picture here is {width, height, data}, with data RGB, a byte each, row by row. */

/* RGB bytes -> pixel_values [C, height, width] from -1 to 1 */
function to_pixel_values(picture, { rescale_factor, image_mean, image_std }) {
  const area = picture.width * picture.height, pixel_values = Tensor.zeros(3, picture.height, picture.width);
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < area; i++)
      pixel_values.data[c * area + i] = (Math.fround(picture.data[3 * i + c] * rescale_factor) - image_mean[c]) / image_std[c];
  return pixel_values;
}

/* A picture of any size, as a square; the aspect ratio is not kept. The filter is bicubic, and as wide as the pixels that
   merge, as in Pillow: first from left to right, rounded to bytes, and then from top to bottom. (New versions of
   Pillow begin from top to bottom for high pictures, and round and clip in between: bytes may differ a little.) */
function resize(picture, side) {
  if (picture.width === side && picture.height === side) return picture;
  return turned(along_rows(turned(along_rows(picture, side)), side));
}

function along_rows(picture, side) {
  const data = new Uint8ClampedArray(3 * side * picture.height);
  const scale = picture.width / side, reach = 2 * Math.max(scale, 1);
  for (let x = 0; x < side; x++) {
    const middle = (x + 0.5) * scale;
    const first = Math.max(0, Math.floor(middle - reach + 0.5));
    const end = Math.min(picture.width, Math.floor(middle + reach + 0.5));
    const shares = [];
    for (let i = first; i < end; i++) shares.push(cubic((i - middle + 0.5) / Math.max(scale, 1)));
    const sum = shares.reduce((a, b) => a + b, 0);
    const whole = shares.map((share) => Math.round((share / sum) * 2 ** 22)); // as Pillow, in whole numbers
    for (let y = 0; y < picture.height; y++)
      for (let c = 0; c < 3; c++) {
        let value = 2 ** 21; // rounds
        for (let i = first; i < end; i++) value += whole[i - first] * picture.data[3 * (y * picture.width + i) + c];
        data[3 * (y * side + x) + c] = Math.floor(value / 2 ** 22); // clamped to 0 and 255
      }
  }
  return { width: side, height: picture.height, data };
}

function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/* Rows become columns. */
function turned(picture) {
  const { width, height } = picture, data = new Uint8ClampedArray(picture.data.length);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < 3; c++) data[3 * (x * height + y) + c] = picture.data[3 * (y * width + x) + c];
  return { width: height, height: width, data };
}
