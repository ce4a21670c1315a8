"use strict";
/* Reads the weights that build.py wrote, all as one string of base64.

   A page that was opened from the disk may not fetch a file, but it may load a script, so they are one. */

/* Names and shapes, and all numbers one after the other -> name -> Tensor */
function read_weights({ shapes, base64 }) {
  const numbers = new Float32Array(bytes_from(base64).buffer), weights = new Map();
  let start = 0;
  for (const [name, shape] of shapes) {
    const size = shape.reduce((a, b) => a * b, 1);
    weights.set(name, new Tensor(numbers.subarray(start, start + size), ...shape));
    start += size;
  }
  return weights;
}

/* A loop: Uint8Array.from(atob(...)) takes ten times as long. */
function bytes_from(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const characters = atob(base64), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}
