"use strict";
/* Rotary positions, as minivlm/rope.py. Elements i and i + Dh / 2 of a head are a pair, and each pair is turned by an angle
   that is proportional to the position: x [T, heads * Dh], position_ids (T numbers) -> the same shape. */
function apply_rotary(x, position_ids, head_dim, theta) {
  const y = Tensor.zeros(...x.shape), half = head_dim / 2;
  for (let t = 0; t < x.rows; t++) {
    const from = x.row(t), to = y.row(t);
    for (let i = 0; i < half; i++) {
      const angle = position_ids[t] * theta ** ((-2 * i) / head_dim);
      const cos = Math.cos(angle), sin = Math.sin(angle);
      for (let h = 0; h < x.width; h += head_dim) {
        const a = from[h + i], b = from[h + half + i];
        to[h + i] = a * cos - b * sin;
        to[h + half + i] = b * cos + a * sin;
      }
    }
  }
  return y;
}
