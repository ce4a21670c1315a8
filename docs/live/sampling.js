"use strict";
/* From scores to the next word. As `sample` in minivlm/generate.py. */

/* Logits [V] -> shares [V] at a temperature; 0 gives everything to the most probable word. */
function shares_at(logits, temperature) {
  if (temperature > 0) return softmax(logits.map((logit) => logit / temperature));
  const shares = new Float32Array(logits.length);
  shares[argmax(logits)] = 1;
  return shares;
}

/* The ids that may be drawn, most probable first: a word stays if the better ones together have not reached p. */
function nucleus(shares, top_p) {
  const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a]);
  let before = 0, kept = 0;
  while (kept < order.length && before < top_p) before += shares[order[kept++]];
  return order.slice(0, Math.max(kept, 1)); // the best one always stays
}

/* Draw one of them; `random` gives numbers from 0 to 1. */
function sample(logits, temperature, top_p, random) {
  if (temperature === 0) return argmax(logits);
  const shares = shares_at(logits, temperature), ids = nucleus(shares, top_p);
  let left = random() * ids.reduce((sum, id) => sum + shares[id], 0);
  for (const id of ids) if ((left -= shares[id]) <= 0) return id;
  return ids[ids.length - 1];
}

/* Reproducible numbers from 0 to 1, from a whole number (mulberry32). */
function random_numbers(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let x = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}
