"use strict";
/* Attention: where queries meet keys. As minivlm/attention.py, one head after the other.

   Everything may be looked at from outside and changed there. `record(name, value)` is called with the attention maps
   and with the vectors that they are made of; `breaks` (see breaks.js) names what is left out on purpose. */

/* One head: q [T, Dh], k and v [S, Dh], mask: T rows of S numbers, 1 = may look, or null if everything may.
   Returns the mean of the values [T, Dh], and the weights of that mean [T, S]: every row sums to 1. */
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

/* A layer's attention: x [T, D] -> [T, D].

   weight(name)   a tensor of this layer, such as q_proj.weight
   options        num_attention_heads, num_key_value_heads, head_dim, mask, rotary (a function of [T, heads * Dh]),
                  update_cache (takes the new keys and values, returns all of them), record, head_off (its number) */
function self_attention(x, weight, options) {
  const { num_attention_heads: H, num_key_value_heads: K, head_dim: Dh, mask = null, record } = options;
  const project = (y, name) => linear(y, weight(`${name}.weight`), weight(`${name}.bias`));
  let q = project(x, "q_proj"), k = project(x, "k_proj"), v = project(x, "v_proj"); // [T, H * Dh], [T, K * Dh] twice
  if (options.rotary) [q, k] = [options.rotary(q), options.rotary(k)];
  if (options.update_cache) [k, v] = options.update_cache(k, v); // [S, K * Dh]

  const joined = Tensor.zeros(x.rows, H * Dh), maps = [];
  for (let h = 0; h < H; h++) {
    const shared = Math.floor(h / (H / K)) * Dh; // H / K query heads look at the same keys
    const head = attend(columns(q, h * Dh, Dh), columns(k, shared, Dh), columns(v, shared, Dh), mask);
    maps.push(head.weights);
    if (h === options.head_off) continue; // its part of the row stays 0
    for (let t = 0; t < x.rows; t++) joined.row(t).set(head.out.row(t), h * Dh);
  }
  record("self_attn.weights", maps); // H times [T, S]
  record("self_attn.qkv", { q, k, v });
  return project(joined, "o_proj");
}
