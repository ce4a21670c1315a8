"use strict";
/* Level 2: one head, opened. Its q is compared with the k of every token, the scores become shares by softmax, and the
   shares mix the v. Matrices of real numbers: some of the columns, and the rows of the tokens with the largest shares. */

const SHOWN_KEYS = 6;
const WIDE = matchMedia("(min-width: 46rem)"); // a phone has room for four numbers of a vector
let first_number = 0; // of those that are shown

function opened_head(levels) {
  const config = in_tower(page.stage) ? model.config.vision_config : model.config.text_config, head = page.head ?? 0;
  const head_dim = config.head_dim ?? config.hidden_size / config.num_attention_heads;
  const { query, seen } = answered().trace.head(page.stage, head, looked_at().looks, head_dim);
  const best = [...seen].sort((a, b) => b.weight - a.weight).slice(0, SHOWN_KEYS);
  const mixed = query.map((_, i) => seen.reduce((sum, one) => sum + one.weight * one.value[i], 0));
  const count = WIDE.matches ? 8 : 4;
  const from = first_number - (first_number % count), places = Array.from({ length: count }, (_, i) => from + i);

  const largest = (vectors) => Math.max(...vectors.flatMap((vector) => [...vector].map(Math.abs)));
  const scales = { q: largest([query]), k: largest(seen.map((one) => one.key)), v: largest(seen.map((one) => one.value)) };
  const numbers = (vector, scale) => places.map((i) =>
    make("td", { className: "number", style: `background: ${tint(vector[i] / scale)}` }, number_of(vector[i])));
  const plain = (text) => make("td", { className: "number" }, text);
  const line = (name, ...rest) => make("tr", {}, make("th", { scope: "row" }, name), ...rest);
  const empty = () => make("td", { colSpan: count });
  const others = Math.max(1 - sum(best.map((one) => one.weight)), 0), rest = `${seen.length - best.length} others`;

  const compared = table_of("Compare: q with each k", ["", ...places.map((i) => String(i + 1)), "score", "share"], [
    line("q", ...numbers(query, scales.q), plain(""), plain("")),
    ...best.map((one) =>
      line(short_name(one.token), ...numbers(one.key, scales.k), plain(number_of(one.score)), plain(percent(one.weight)))),
    line(rest, empty(), plain(""), plain(percent(others))),
  ]);
  const mixture = table_of("Mix: the v, by their shares", ["", "share", ...places.map((i) => String(i + 1))], [
    ...best.map((one) => line(short_name(one.token), plain(percent(one.weight)), ...numbers(one.value, scales.v))),
    line(rest, plain(percent(others)), empty()),
    line("mixed", plain("100 %"), ...numbers(mixed, scales.v)),
  ]);
  const said = `For ${name_of_looked()}. A score is the sum of all ${head_dim} products of q and k, divided by √${head_dim}. `
    + "The shares are the softmax of all scores. The head writes the mixture of all v. Red is above 0, blue below.";
  return { said, shown: [pages_of(head_dim, count, from, levels), make("div", { className: "head" }, compared, mixture)] };
}

function table_of(title, columns, rows) {
  const head = columns.map((name) => (name === "" ? make("td") : make("th", { scope: "col", className: "number" }, name)));
  const caption = make("caption", { className: "title" }, title);
  return make("table", {}, caption, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

/* Which of the numbers are shown. */
function pages_of(head_dim, count, from, levels) {
  const buttons = [];
  for (let start = 0; start < head_dim; start += count) {
    const button = make("button", { type: "button", ariaPressed: String(start === from) }, `${start + 1} to ${start + count}`);
    button.onclick = () => {
      first_number = start;
      levels.show();
    };
    button.dataset.part = `numbers ${start}`;
    buttons.push(button);
  }
  return make("div", { className: "buttons", role: "group", ariaLabel: "Numbers of each vector" }, "Numbers ", ...buttons);
}
