"use strict";
/* Gemma: from vectors to scores for the next word. As minivlm/text/gemma.py and cache.py. */

/* Keys and values of all tokens that were read, for each layer [max_length, K * Dh]; a token is read once. */
class KVCache {
  constructor(num_layers, width, max_length) {
    this.keys = Array.from({ length: num_layers }, () => Tensor.zeros(max_length, width));
    this.values = Array.from({ length: num_layers }, () => Tensor.zeros(max_length, width));
    this.length = 0;
  }

  /* Store keys and values [T, K * Dh] of new tokens behind the others, and return all [S, K * Dh]. */
  write(layer, keys, values) {
    return [[this.keys[layer], keys], [this.values[layer], values]].map(([store, added]) => {
      store.data.set(added.data, this.length * store.width);
      const length = this.length + added.rows;
      return new Tensor(store.data.subarray(0, length * store.width), length, store.width);
    });
  }
}

class GemmaDecoder {
  constructor(config, weights) {
    this.config = config;
    this.weight = (name) => weights.get(`language_model.${name}`) ?? null;
    this.embed_tokens = this.weight("embed_tokens.weight"); // [V, D]
  }

  /* Ids of T tokens -> embeddings [T, D], scaled by sqrt(D). */
  embed(input_ids, breaks = {}) {
    const D = this.config.hidden_size, x = Tensor.zeros(input_ids.length, D);
    input_ids.forEach((id, t) => x.row(t).set(this.embed_tokens.row(id)));
    return breaks.words_not_scaled ? x : times(x, Math.sqrt(D));
  }

  /* A pre-norm block, x [T, D] -> [T, D]. `options` are those of self_attention. */
  block(x, number, options) {
    const weight = (name) => this.weight(`layers.${number}.${name}`);
    const seen = (name, value) => (options.record(name, value), value);
    const norm = (name) => seen(name, rms_norm(x, weight(`${name}.weight`), this.config.rms_norm_eps));
    x = add(x, seen("self_attn", self_attention(norm("input_layernorm"), (name) => weight(`self_attn.${name}`), options)));
    const y = norm("post_attention_layernorm"); // the norm before the MLP; checkpoints call it that
    const gate = linear(y, weight("mlp.gate_proj.weight")), up = linear(y, weight("mlp.up_proj.weight"));
    gate.data.forEach((value, i) => (gate.data[i] = gelu(value) * up.data[i]));
    return add(x, seen("mlp", linear(gate, weight("mlp.down_proj.weight"))));
  }

  /* inputs_embeds [T, D], position_ids (T numbers), mask (T rows of S) -> hidden states [T, D] */
  forward(inputs_embeds, position_ids, mask, cache, record = unrecorded, breaks = {}) {
    const { head_dim, rope_theta } = this.config;
    const rotary = breaks.no_rope ? null : (x) => apply_rotary(x, position_ids, head_dim, rope_theta);
    let x = inputs_embeds;
    record("language_model.embeddings", x);
    for (let l = 0; l < this.config.num_hidden_layers; l++) {
      x = this.block(x, l, {
        head_dim, mask, rotary,
        update_cache: (keys, values) => cache.write(l, keys, values),
        record: (name, value) => record(`language_model.layers.${l}.${name}`, value),
        head_off: breaks.head_off && breaks.head_off.layer === l ? breaks.head_off.head : null,
      });
      record(`language_model.layers.${l}`, x);
    }
    cache.length += x.rows;
    return this.norm(x);
  }

  norm(x) {
    return rms_norm(x, this.weight("norm.weight"), this.config.rms_norm_eps);
  }

  /* hidden_states [T, D] -> a score for every word [T, V]: the head is the embedding table. */
  logits(hidden_states) {
    return linear(hidden_states, this.embed_tokens);
  }
}
