"use strict";
/* The small page about the mask: chips, a table to walk through, and a sentence about what is chosen. */

const table = element("matrix", HTMLTableElement);
const chosen = { kind: "prefix_lm", side: "none", query: 8, key: null }; // positions in the row; key null: a whole row

function show() {
  const { kind, side, query, key } = chosen, tokens = tokens_of(side), mask = mask_of(kind, side);
  if (table.rows.length !== tokens.length + 1 || table.dataset.side !== side) build(tokens);
  for (const [id, value] of [["kinds", kind], ["sides", side]])
    for (const button of buttons_in(id)) button.ariaPressed = String(button.dataset.value === value);
  buttons_in("tokens").forEach((chip, t) => {
    chip.ariaPressed = String(t === query);
    chip.classList.toggle("unseen", !mask[query][t]);
    chip.classList.toggle("asked", t === key);
  });
  each_field((field, t, s) => {
    field.className = `${mask[t][s] ? `seen ${tokens[s].kind}` : "unseen"}${t === query ? " row" : ""}${s === key ? " column" : ""}`;
    field.classList.toggle("chosen", t === query && s === key);
    field.tabIndex = t === query && s === (key ?? 0) ? 0 : -1;
    field.setAttribute("aria-label", why(kind, tokens, t, s));
  });
  element("said").textContent = key === null ? overview(kind, tokens, query, mask[query]) : why(kind, tokens, query, key);
}

function choose(query, key = null) {
  Object.assign(chosen, { query, key });
  show();
}

function each_field(visit) {
  [...table.tBodies[0].rows].forEach((row, t) => [...row.cells].slice(1).forEach((field, s) => visit(field, t, s)));
}

/* Chips and table for a row of tokens; which fields are seen is for `show`. */
function build(tokens) {
  const chip = ({ name, kind }, t) => make("button", { type: "button", className: `chip ${kind}_token`, onclick: () => choose(t) }, name);
  element("tokens").replaceChildren(...tokens.map(chip));
  const heads = tokens.map(({ name }) => make("th", { scope: "col" }, make("span", {}, name)));
  const field = (t, s) => make("td", { role: "gridcell", onclick: () => go_to(t, s), onmouseenter: () => choose(t, s), onfocus: () => choose(t, s) });
  const rows = tokens.map(({ name }, t) => {
    const head = make("th", { scope: "row", onmouseenter: () => choose(t), onclick: () => choose(t) }, name);
    return make("tr", {}, head, ...tokens.map((_, s) => field(t, s)));
  });
  table.dataset.side = chosen.side;
  table.replaceChildren(make("thead", {}, make("tr", {}, make("td"), ...heads)), make("tbody", {}, ...rows));
}

function go_to(query, key) {
  each_field((field, t, s) => t === query && s === key && field.focus());
}

/* Only one field can be reached with the tabulator; arrows, Home and End lead on from there. */
function walk(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -99], End: [0, 99] }[event.key];
  if (!steps || event.target.role !== "gridcell") return;
  event.preventDefault();
  const last = tokens_of(chosen.side).length - 1, within = (place) => Math.min(Math.max(place, 0), last);
  go_to(within(chosen.query + steps[0]), within((chosen.key ?? 0) + steps[1]));
}

/* The same token stays chosen when padding comes or goes. */
function pad(side) {
  const offset = (chosen.side === "left" ? -2 : 0) + (side === "left" ? 2 : 0);
  const within = (place) => Math.min(Math.max(place + offset, 0), tokens_of(side).length - 1);
  Object.assign(chosen, { side, query: within(chosen.query), key: chosen.key === null ? null : within(chosen.key) });
  show();
}

function buttons(names, choose_value) {
  return Object.entries(names).map(([value, name]) => {
    const button = make("button", { type: "button", onclick: () => choose_value(value) }, name);
    button.dataset.value = value;
    return button;
  });
}

element("kinds").append(...buttons(KINDS, (kind) => Object.assign(chosen, { kind }) && show()));
element("sides").append(...buttons(SIDES, pad));
table.addEventListener("keydown", walk);
show();
