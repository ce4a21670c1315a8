"use strict";
/* Who may look at whom, as minivlm/masks.py. Causal, but every token sees the first `prefix_length` tokens. With a prefix
   of 3 (picture and prompt) and a suffix of 2 (the answer):

       1 1 1 0 0
       1 1 1 0 0
       1 1 1 0 0
       1 1 1 1 0
       1 1 1 1 1
   Rows are queries, columns are keys. A prefix_length of 0 gives the causal mask. */
function prefix_lm(query_positions, key_positions, prefix_length) {
  return query_positions.map((q) => Uint8Array.from(key_positions, (k) => Number(k <= q || k < prefix_length)));
}
