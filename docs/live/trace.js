"use strict";
/* Keeps what the model computes on its way to an answer, so that it can be looked at afterwards.

   Picture and prompt, T tokens, are read in one pass, and each word of the answer in another one. So every name has a
   list of values: the first for the T tokens, the following for one token each. A word of the answer is written by the
   token before it: what the model looked at when it wrote the first word stands in the row of the prompt's last token. */

class Trace {
  constructor() {
    this.values = new Map(); // name -> one value for each pass
    this.record = (name, value) => {
      if (!this.values.has(name)) this.values.set(name, []);
      this.values.get(name).push(value);
    };
  }

  /* Where a token of the decoder, or a patch of the tower, looks: one share for each that it may see.
     stage: such as "language_model.layers.2"; head: its number, or null for the mean of all. */
  attention(stage, head, token) {
    const passes = this.values.get(`${stage}.self_attn.weights`), first = passes[0][0].rows;
    const maps = token < first ? passes[0] : passes[token - first + 1];
    const rows = maps.map((weights) => weights.row(token < first ? token : 0));
    if (head !== null) return rows[head];
    return rows[0].map((_, s) => rows.reduce((sum, row) => sum + row[s], 0) / rows.length);
  }

  /* What one head computes for one token: its query q [Dh], and for each token that it may see the key [Dh], the score
     q k / sqrt(Dh), the weight (the softmax of all scores) and the value [Dh]. */
  head(stage, head, token, head_dim) {
    const passes = this.values.get(`${stage}.self_attn.qkv`), first = passes[0].q.rows;
    const { q, k, v } = token < first ? passes[0] : passes[token - first + 1];
    const part = (tensor, row, h) => tensor.row(row).subarray(h * head_dim, (h + 1) * head_dim);
    const shared = Math.floor(head / (q.width / k.width)); // several heads look at the same keys
    const query = part(q, token < first ? token : 0, head), weights = this.attention(stage, head, token);
    const seen = Array.from(weights, (weight, s) => {
      const key = part(k, s, shared), dot = key.reduce((sum, value, i) => sum + value * query[i], 0);
      return { token: s, key, score: dot / Math.sqrt(head_dim), weight, value: part(v, s, shared) };
    });
    return { query, seen };
  }

  /* The vector of a token, or of a patch of the tower, at a step of its way, such as "language_model.layers.2": [1, D] */
  vector(name, token) {
    const passes = this.values.get(name), first = passes[0].rows;
    const of_token = token < first ? passes[0] : passes[token - first + 1];
    return new Tensor(of_token.row(token < first ? token : 0), 1, of_token.width);
  }

  /* The vector of a token after a layer of the decoder, [1, D]; layer -1 is what goes into the first one. */
  hidden_state(layer, token) {
    return this.vector(layer < 0 ? "language_model.embeddings" : `language_model.layers.${layer}`, token);
  }

  /* The logit lens: what the model would say if it ended after each layer. Shares [V], first the input's. */
  lens(model, token) {
    const decoder = model.language_model, layers = decoder.config.num_hidden_layers;
    return Array.from({ length: layers + 1 }, (_, l) => {
      const state = decoder.norm(this.hidden_state(l - 1, token));
      return softmax(decoder.logits(state).data);
    });
  }
}
