"use strict";
/* What might come next, and what each layer would say: both about the word of the answer that is looked at. */

const SHOWN_WORDS = 8, LEAST_SHARE = 1e-9; // the left end of the axis

class NextWord {
  constructor() {
    this.sliders = ["temperature", "top_p"].map((name) => element(name, HTMLInputElement));
    for (const slider of this.sliders)
      slider.oninput = () => {
        Object.assign(page, { [slider.id]: Number(slider.value) });
        changed();
      };
    element("again").onclick = () => {
      page.seed += 1;
      changed();
    };
  }

  /* Bars on a logarithmic axis: this model is so sure that all bars but one would be empty on a plain one. */
  show() {
    for (const slider of this.sliders) {
      slider.value = page[slider.id];
      element(`${slider.id}_value`).textContent = page[slider.id].toFixed(slider.id === "top_p" ? 2 : 1);
    }
    element("again", HTMLButtonElement).disabled = page.temperature === 0;
    const looked = page.result && page.result.words.length > 0 ? looked_at() : null;
    element("next_axis").hidden = !looked?.is_answer;
    if (!looked?.is_answer) {
      element("next_words").replaceChildren();
      element("next_said").textContent = "Choose a word of the answer: only there was it trained to say what comes next.";
      return;
    }
    const { logits, token_id } = answered().words[looked.word], drawn = page.temperature > 0;
    const shares = shares_at(logits, page.temperature || 1);
    const kept = new Set(drawn ? nucleus(shares, page.top_p) : [argmax(logits)]);
    const best = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, SHOWN_WORDS);
    element("next_words").replaceChildren(...best.map((id) => this.bar(id, shares[id], kept.has(id), id === token_id)));
    const count = kept.size === 1 ? "one word" : `${kept.size} words`;
    element("next_said").textContent = `Written: “${shown_name(token_id)}”, ` + (drawn
      ? `drawn from ${count}. Pale words are cut off by top-p.`
      : "the most probable. At a temperature above 0, words are drawn by lot.");
  }

  bar(id, share, kept, written) {
    const width = Math.max(0, 1 - Math.log(Math.max(share, LEAST_SHARE)) / Math.log(LEAST_SHARE));
    const number = share < 0.001 ? share.toExponential(0) : share.toFixed(3);
    const bar = make("span", { className: "bar", style: `width: ${100 * width}%` });
    return make("li", { className: `${kept ? "" : "cut"} ${written ? "written" : ""}` },
      make("span", { className: "word" }, shown_name(id)),
      make("span", { className: "track" }, bar),
      make("span", { className: "number" }, number));
  }
}

class Lens {
  show() {
    const looked = page.result && page.result.words.length > 0 ? looked_at() : null, rows = element("lens_rows");
    rows.replaceChildren();
    element("lens_said").hidden = Boolean(looked?.is_answer);
    if (!looked?.is_answer) return;
    answered().trace.lens(model, looked.looks).forEach((shares, l) => {
      const first = argmax(shares), others = shares.slice();
      others[first] = 0;
      const cell = (id) => make("td", {}, make("b", {}, shown_name(id)), ` ${shares[id].toFixed(2)}`);
      const cells = [first, argmax(others)].map(cell);
      rows.append(make("tr", {}, make("th", { scope: "row" }, l === 0 ? "input" : `layer ${l}`), ...cells));
    });
  }
}
