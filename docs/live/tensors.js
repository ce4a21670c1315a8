"use strict";
/* The numbers that everything here is made of, and the few operations that a transformer needs.

   A Tensor is a Float32Array with a shape, as in PyTorch, without gradients and without a batch: one picture, one
   prompt. Sums are kept in 64 bits and stored in 32. Names and shapes are those of the package: T tokens (queries),
   S all tokens (keys), N image tokens, D width, H heads, K key/value heads, Dh head width, V vocabulary. */

class Tensor {
  /** @param {Float32Array} data @param {number[]} shape */
  constructor(data, ...shape) {
    this.data = data;
    this.shape = shape;
    this.width = shape[shape.length - 1];
    this.rows = data.length / this.width; // all axes but the last, as one
  }

  /** @param {number[]} shape */
  static zeros(...shape) {
    return new Tensor(new Float32Array(shape.reduce((a, b) => a * b, 1)), ...shape);
  }

  row(i) {
    return this.data.subarray(i * this.width, (i + 1) * this.width);
  }
}

/** x [T, in], weight [out, in], bias [out] or none -> x weight^T + bias [T, out]

   As torch.nn.Linear. Eight products at a time: two rows of x with four rows of the weight. Each number that is read
   from memory is then used two or four times, which makes this four times as fast as one product after the other.

   @param {Tensor} x @param {Tensor} weight @param {Tensor?} bias */
function linear(x, weight, bias = null) {
  const T = x.rows, out = weight.rows, width = x.width;
  const y = Tensor.zeros(T, out);
  const a = x.data, w = weight.data, c = y.data;
  const dot = (t, o) => {
    let sum = 0;
    for (let i = 0, p = t * width, q = o * width; i < width; i++) sum += a[p + i] * w[q + i];
    return sum;
  };
  const T2 = T - (T % 2), out4 = out - (out % 4);
  for (let t = 0; t < T2; t += 2) {
    for (let o = 0; o < out4; o += 4) {
      const p = t * width, q = p + width;
      const u = o * width, v = u + width, r = v + width, s = r + width;
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let i = 0; i < width; i++) {
        const above = a[p + i], below = a[q + i];
        const w0 = w[u + i], w1 = w[v + i], w2 = w[r + i], w3 = w[s + i];
        a0 += above * w0; a1 += above * w1; a2 += above * w2; a3 += above * w3;
        b0 += below * w0; b1 += below * w1; b2 += below * w2; b3 += below * w3;
      }
      const k = t * out + o, l = k + out;
      c[k] = a0; c[k + 1] = a1; c[k + 2] = a2; c[k + 3] = a3;
      c[l] = b0; c[l + 1] = b1; c[l + 2] = b2; c[l + 3] = b3;
    }
    for (let o = out4; o < out; o++) {
      c[t * out + o] = dot(t, o);
      c[(t + 1) * out + o] = dot(t + 1, o);
    }
  }
  for (let t = T2; t < T; t++) for (let o = 0; o < out; o++) c[t * out + o] = dot(t, o);
  if (bias) for (let t = 0; t < T; t++) for (let o = 0; o < out; o++) c[t * out + o] += bias.data[o];
  return y;
}

/** x [T, D] -> [D, T] @param {Tensor} x */
function transpose(x) {
  const y = Tensor.zeros(x.width, x.rows);
  for (let i = 0; i < x.rows; i++) for (let j = 0; j < x.width; j++) y.data[j * x.rows + i] = x.data[i * x.width + j];
  return y;
}

/** @param {Tensor} x @param {Tensor} y */
function add(x, y) {
  const sum = Tensor.zeros(...x.shape);
  for (let i = 0; i < sum.data.length; i++) sum.data[i] = x.data[i] + y.data[i];
  return sum;
}

/** @param {Tensor} x @param {number} factor */
function times(x, factor) {
  const y = Tensor.zeros(...x.shape);
  for (let i = 0; i < y.data.length; i++) y.data[i] = x.data[i] * factor;
  return y;
}

/** Columns start to start + width of x [T, D]. @param {Tensor} x @param {number} start @param {number} width */
function columns(x, start, width) {
  const y = Tensor.zeros(x.rows, width);
  for (let t = 0; t < x.rows; t++) y.row(t).set(x.row(t).subarray(start, start + width));
  return y;
}

/* The tanh form of GELU, of a number. x * x * x is five times as fast as x ** 3. */
function gelu(x) {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)));
}

/** Each row of x [T, D] to mean 0 and variance 1, then scaled and shifted.
 * @param {Tensor} x @param {Tensor} weight @param {Tensor} bias @param {number} eps */
function layer_norm(x, weight, bias, eps) {
  const y = Tensor.zeros(...x.shape);
  for (let t = 0; t < x.rows; t++) {
    const from = x.row(t), to = y.row(t);
    let mean = 0, variance = 0;
    for (const value of from) mean += value / x.width;
    for (const value of from) variance += ((value - mean) * (value - mean)) / x.width;
    const scale = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < x.width; i++) to[i] = (from[i] - mean) * scale * weight.data[i] + bias.data[i];
  }
  return y;
}

/** Each row of x [T, D] to a mean square of 1. Gemma's convention: the stored weight w means a factor of 1 + w.
 * @param {Tensor} x @param {Tensor} weight @param {number} eps */
function rms_norm(x, weight, eps) {
  const y = Tensor.zeros(...x.shape);
  for (let t = 0; t < x.rows; t++) {
    const from = x.row(t), to = y.row(t);
    let square = 0;
    for (const value of from) square += (value * value) / x.width;
    const scale = 1 / Math.sqrt(square + eps);
    for (let i = 0; i < x.width; i++) to[i] = from[i] * scale * (1 + weight.data[i]);
  }
  return y;
}

/** Scores -> shares that sum to 1; the largest is subtracted so that nothing overflows. @param {ArrayLike<number>} scores */
function softmax(scores) {
  let largest = -Infinity, sum = 0;
  for (let i = 0; i < scores.length; i++) if (scores[i] > largest) largest = scores[i];
  const shares = new Float32Array(scores.length);
  for (let i = 0; i < shares.length; i++) sum += shares[i] = Math.exp(scores[i] - largest);
  for (let i = 0; i < shares.length; i++) shares[i] /= sum;
  return shares;
}

/** @param {ArrayLike<number>} values */
function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}
