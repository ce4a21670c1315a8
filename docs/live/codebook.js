"use strict";
/* Outlines as words: 16 of the words <seg000> to <seg127> behind a box are a mask of 64 x 64, stretched over the box. As
   `MaskCodebook.decode` in minivlm/processing/codebook.py: each word is a vector, and a small network draws them. */

class MaskCodebook {
  constructor(weights) {
    this.weight = (name) => weights.get(name);
    this.codes = this.weight("_vq_vae._embedding"); // [128, D]
  }

  /* 16 codes -> [64, 64]: about -1 outside, 1 inside */
  decode(codes) {
    let x = Tensor.zeros(this.codes.width, 4, 4); // [D, 4, 4]
    codes.forEach((code, i) => this.codes.row(code).forEach((value, d) => (x.data[16 * d + i] = value)));
    x = relu(this.convolve(x, "decoder.0"));
    for (const block of ["decoder.2", "decoder.3"]) {
      let y = relu(this.convolve(x, `${block}.net.0`, 1));
      y = relu(this.convolve(y, `${block}.net.2`, 1));
      x = add(x, this.convolve(y, `${block}.net.4`));
    }
    for (const layer of [4, 6, 8, 10]) x = relu(this.double(x, `decoder.${layer}`)); // 8, 16, 32, 64 pixels
    return this.convolve(x, "decoder.12").data;
  }

  /* x [C, side, side], weight [out, C, kernel, kernel] -> [out, side, side] */
  convolve(x, name, padding = 0) {
    const weight = this.weight(`${name}.weight`), bias = this.weight(`${name}.bias`);
    const [out, C, kernel] = weight.shape, side = x.width, y = Tensor.zeros(out, side, side);
    each_place(out, side, (o, row, column, at) => {
      let sum = bias.data[o];
      for (let c = 0; c < C; c++)
        for (let i = 0; i < kernel; i++)
          for (let j = 0; j < kernel; j++) {
            const r = row + i - padding, s = column + j - padding;
            if (r >= 0 && r < side && s >= 0 && s < side)
              sum += x.data[(c * side + r) * side + s] * weight.data[((o * C + c) * kernel + i) * kernel + j];
          }
      y.data[at] = sum;
    });
    return y;
  }

  /* A transposed convolution with a kernel of 4, a stride of 2 and a padding of 1: every pixel is stamped into the picture
     of twice the size. x [C, side, side], weight [C, out, 4, 4] -> [out, 2 * side, 2 * side] */
  double(x, name) {
    const weight = this.weight(`${name}.weight`), bias = this.weight(`${name}.bias`);
    const [C, out] = weight.shape, side = 2 * x.width, y = Tensor.zeros(out, side, side);
    each_place(out, side, (o, row, column, at) => (y.data[at] = bias.data[o]));
    each_place(C, x.width, (c, row, column, at) => {
      for (let o = 0; o < out; o++)
        for (let i = 0; i < 4; i++)
          for (let j = 0; j < 4; j++) {
            const r = 2 * row + i - 1, s = 2 * column + j - 1;
            if (r >= 0 && r < side && s >= 0 && s < side)
              y.data[(o * side + r) * side + s] += x.data[at] * weight.data[((c * out + o) * 4 + i) * 4 + j];
          }
    });
    return y;
  }
}

function each_place(channels, side, visit) {
  for (let c = 0, at = 0; c < channels; c++)
    for (let row = 0; row < side; row++) for (let column = 0; column < side; column++, at++) visit(c, row, column, at);
}

function relu(x) {
  return new Tensor(x.data.map((value) => Math.max(value, 0)), ...x.shape);
}
