"use strict";
/* SigLIP's image tower: from pixels to one vector for each patch. As minivlm/vision/siglip.py.

       pixel_values [3, 64, 64] -> patches [64, 192] -> [64, 96] + positions -> 3 blocks -> LayerNorm -> [64, 96]

   Every patch sees every other, so no mask is needed. */

class VisionTower {
  /* `name` is what a checkpoint calls the tower. */
  constructor(config, weights, name = "vision_tower") {
    this.config = config;
    this.weight = (part) => weights.get(`${name}.${part}`) ?? null;
    this.side = config.image_size / config.patch_size; // patches from left to right, and from top to bottom
  }

  /* pixel_values [C, height, width] -> patches [N, C * P * P], row by row. The order inside of a patch is that of the
     convolution's weight [D, C, P, P], so a convolution whose stride is its kernel is one matrix product. */
  patches(pixel_values) {
    const { patch_size: P, num_channels: C, image_size } = this.config;
    const cut = Tensor.zeros(this.side * this.side, C * P * P);
    for (let n = 0; n < cut.rows; n++) {
      const top = Math.floor(n / this.side) * P, left = (n % this.side) * P, row = cut.row(n);
      for (let c = 0, i = 0; c < C; c++)
        for (let y = 0; y < P; y++)
          for (let x = 0; x < P; x++, i++)
            row[i] = pixel_values.data[(c * image_size + top + y) * image_size + left + x];
    }
    return cut;
  }

  embed(pixel_values, breaks = {}) {
    const cut = this.patches(pixel_values);
    const filters = this.weight("embeddings.patch_embedding.weight"); // [D, C, P, P]
    const flat = new Tensor(filters.data, filters.shape[0], cut.width); // [D, C * P * P]
    const x = linear(cut, flat, this.weight("embeddings.patch_embedding.bias"));
    return breaks.no_tower_positions ? x : add(x, this.weight("embeddings.position_embedding.weight")); // [N, D]
  }

  /* pixel_values [C, height, width] -> [N, D] */
  forward(pixel_values, record = unrecorded, breaks = {}) {
    let x = this.embed(pixel_values, breaks);
    record("vision_tower.embeddings", x);
    for (let l = 0; l < this.config.num_hidden_layers; l++) {
      const weight = (name) => this.weight(`layers.${l}.${name}`);
      x = encoder_block(x, weight, this.config, (name, value) => record(`vision_tower.layers.${l}.${name}`, value));
      record(`vision_tower.layers.${l}`, x);
    }
    const [weight, bias] = ["weight", "bias"].map((name) => this.weight(`post_layernorm.${name}`));
    return layer_norm(x, weight, bias, this.config.layer_norm_eps);
  }
}
