"use strict";
/* SigLIP: pictures and captions in one space. As minivlm/models/siglip.py, minivlm/vision/pooling.py and
   minivlm/text/siglip.py.

       picture -> image tower -> pooling head            ┐
                                                         ├-> cosine
       caption -> text tower  -> last position -> linear ┘ */

class SigLIP {
  constructor(config, weights) {
    this.config = config;
    this.weights = weights; // name -> Tensor
    this.vision_model = new VisionTower(config.vision_config, weights, "vision_model");
    this.head = new PoolingHead(config.vision_config, (name) => weights.get(`head.${name}`));
    this.text_model = new TextTower(config.text_config, (name) => weights.get(`text_model.${name}`));
    this.logit_scale = weights.get("logit_scale").data[0]; // the logarithm of the factor
    this.logit_bias = weights.get("logit_bias").data[0];
  }

  /* pixel_values [C, height, width] -> [1, D], of any length */
  encode_image(pixel_values) {
    return this.head.forward(this.vision_model.forward(pixel_values));
  }

  /* Ids of a caption, padded to full length -> [1, D], of any length */
  encode_text(input_ids) {
    return this.text_model.forward(input_ids);
  }
}

/* All patches of a picture -> one vector: a learned query, the probe, looks at them once. */
class PoolingHead {
  constructor(config, weight) {
    this.config = config;
    this.weight = weight;
  }

  /* tokens [N, D] -> [1, D]. The sum begins after attention: the probe itself is not in it. */
  forward(tokens) {
    const { hidden_size: D, num_attention_heads, layer_norm_eps } = this.config, weight = this.weight;
    const probe = new Tensor(weight("probe").data, 1, D);
    const project = (x, part) => { // the weights of q, k and v are stored as one matrix [3 D, D]
      const matrix = weight("attention.in_proj_weight").data.subarray(part * D * D, (part + 1) * D * D);
      const bias = weight("attention.in_proj_bias").data.subarray(part * D, (part + 1) * D);
      return linear(x, new Tensor(matrix, D, D), new Tensor(bias, D));
    };
    const { joined } = attend_in_heads(project(probe, 0), project(tokens, 1), project(tokens, 2), D / num_attention_heads);
    const x = linear(joined, weight("attention.out_proj.weight"), weight("attention.out_proj.bias"));
    const y = layer_norm(x, weight("layernorm.weight"), weight("layernorm.bias"), layer_norm_eps);
    return add(x, mlp(y, (name) => weight(`mlp.${name}`)));
  }
}

/* Every word sees every other, padding too. The caption's vector is read at the last position, whatever stands there:
   so captions were padded to full length in training, and are here. */
class TextTower {
  constructor(config, weight) {
    this.config = config;
    this.weight = weight;
  }

  forward(input_ids) {
    const { hidden_size: D, num_hidden_layers, layer_norm_eps } = this.config, weight = this.weight;
    const words = Tensor.zeros(input_ids.length, D), table = weight("embeddings.token_embedding.weight");
    input_ids.forEach((id, t) => words.row(t).set(table.row(id)));
    let x = add(words, weight("embeddings.position_embedding.weight")); // [T, D]
    for (let l = 0; l < num_hidden_layers; l++) x = encoder_block(x, (name) => weight(`layers.${l}.${name}`), this.config);
    x = layer_norm(x, weight("final_layer_norm.weight"), weight("final_layer_norm.bias"), layer_norm_eps);
    return linear(new Tensor(x.row(x.rows - 1), 1, D), weight("head.weight"), weight("head.bias"));
  }
}

/* As minivlm/processing/captions.py: lower case, words, <eos>, then <pad> to full length. */
class CaptionTokenizer extends Tokenizer {
  constructor(contents, max_length) {
    super(contents);
    this.max_length = max_length;
  }

  encode(text) {
    return super.encode([...text].map((character) => character.toLowerCase()).join(""));
  }

  /* Words for which there is no room are left out. */
  encode_caption(text) {
    const ids = [...this.encode(text).slice(0, this.max_length - 1), this.eos_id];
    return [...ids, ...Array(this.max_length - ids.length).fill(this.pad_id)];
  }
}

/* What build.py wrote into two_towers_weights.js -> {model, tokenizer, image_processor} */
function load_two_towers({ config, tokenizer, preprocessor, model }) {
  return {
    model: new SigLIP(config, read_weights(model)),
    tokenizer: new CaptionTokenizer(tokenizer, config.text_config.max_position_embeddings),
    image_processor: preprocessor,
  };
}
