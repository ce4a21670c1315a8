"use strict";
/* The model at three levels of detail: the whole, a layer, and a head of it for one token. What is opened is the layer and
   the head of the maps above: `page.stage` and `page.head`. */

class Levels {
  constructor() {
    this.level = 0; // 0 the whole model, 1 a layer, 2 a head
    [0, 1, 2].forEach((level) => (element(`level_${level}`).onclick = () => this.open(level)));
    element("open_head").onclick = () => this.open(2);
    WIDE.addEventListener("change", () => this.show());
    this.views = [whole_model, opened_layer, opened_head];
  }

  /* `stage` and `head` are what is opened, if it changes. */
  open(level, stage = page.stage, head = page.head) {
    const other = stage !== page.stage && in_tower(stage) && looked_at().token >= IMAGE_TOKENS;
    Object.assign(page, { stage, head: level === 2 ? head ?? 0 : head });
    if (other) page.token = MIDDLE_PATCH;
    this.level = level;
    show_all();
    element(`level_${level}`).focus();
  }

  show() {
    if (!page.result || page.result.words.length === 0) return;
    const names = ["The whole model", name_of_stage(page.stage), `head ${(page.head ?? 0) + 1}`];
    names.forEach((name, level) => {
      element(`level_${level}`).textContent = name;
      element(`level_${level}`).ariaPressed = String(level === this.level);
    });
    const { said, shown } = this.views[this.level](this), place = element("level_shown");
    element("level_said").textContent = said;
    keeping_focus(place, "part", () => place.replaceChildren(...shown));
  }
}

function in_tower(stage) {
  return stage.startsWith("vision_tower");
}

function name_of_stage(stage) {
  return `${in_tower(stage) ? "tower" : "decoder"}, layer ${Number(stage.split(".").pop()) + 1}`;
}

function shape_of(tensor) {
  return tensor.shape.join(" × ");
}

/* How many weights there are below a name, in words. */
function weights_of(name) {
  let count = 0;
  for (const [key, weight] of model.weights) if (key.startsWith(name)) count += weight.data.length;
  return count >= 1e5 ? `${(count / 1e6).toFixed(2)} million weights` : `${count.toLocaleString("en")} weights`;
}

/* Who is looked at, for sentences: a patch, or a token that wrote a word. */
function name_of_looked() {
  const { looks, is_answer, word } = looked_at(), { prefix_ids, words } = answered();
  if (looks < IMAGE_TOKENS) return `the patch in ${place(looks)}`;
  const id = looks < prefix_ids.length ? prefix_ids[looks] : words[looks - prefix_ids.length].token_id;
  return `“${shown_name(id)}”` + (is_answer ? `, which writes “${shown_name(words[word].token_id)}”` : "");
}

/* Level 0: three parts, and what they hand on. Layers can be opened. */
function whole_model(levels) {
  const { trace, pixel_values, prefix_ids, words } = answered(), first = (name) => trace.values.get(name)[0];
  const { vision_config, text_config } = model.config, row = first("language_model.embeddings");
  const step = (name, shape, note = "") =>
    make("li", {}, make("span", {}, name), make("span", { className: "shape" }, shape), make("small", {}, note));
  const layers = (part, count) => Array.from({ length: count }, (_, l) => {
    const stage = `${part}.layers.${l}`, button = make("button", { type: "button" }, `layer ${l + 1}`);
    button.dataset.part = stage;
    button.onclick = () => levels.open(1, stage, stage === page.stage ? page.head : null);
    return make("li", {}, button, make("span", { className: "shape" }, shape_of(first(stage))));
  });
  const part = (title, name, steps) => {
    const count = make("p", { className: "note" }, weights_of(name));
    return make("div", { className: "part" }, make("h3", {}, title), count, make("ol", {}, ...steps));
  };
  const scores = model.language_model.embed_tokens.rows, best = softmax(words[0].logits)[words[0].token_id];
  const tower = part("Image tower", "vision_tower", [
    step("picture", shape_of(pixel_values), "red, green and blue of each pixel, from −1 to 1"),
    step("cut into patches", shape_of(model.vision_tower.patches(pixel_values)), "each 8 × 8 pixels, in one row"),
    step("linear, plus positions", shape_of(first("vision_tower.embeddings")), "a vector for each patch"),
    ...layers("vision_tower", vision_config.num_hidden_layers),
    step("LayerNorm", shape_of(first("vision_tower")), "what the tower saw"),
  ]);
  const projector = part("Projector", "multi_modal_projector", [
    step("linear", shape_of(first("image_features")), "64 image tokens, as wide as the vectors of words"),
  ]);
  const decoder = part("Decoder", "language_model", [
    step("words, looked up", `${prefix_ids.length - IMAGE_TOKENS} × ${row.width}`, "<bos>, the prompt and a newline; times √128"),
    step("image tokens, then words", shape_of(row), "one row: from here on, all are tokens"),
    ...layers("language_model", text_config.num_hidden_layers),
    step("RMSNorm, last token", `1 × ${row.width}`, "the writer of the first word"),
    step("times the table of words", `1 × ${scores}`, "a score for every word"),
    step("softmax", `1 × ${scores}`, `the first word is “${shown_name(words[0].token_id)}”: ${percent(best)}`),
  ]);
  return {
    said: `${weights_of("")} in three parts. Beside each step is the shape of what leaves it. Choose a layer to open it.`,
    shown: [make("div", { className: "parts" }, tower, projector, decoder)],
  };
}
