"use strict";
/* Where a token looks, on the picture; and beside it what the answer depends on, patch by patch. */

const MIDDLE_PATCH = 27;
const FULL_SHARE = 0.05, FULL_DROP = 0.5; // a share of attention, and log-odds, that are drawn darkest at least

class Looking {
  constructor() {
    const options = [], { vision_config, text_config } = model.config;
    const add_layers = (count, stage, name) => {
      for (let l = 0; l < count; l++) options.push([`${stage}.layers.${l}`, `${name}, layer ${l + 1}`]);
    };
    add_layers(vision_config.num_hidden_layers, "vision_tower", "tower");
    add_layers(text_config.num_hidden_layers, "language_model", "decoder");
    this.stage = element("stage", HTMLSelectElement);
    this.head = element("head", HTMLSelectElement);
    this.stage.append(...options.map(([value, name]) => make("option", { value }, name)));
    this.stage.onchange = () => {
      page.stage = this.stage.value;
      page.head = null;
      if (in_tower(page.stage) && looked_at().token >= IMAGE_TOKENS) page.token = MIDDLE_PATCH;
      show_all();
    };
    this.head.onchange = () => {
      page.head = this.head.value === "mean" ? null : Number(this.head.value);
      show_all();
    };
    element("occlude").onclick = () => this.occlude(page.result);
    this.attention = new PatchMap(element("attention_map"), percent, (n) => look_at(n));
    this.dependence = new PatchMap(element("occlusion_map"), (drop) => drop.toFixed(1), null);
  }

  /* The row of attention that is looked at: one share for each token that may be seen. */
  static shares() {
    const { words, trace } = answered();
    return words.length === 0 ? null : trace.attention(page.stage, page.head, looked_at().looks);
  }

  /* Hide one patch after the other. Each is a reading of its own, so the page is given time in between. */
  async occlude(result) {
    const answer_ids = result.words.map((word) => word.token_id).filter((id, i) => i === 0 || id !== tokenizer.eos_id);
    result.occlusion = [];
    for (const drop of occlusion(model, result.prefix_ids, answer_ids, result.pixel_values, page.breaks)) {
      result.occlusion.push(drop);
      if (result !== page.result) return;
      this.show_occlusion();
      await new Promise((resolve) => setTimeout(resolve));
    }
    element("spoken").textContent = element("occlusion_said").textContent;
  }

  show() {
    if (!page.result || page.result.words.length === 0) return;
    this.stage.value = page.stage;
    const config = in_tower(page.stage) ? model.config.vision_config : model.config.text_config;
    const heads = ["mean", ...Array(config.num_attention_heads).keys()];
    const option = (h) => make("option", { value: h }, h === "mean" ? "mean of all" : `head ${h + 1}`);
    if (this.head.children.length !== heads.length) this.head.replaceChildren(...heads.map(option));
    this.head.value = String(page.head ?? "mean");
    element("open_head").textContent = `Open head ${(page.head ?? 0) + 1}: q, k, scores, softmax, v`;
    this.show_attention();
    this.show_occlusion();
  }

  show_attention() {
    const { looks, word, is_answer, is_patch } = looked_at(), { prefix_ids, words, picture } = answered();
    const on_picture = Looking.shares().slice(0, IMAGE_TOKENS), best = argmax(on_picture);
    this.attention.draw(picture, on_picture, is_patch ? looks : null, FULL_SHARE);
    const names = [...prefix_ids, ...words.map((one) => one.token_id)].map(shown_name);
    let who = is_patch ? `The patch in ${place(looks)}` : `“${names[looks]}”`;
    if (is_answer) who = `“${names[looks]}”, the writer of “${names[prefix_ids.length + word]}”,`;
    const rest = in_tower(page.stage) ? "" : ` gives ${percent(sum(on_picture))} of its attention to the picture, and`;
    const said = `${who}${rest} looks most at the patch in ${place(best)}: ${percent(on_picture[best])}.`;
    element("attention_said").textContent = said;
  }

  show_occlusion() {
    const { done, occlusion, picture } = answered(), drops = occlusion ?? [], count = drops.length, best = argmax(drops);
    element("occlude", HTMLButtonElement).disabled = !done || occlusion !== null;
    this.dependence.draw(picture, drops, null, FULL_DROP);
    element("occlusion_said").textContent = count === 0 ? "Not measured yet: it reads the picture 65 times."
      : count < IMAGE_TOKENS ? `${count} of ${IMAGE_TOKENS} patches …`
      : drops[best] <= 0 ? "No patch makes it less sure when it is hidden."
      : `Hiding the patch in ${place(best)} makes it least sure of its answer: the log-odds fall by ${drops[best].toFixed(1)}.`;
  }
}

function place(patch) {
  const side = model.vision_tower.side;
  return `row ${Math.floor(patch / side) + 1}, column ${(patch % side) + 1}`;
}

/* A picture with its patches, each colored by a number: the largest is reddest, unless it is below `full`, so that a map
   of next to nothing looks like nothing. What is not above 0 has no color. A scale below says what full red is;
   `number` is how numbers are written. */
class PatchMap {
  constructor(holder, number, on_choose) {
    this.number = number;
    this.end = make("span");
    this.scale = make("p", { className: "scale note" }, "0", make("i"), this.end);
    holder.after(this.scale);
    const side = model.vision_tower.side, cell = WORLD / side;
    this.canvas = make("canvas", { width: WORLD, height: WORLD });
    this.canvas.setAttribute("aria-hidden", "true");
    this.layer = make_svg("svg", { viewBox: `0 0 ${WORLD} ${WORLD}`, role: "group", "aria-label": holder.dataset.label });
    holder.append(this.canvas, this.layer);
    this.titles = Array.from({ length: side * side }, () => make_svg("title"));
    this.cells = Array.from({ length: side * side }, (_, n) => {
      const frame = { x: (n % side) * cell, y: Math.floor(n / side) * cell, width: cell, height: cell };
      const patch = make_svg("rect", { ...frame, class: "patch" }, this.titles[n]);
      if (on_choose) this.make_button(patch, n, on_choose);
      this.layer.append(patch);
      return patch;
    });
  }

  /* One patch can be reached by Tab, the others from there by the arrow keys. */
  make_button(patch, n, on_choose) {
    const side = model.vision_tower.side, moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side };
    patch.setAttribute("role", "button");
    patch.setAttribute("tabindex", n === 0 ? "0" : "-1");
    patch.addEventListener("click", () => on_choose(n));
    patch.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") on_choose(n);
      else if (event.key in moves) this.cells[n + moves[event.key]]?.focus();
      else return;
      event.preventDefault();
    });
  }

  draw(picture, values, chosen, full) {
    draw_picture(this.canvas, picture);
    const reddest = Math.max(...values, full);
    this.scale.hidden = values.length === 0;
    this.end.textContent = `${this.number(reddest)} (full red)`;
    this.cells.forEach((patch, n) => {
      const value = values[n] ?? 0;
      patch.setAttribute("fill-opacity", String(value > 0 ? (0.85 * value) / reddest : 0));
      patch.classList.toggle("chosen", n === chosen);
      const said = this.number(value);
      this.titles[n].textContent = `${place(n)}: ${said}`;
      patch.setAttribute("aria-label", `${place(n)}: ${said}`);
    });
  }
}
