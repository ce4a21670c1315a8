"use strict";
/* Break it: take a part away, and see what it was for. What each name leaves out is said in model.js. */

const BREAKS = [
  ["no_newline", "no newline after the prompt",
    "The newline is the writer of the first word: the model was trained to begin there."],
  ["causal_mask", "stricter (causal) mask",
    "Everyone sees only what stands before: the picture cannot look at the prompt, and no patch at those behind it."],
  ["no_rope", "no order of tokens",
    "No rotary positions: the decoder does not know in which order its tokens come."],
  ["no_tower_positions", "no places of patches",
    "No positions in the tower: a patch does not know where in the picture it lies."],
  ["no_projector", "no projector",
    "The decoder gets the tower's vectors as they are, with zeros at the end."],
  ["words_not_scaled", "word vectors too small",
    "Not times √D, which is 11: they are too short beside those of patches."],
];

class Breaks {
  constructor() {
    for (const [name, label, why] of BREAKS) {
      const box = make("input", { type: "checkbox", id: name, onchange: () => this.set(name, box.checked) });
      const text = make("span", {}, label, make("small", {}, why));
      element("breaks").append(make("label", { className: "switch" }, box, text));
    }
    this.head_off = element("head_off", HTMLSelectElement);
    const { num_hidden_layers, num_attention_heads } = model.config.text_config, options = [["", "none"]];
    for (let l = 0; l < num_hidden_layers; l++)
      for (let h = 0; h < num_attention_heads; h++) options.push([`${l},${h}`, `layer ${l + 1}, head ${h + 1}`]);
    this.head_off.append(...options.map(([value, name]) => make("option", { value }, name)));
    this.head_off.onchange = () => {
      const chosen = this.head_off.value, [layer, head] = chosen.split(",").map(Number);
      this.set("head_off", chosen ? { layer, head } : false);
    };
    element("mend").onclick = () => {
      page.breaks = {};
      changed();
    };
  }

  set(name, value) {
    if (value) page.breaks[name] = value;
    else delete page.breaks[name];
    page.token = null;
    changed();
  }

  show() {
    for (const [name] of BREAKS) element(name, HTMLInputElement).checked = Boolean(page.breaks[name]);
    element("broken_answer").textContent = page.problem ?? (page.result ? answer_text() || "(nothing)" : "");
    const off = page.breaks.head_off;
    this.head_off.value = off ? `${off.layer},${off.head}` : "";
    element("mend", HTMLButtonElement).disabled = Object.keys(page.breaks).length === 0;
  }
}
