"use strict";
/* One head, opened: how its numbers make a row of attention. q is compared with the k of every token, the scores become
   shares by softmax, and the shares mix the v. Numbers are drawn as cells: blue below 0, red above. */

const SHOWN_KEYS = 6;

class HeadOpened {
  constructor() {
    element("head_opened").addEventListener("toggle", () => this.show());
  }

  show() {
    if (!element("head_opened").open || !page.result || page.result.words.length === 0) return;
    const config = page.stage.startsWith("vision_tower") ? model.config.vision_config : model.config.text_config;
    const head_dim = config.head_dim ?? config.hidden_size / config.num_attention_heads, head = page.head ?? 0;
    const { query, seen } = page.result.trace.head(page.stage, head, looked_at().looks, head_dim);
    const best = [...seen].sort((a, b) => b.weight - a.weight).slice(0, SHOWN_KEYS);
    const largest = (vectors) => Math.max(...vectors.flatMap((vector) => [...vector].map(Math.abs)));
    const mixed = query.map((_, i) => seen.reduce((sum, one) => sum + one.weight * one.value[i], 0));
    const [keys, values] = [largest(seen.map((one) => one.key)), largest(seen.map((one) => one.value))];
    const line = (name, ...rest) =>
      make("tr", {}, make("th", { scope: "row" }, name), ...rest.map((cell) => make("td", {}, cell)));
    const rows = best.map((one) => {
      const score = one.score.toFixed(1), share = percent(one.weight);
      return line(this.name_of(one.token), cells(one.key, keys), score, share, cells(one.value, values));
    });
    const others = Math.max(1 - sum(best.map((one) => one.weight)), 0);
    element("head_rows").replaceChildren(
      line("its q", cells(query, largest([query])), "", "", ""),
      ...rows,
      line(`${seen.length - best.length} others`, "", "", percent(others), ""),
      line("mixed", "", "", "100 %", cells(mixed, values)),
    );
    const choose = page.head === null ? "Choose a head above to see another. " : "";
    element("head_said").textContent = `Head ${head + 1} of this layer, ${head_dim} numbers for each vector. ${choose}`
      + "A score is the product of q and k, divided by the root of their length; the shares are the softmax of all scores.";
  }

  name_of(token) {
    const { prefix_ids, words } = page.result;
    if (token < IMAGE_TOKENS) return place(token).replace("row ", "patch ").replace(", column ", ", ");
    return shown_name(token < prefix_ids.length ? prefix_ids[token] : words[token - prefix_ids.length].token_id);
  }
}

/* Numbers as cells of one row. */
function cells(vector, largest) {
  const canvas = make("canvas", { width: vector.length, height: 1 }), pen = canvas.getContext("2d");
  canvas.setAttribute("aria-hidden", "true");
  vector.forEach((value, i) => {
    pen.fillStyle = `rgb(${value < 0 ? "43 108 196" : "209 31 47"} / ${Math.abs(value) / largest})`;
    pen.fillRect(i, 0, 1, 1);
  });
  return canvas;
}
