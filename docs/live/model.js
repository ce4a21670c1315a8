"use strict";
/* PaliGemma: a picture as a prefix of text. As minivlm/models/paligemma.py.

       picture -> tower -> one linear layer -> N image tokens ┐
                                                              ├-> Gemma -> answer
       prompt  -> embedding table, times sqrt(D) -------------┘

   `breaks` names what is left out on purpose, and is empty for the model as it was trained:

     no_newline          the prompt ends without the newline that it ended with in training
     causal_mask         picture and prompt see the past only
     no_rope             the decoder gets no positions
     no_tower_positions  the tower gets no positions
     no_projector        the tower's vectors go to the decoder as they are, with zeros at their end
     words_not_scaled    embeddings of words are not multiplied by sqrt(D)
     head_off            {layer, head}: what this head of the decoder writes is 0 */

class PaliGemma {
  constructor(config, weights) {
    this.config = config;
    this.weights = weights; // name -> Tensor
    this.vision_tower = new VisionTower(config.vision_config, weights);
    this.language_model = new GemmaDecoder(config.text_config, weights);
  }

  /* pixel_values [C, height, width] -> image tokens [N, D] in the decoder's width */
  encode_image(pixel_values, record = unrecorded, breaks = {}) {
    const features = this.vision_tower.forward(pixel_values, record, breaks); // [N, 96]
    record("vision_tower", features);
    const weight = this.weights.get("multi_modal_projector.weight"), bias = this.weights.get("multi_modal_projector.bias");
    if (!breaks.no_projector) return linear(features, weight, bias); // [N, 128]
    const padded = Tensor.zeros(features.rows, weight.rows);
    for (let n = 0; n < features.rows; n++) padded.row(n).set(features.row(n));
    return padded;
  }

  /* Ids with N placeholders for the picture, and image tokens [N, D] -> the vectors of the whole row [T, D] */
  merge(input_ids, image_features, breaks = {}) {
    const is_image = (id) => id === this.config.image_token_id;
    const x = this.language_model.embed(input_ids.map((id) => (is_image(id) ? 0 : id)), breaks);
    let n = 0;
    input_ids.forEach((id, t) => is_image(id) && x.row(t).set(image_features.row(n++)));
    return x;
  }

  /* The mask of T tokens, the first `prefix_length` of which are picture and prompt. */
  mask(length, prefix_length, breaks = {}) {
    const position_ids = Array.from({ length }, (_, i) => i);
    return prefix_lm(position_ids, position_ids, breaks.causal_mask ? 0 : prefix_length);
  }

  /* Read picture and prompt, and an answer as well if `prefix_length` says where it begins.
     Returns hidden states [T, D] and the cache for `decode`. */
  prefill(input_ids, pixel_values, record = unrecorded, breaks = {}, prefix_length = input_ids.length) {
    const text = this.config.text_config, length = input_ids.length;
    const cache = new KVCache(text.num_hidden_layers, text.num_key_value_heads * text.head_dim, text.max_position_embeddings);
    const image_features = this.encode_image(pixel_values, record, breaks);
    record("image_features", image_features);
    const inputs_embeds = this.merge(input_ids, image_features, breaks);
    const position_ids = Array.from({ length }, (_, i) => i);
    const mask = this.mask(length, prefix_length, breaks);
    return { hidden_states: this.language_model.forward(inputs_embeds, position_ids, mask, cache, record, breaks), cache };
  }

  /* Read one more token, which sees everything before it -> its hidden state [1, D] */
  decode(token_id, cache, record = unrecorded, breaks = {}) {
    const inputs_embeds = this.language_model.embed([token_id], breaks);
    return this.language_model.forward(inputs_embeds, [cache.length], null, cache, record, breaks);
  }

  /* Scores of the next word [V], after the last of hidden states [T, D]. */
  next_logits(hidden_states) {
    const last = new Tensor(hidden_states.row(hidden_states.rows - 1), 1, hidden_states.width);
    return this.language_model.logits(last).data;
  }

  /* The answer, word by word: yields {token_id, logits} as soon as they are known. `choose` takes logits [V] and
     returns an id; without it, the most probable word is taken. */
  *stream(input_ids, pixel_values, { max_new_tokens = 64, choose = argmax, record = unrecorded, breaks = {} } = {}) {
    let { hidden_states, cache } = this.prefill(input_ids, pixel_values, record, breaks);
    for (let step = 0; step < max_new_tokens; step++) {
      const logits = this.next_logits(hidden_states);
      const token_id = choose(logits);
      yield { token_id, logits };
      if (token_id === this.config.eos_token_id || step === max_new_tokens - 1) return;
      hidden_states = this.decode(token_id, cache, record, breaks);
    }
  }
}

/* What build.py wrote into weights.js -> {model, tokenizer, image_processor, codebook} */
function load_checkpoint({ config, tokenizer, preprocessor, model, codebook }) {
  return {
    model: new PaliGemma(config, read_weights(model)),
    tokenizer: new Tokenizer(tokenizer),
    image_processor: preprocessor,
    codebook: new MaskCodebook(read_weights(codebook)),
  };
}
