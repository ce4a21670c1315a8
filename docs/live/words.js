"use strict";
/* The prompt, and the row of tokens: what goes in, and what comes out, word by word. */

class Prompt {
  streams = true;

  constructor() {
    this.field = element("prompt", HTMLInputElement);
    this.field.maxLength = MAX_PROMPT;
    this.field.oninput = () => this.ask(this.field.value);
    element("ask").onsubmit = (event) => event.preventDefault();
    this.heard = "";
  }

  ask(prompt) {
    page.prompt = prompt;
    page.token = null;
    changed();
  }

  /* Prompts that have one right answer: what they name is there once. */
  suggestions() {
    const things = page.upload ? [] : page.scene.things, name = (thing) => `${thing.color} ${thing.shape}`;
    const once = (say) => things.filter((thing) => things.filter((other) => say(other) === say(thing)).length === 1);
    const about = ["caption en", "how many objects are there?"];
    const [shape] = once((thing) => thing.shape), [first, second] = once(name);
    if (shape) about.push(`what color is the ${shape.shape}?`);
    if (first) about.push(`what size is the ${name(first)}?`, `detect ${name(first)}`, `segment ${name(first)}`);
    if (second) about.push(`is the ${name(first)} left of the ${name(second)}?`);
    return about;
  }

  show() {
    if (document.activeElement !== this.field) this.field.value = page.prompt;
    this.show_suggestions();
    const text = page.result ? answer_text() : "", done = page.result?.done, whole = page.result?.whole;
    element("answer").textContent = page.problem ?? (text || (done ? "(nothing)" : "…"));
    element("answer").classList.toggle("coded", text.includes("<"));
    element("whole_answer").hidden = !whole && whole !== "";
    element("whole_answer").textContent = `As it was trained, it says: ${whole}`;
    const { words, milliseconds } = page.result ?? { words: [], milliseconds: 0 };
    const time = `${words.length} tokens; picture and prompt read in ${Math.round(milliseconds)} ms`;
    element("timing").textContent = milliseconds ? time : "";
    // Only whole answers are read out, and only new ones.
    const said = `${page.prompt}: ${text}`;
    if (done && this.heard !== said) element("spoken").textContent = this.heard = said;
  }

  /* New buttons only where they differ: a button that is replaced loses the focus. */
  show_suggestions() {
    const prompts = this.suggestions();
    if (this.suggested === prompts.join("\n")) return;
    this.suggested = prompts.join("\n");
    const button = (prompt) => make("button", { type: "button", onclick: () => this.suggest(prompt) }, prompt);
    element("suggestions").replaceChildren(...prompts.map(button));
  }

  suggest(prompt) {
    this.field.value = prompt;
    this.ask(prompt);
  }
}

/* Every token is a button. The 64 image tokens share one: patches are chosen in the picture. A line below each token
   says how much of the attention that is looked at falls on it. */
class Chips {
  streams = true;

  show() {
    if (!page.result) return;
    const { prefix_ids, words } = page.result, looked = looked_at(), shares = Looking.shares();
    const chips = [this.chip("64 × <image>", "image", looked.is_patch, 0, shares && sum(shares.slice(0, IMAGE_TOKENS)))];
    prefix_ids.slice(IMAGE_TOKENS).forEach((id, i) => {
      const token = IMAGE_TOKENS + i;
      chips.push(this.chip(shown_name(id), "prompt_token", looked.token === token, token, shares?.[token]));
    });
    words.forEach((word, i) => {
      const token = prefix_ids.length + i;
      chips.push(this.chip(shown_name(word.token_id), "answer_token", looked.token === token, token, shares?.[token]));
    });
    keeping_focus(element("chips"), "token", () => element("chips").replaceChildren(...chips));
  }

  chip(name, kind, pressed, token, share = 0) {
    const line = make("span", { className: "share", style: `width: ${Math.round(100 * (share ?? 0))}%` });
    const chip = make("button", { type: "button", className: `chip ${kind}`, ariaPressed: String(pressed) }, name, line);
    chip.dataset.token = token;
    chip.title = share ? `${percent(share)} of the attention` : "";
    chip.onclick = () => look_at(token);
    return chip;
  }
}

function look_at(token) {
  page.token = token;
  if (page.stage.startsWith("vision_tower") && token >= IMAGE_TOKENS) page.stage = "language_model.layers.1";
  show_all();
}

function sum(numbers) {
  return numbers.reduce((a, b) => a + b, 0);
}
