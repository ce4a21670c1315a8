"use strict";
/* Level 1: a layer, opened. Attention lets tokens take from each other, the MLP changes each token alone; both add what they
   write to what came in. The vector of one token is drawn at each step. */

function opened_layer(levels) {
  const { trace } = answered(), { looks } = looked_at(), stage = page.stage, tower = in_tower(stage);
  const [part, number] = [stage.slice(0, stage.indexOf(".")), Number(stage.split(".").pop())];
  const from = number === 0 ? `${part}.embeddings` : `${part}.layers.${number - 1}`;
  const names = tower ? ["layer_norm1", "layer_norm2"] : ["input_layernorm", "post_attention_layernorm"];
  const vector = (name) => trace.vector(name, looks), shape = shape_of(trace.values.get(from)[0]);
  const norm = tower ? "LayerNorm" : "RMSNorm";
  const inner = model.weights.get(`${stage}.mlp.${tower ? "fc1" : "up_proj"}.weight`).rows;
  const { q, k } = trace.values.get(`${stage}.self_attn.qkv`)[0], x = vector(from), written = vector(`${stage}.self_attn`);
  const middle = add(x, written), width = x.width, gated = tower ? "" : ", with a gate";
  const qkv = `q: ${shape_of(q)}; k and v: ${shape_of(k)}${tower ? "" : ", which all heads share; positions turn q and k"}`;
  const line = (name, sizes, value, note) => make("tr", {},
    make("th", { scope: "row" }, name, make("small", {}, note)),
    make("td", {}, sizes),
    make("td", {}, value ? cells(value.data, Math.max(...value.data.map(Math.abs))) : ""),
    make("td", { className: "number" }, value ? length_of(value).toFixed(1) : ""));
  const rows = [
    line("x comes in", shape, x, `a row of ${width} numbers for each token`),
    line(norm, shape, vector(`${stage}.${names[0]}`), "to a common size"),
    line("attention", shape, written, qkv),
    make("tr", {}, make("td", { colSpan: 4 }, heads_of(levels))),
    line("x + attention", shape, middle, "what it took, added to what it was"),
    line(norm, shape, vector(`${stage}.${names[1]}`), "once more"),
    line("MLP", shape, vector(`${stage}.mlp`), `${width} → ${inner} → ${width}, each token alone${gated}`),
    line("+ MLP: goes out", shape, vector(stage), "the next layer's x"),
  ];
  const head = ["step", "shape", "the vector", "length"].map((name) => make("th", { scope: "col" }, name));
  const body = make("tbody", {}, ...rows);
  const table = make("table", { className: "layer" }, make("thead", {}, make("tr", {}, ...head)), body);
  const said = `Drawn: the vector of ${name_of_looked()}. Red is above 0, blue below; the darkest cell is the largest of `
    + "its row, and the length says how large all are together. "
    + "Shapes are those of reading picture and prompt. Choose a head to open it.";
  return { said, shown: [table] };
}

/* A button for each head, with how much of its attention lies on the picture. */
function heads_of(levels) {
  const config = in_tower(page.stage) ? model.config.vision_config : model.config.text_config;
  const buttons = Array.from({ length: config.num_attention_heads }, (_, h) => {
    const shares = answered().trace.attention(page.stage, h, looked_at().looks), best = argmax(shares);
    const said = `head ${h + 1}: ${percent(shares[best])} on ${short_name(best)}`;
    const button = make("button", { type: "button", onclick: () => levels.open(2, page.stage, h) }, said);
    button.dataset.part = `head ${h}`;
    return button;
  });
  return make("div", { className: "buttons", role: "group", ariaLabel: "Heads" }, ...buttons);
}

function length_of({ data }) {
  return Math.sqrt(data.reduce((sum, value) => sum + value * value, 0));
}

/* A token in few letters. */
function short_name(token) {
  const { prefix_ids, words } = answered();
  if (token < IMAGE_TOKENS) return place(token).replace("row ", "patch ").replace(", column ", ", ");
  return `“${shown_name(token < prefix_ids.length ? prefix_ids[token] : words[token - prefix_ids.length].token_id)}”`;
}

/* Numbers as cells of one row. */
function cells(vector, largest) {
  const canvas = make("canvas", { width: vector.length, height: 1 }), pen = pen_of(canvas);
  canvas.setAttribute("aria-hidden", "true");
  vector.forEach((value, i) => {
    pen.fillStyle = `rgb(${value < 0 ? "43 108 196" : "209 31 47"} / ${Math.abs(value) / largest})`;
    pen.fillRect(i, 0, 1, 1);
  });
  return canvas;
}
