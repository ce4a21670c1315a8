"use strict";
/* What every page with pictures needs: the name of a thing, and pixels on a canvas. */

/** "a large red circle": the size in words is that of the nearest range of the drawn world. @param {Thing} thing */
function describe(thing) {
  const far = (name) => Math.abs(thing.radius - (DRAWN_WORLD.sizes[name][0] + DRAWN_WORLD.sizes[name][1]) / 2);
  const size = Object.keys(DRAWN_WORLD.sizes).reduce((best, name) => (far(name) < far(best) ? name : best));
  return `${size} ${thing.color} ${thing.shape}`;
}

/** Pixels as they are; the style sheet makes them large. @param {HTMLCanvasElement} canvas @param {Picture} picture */
function draw_picture(canvas, picture) {
  const pen = pen_of(canvas), image = pen.createImageData(picture.width, picture.height);
  for (let i = 0; i < picture.width * picture.height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = picture.data[3 * i + c];
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}
