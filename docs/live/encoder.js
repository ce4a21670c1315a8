"use strict";
/* What towers are made of, whatever they read: patches of a picture or words of a caption. As `EncoderBlock` and `MLP` in
   minivlm/layers.py. */

/* A pre-norm block, x [T, D] -> [T, D]; weight(name) gives a tensor of this layer, record(name, value) gets each step. */
function encoder_block(x, weight, config, record = unrecorded) {
  const seen = (name, value) => (record(name, value), value);
  const norm = (name) => seen(name, layer_norm(x, weight(`${name}.weight`), weight(`${name}.bias`), config.layer_norm_eps));
  const head_dim = config.hidden_size / config.num_attention_heads, options = { head_dim, record };
  x = add(x, seen("self_attn", self_attention(norm("layer_norm1"), (name) => weight(`self_attn.${name}`), options)));
  return add(x, seen("mlp", mlp(norm("layer_norm2"), (name) => weight(`mlp.${name}`))));
}

/* Two linear layers with GELU between them: x [T, D] -> [T, D] */
function mlp(x, weight) {
  const inner = linear(x, weight("fc1.weight"), weight("fc1.bias"));
  inner.data.forEach((value, i) => (inner.data[i] = gelu(value)));
  return linear(inner, weight("fc2.weight"), weight("fc2.bias"));
}
