"use strict";
/* Attention: where queries meet keys. As minivlm/attention.py, one head after the other.

   Everything may be looked at from outside and changed there. `record(name, value)` is called with the attention maps
   and with the vectors that they are made of; `breaks` (see breaks.js) names what is left out on purpose. */

/** Nothing is looked at. @type {(name: string, value: any) => void} */
const unrecorded = () => {};

/** One head: q [T, Dh], k and v [S, Dh], mask: T rows of S numbers, 1 = may look, or null if everything may.
   Returns the mean of the values [T, Dh], and the weights of that mean [T, S]: every row sums to 1.

   @param {Tensor} q @param {Tensor} k @param {Tensor} v @param {ArrayLike<number>[]?} mask */
function attend(q, k, v, mask) {
  const scores = linear(times(q, q.width ** -0.5), k); // [T, S]
  const weights = Tensor.zeros(...scores.shape);
  for (let t = 0; t < scores.rows; t++) {
    const row = scores.row(t);
    if (mask) for (let s = 0; s < row.length; s++) if (!mask[t][s]) row[s] = -Infinity;
    weights.row(t).set(softmax(row));
  }
  return { out: linear(weights, transpose(v)), weights, scores };
}

/** Heads side by side: q [T, H * Dh], k and v [S, K * Dh] -> what they write, joined [T, H * Dh], and a map [T, S] of each.
 * @param {Tensor} q @param {Tensor} k @param {Tensor} v @param {number} head_dim @param {ArrayLike<number>[]?} mask @param {number?} head_off */
function attend_in_heads(q, k, v, head_dim, mask = null, head_off = null) {
  const H = q.width / head_dim, K = k.width / head_dim, joined = Tensor.zeros(q.rows, q.width), maps = [];
  for (let h = 0; h < H; h++) {
    const shared = Math.floor(h / (H / K)) * head_dim; // H / K query heads look at the same keys
    const [its_k, its_v] = [columns(k, shared, head_dim), columns(v, shared, head_dim)];
    const head = attend(columns(q, h * head_dim, head_dim), its_k, its_v, mask);
    maps.push(head.weights);
    if (h === head_off) continue; // its part of the row stays 0
    for (let t = 0; t < q.rows; t++) joined.row(t).set(head.out.row(t), h * head_dim);
  }
  return { joined, maps };
}

/* A layer's attention: x [T, D] -> [T, D].

   weight(name)   a tensor of this layer, such as q_proj.weight
   options        head_dim, mask, rotary (a function of [T, heads * Dh]), record, head_off (its number),
                  update_cache (takes the new keys and values, returns all of them) */
function self_attention(x, weight, options) {
  const { head_dim: Dh, mask = null, record } = options;
  const project = (y, name) => linear(y, weight(`${name}.weight`), weight(`${name}.bias`));
  let q = project(x, "q_proj"), k = project(x, "k_proj"), v = project(x, "v_proj"); // [T, H * Dh], [T, K * Dh] twice
  if (options.rotary) [q, k] = [options.rotary(q), options.rotary(k)];
  if (options.update_cache) [k, v] = options.update_cache(k, v); // [S, K * Dh]

  const { joined, maps } = attend_in_heads(q, k, v, Dh, mask, options.head_off);
  record("self_attn.weights", maps); // H times [T, S]
  record("self_attn.qkv", { q, k, v });
  return project(joined, "o_proj");
}
