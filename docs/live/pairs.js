"use strict";
/* The batch: pictures with their captions, and one of the pictures in the editor. */

class PairEditor extends SceneEditor {
  add_buttons() {
    super.add_buttons();
    for (const shape of DRAWN_WORLD.shapes) {
      const change = () => this.edit((thing) => (thing.shape = shape));
      element("shapes").append(make("button", { type: "button", onclick: change }, shape));
    }
    element("as_drawn").onclick = () => {
      this.remember();
      page.pairs[page.number].caption = caption_of(page.scene);
      changed();
    };
  }

  snapshot() {
    const { pairs, number, cell, logit_scale, logit_bias } = page;
    return { pairs, number, cell, logit_scale, logit_bias };
  }

  show() {
    super.show();
    element("h_picture").textContent = `Picture ${page.number + 1}`;
    const chosen = this.chosen === null ? null : page.scene.things[this.chosen];
    for (const button of buttons_in("shapes")) {
      button.disabled = !chosen;
      button.ariaPressed = String(chosen?.shape === button.textContent);
    }
    element("as_drawn", HTMLButtonElement).disabled = page.scene.things.length === 0;
  }
}

/* All things from left to right, as in training. */
function caption_of(scene) {
  return [...scene.things].sort((a, b) => a.x - b.x).map((thing) => `a ${describe(thing)}`).join(", ");
}

class Batch {
  /** @param {PairEditor} editor */
  constructor(editor) {
    this.editor = editor;
    this.more = element("more", HTMLButtonElement);
    this.fewer = element("fewer", HTMLButtonElement);
    /** @type {{ item: HTMLElement, canvas: HTMLCanvasElement, button: HTMLButtonElement, field: HTMLTextAreaElement }[]} */
    this.lines = []; // one for each pair
    element("tries").append(...TRIES.map(({ name }, i) =>
      make("button", { type: "button", onclick: () => this.load(i) }, name)));
    this.more.onclick = () => this.resize(page.pairs.length + 1);
    this.fewer.onclick = () => this.resize(page.pairs.length - 1);
    this.tried = 0;
  }

  load(number) {
    this.editor.remember();
    this.editor.chosen = null;
    this.tried = number;
    load_try(number);
  }

  /* What is said of a batch holds as long as nobody edits it. */
  say() {
    const { pairs, say } = TRIES[this.tried], edited = JSON.stringify(page.pairs) !== JSON.stringify(pairs.map(as_pair));
    const said = edited ? `${say} (You have edited this batch since.)` : say;
    if (element("try_said").textContent !== said) element("try_said").textContent = said;
  }

  resize(count) {
    this.editor.remember();
    if (count > page.pairs.length) page.pairs.push(as_pair(MORE_PAIRS[page.pairs.length % MORE_PAIRS.length]));
    else page.pairs.pop();
    page.number = Math.min(page.number, page.pairs.length - 1);
    page.cell = page.cell.map((place) => Math.min(place, page.pairs.length - 1));
    changed();
  }

  show() {
    this.say();
    while (this.lines.length > page.pairs.length) this.lines.pop()?.item.remove();
    while (this.lines.length < page.pairs.length) this.add_line(this.lines.length);
    const cut = [];
    page.pairs.forEach(({ caption }, i) => {
      const { canvas, button, field } = this.lines[i];
      draw_picture(canvas, compared().pictures[i]);
      button.ariaPressed = String(i === page.number);
      if (field !== document.activeElement || field.value !== caption) field.value = caption;
      if (tokenizer.encode(caption).length >= tokenizer.max_length) cut.push(i + 1);
    });
    const room = tokenizer.max_length - 1, which = cut.length === 1 ? `Caption ${cut}` : `Captions ${cut.join(" and ")}`;
    element("cut_said").textContent = cut.length === 0 ? "" : `${which} has more than ${room} tokens: the end is not read.`;
    this.more.disabled = page.pairs.length >= MOST_PAIRS;
    this.fewer.disabled = page.pairs.length <= FEWEST_PAIRS;
  }

  add_line(number) {
    const choose = () => {
      page.number = number;
      this.editor.choose(null);
      show_all();
    };
    const canvas = make("canvas", { width: WORLD, height: WORLD });
    const button = make("button", { type: "button", ariaLabel: `edit picture ${number + 1}`, onclick: choose }, canvas);
    const field = make("textarea", { rows: 2, ariaLabel: `caption ${number + 1}`, maxLength: MAX_CAPTION, spellcheck: false });
    field.onkeydown = (event) => event.key === "Enter" && event.preventDefault(); // a caption is one line
    field.onfocus = () => (this.fresh = true);
    field.oninput = () => {
      if (this.fresh) this.editor.remember(); // one step of undo for each visit
      this.fresh = false;
      page.pairs[number].caption = field.value.replaceAll("\n", " ");
      changed();
    };
    const item = make("li", {}, make("span", { className: "note" }, String(number + 1)), button, field);
    element("pairs").append(item);
    this.lines.push({ item, canvas, button, field });
  }
}
