"use strict";
/* A scene, to be edited: with a mouse, a finger, or the keyboard. It is `page.scene`; who edits calls `changed()`. */

const MOST_THINGS = 8, SMALLEST = 4, LARGEST = 20; // units of the radius
const MOST_UNDO = 100;

class SceneEditor {
  constructor() {
    /** @type {number?} */
    this.chosen = null; // number of a thing
    /** @type {string[]} */
    this.past = []; // scenes as text, for undo
    this.dragged = null; // which thing, what of it, and how
    this.canvas = element("picture_canvas", HTMLCanvasElement);
    this.layer = element("picture_layer", SVGSVGElement); // an SVG over the canvas, 64 units wide and high
    this.layer.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"]) this.layer.addEventListener(name, () => (this.dragged = null));
    this.layer.addEventListener("pointerdown", (event) => event.target === this.layer && this.choose(null));
    document.addEventListener("keydown", (event) => {
      const typing = document.activeElement?.matches("input:not([type=range]), select, textarea");
      if (typing || event.key !== "z" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault(); // or the browser undoes what was typed last, in whatever field
      this.undo();
    });
    this.add_buttons();
  }

  add_buttons() {
    for (const shape of DRAWN_WORLD.shapes)
      element("add_things").append(make("button", { type: "button", onclick: () => this.add(shape) }, `+ ${shape}`));
    for (const [color, rgb] of Object.entries(DRAWN_WORLD.colors)) {
      const style = `background: rgb(${rgb})`;
      const recolor = () => this.edit((thing) => Object.assign(thing, { color, rgb }));
      element("colors").append(make("button", { type: "button", style, title: color, ariaLabel: color, onclick: recolor }));
    }
    const grow = (factor) => this.edit((thing) => (thing.radius = clamp(thing.radius * factor, SMALLEST, LARGEST)));
    element("smaller").onclick = () => grow(1 / 1.1);
    element("larger").onclick = () => grow(1.1);
    element("delete").onclick = () => this.remove();
    element("undo").onclick = () => this.undo();
  }

  /** What undo brings back. @returns {object} */
  snapshot() {
    return { scene: page.scene, sample: page.sample };
  }

  remember() {
    this.past.push(JSON.stringify(this.snapshot()));
    if (this.past.length > MOST_UNDO) this.past.shift();
  }

  undo() {
    const before = this.past.pop();
    if (before === undefined) return;
    Object.assign(page, JSON.parse(before), { upload: null });
    this.chosen = null;
    changed();
  }

  /* Change the chosen thing, if one is chosen. */
  edit(change) {
    if (this.chosen === null || page.upload) return;
    this.remember();
    change(page.scene.things[this.chosen]);
    changed();
  }

  add(shape) {
    if (page.scene.things.length >= MOST_THINGS) return;
    this.remember();
    page.upload = null;
    const colors = Object.keys(DRAWN_WORLD.colors), used = page.scene.things.map((thing) => thing.color);
    const color = colors.find((name) => !used.includes(name)) ?? colors[0];
    page.scene.things.push({ shape, color, ...this.free_place(10), radius: 10, rgb: DRAWN_WORLD.colors[color] });
    this.chosen = page.scene.things.length - 1;
    changed();
  }

  /* Where a new thing is farthest from all others. */
  free_place(radius) {
    let best = { x: 32, y: 32, room: -Infinity };
    for (let x = radius + 1; x < WORLD - radius; x += 4)
      for (let y = radius + 1; y < WORLD - radius; y += 4) {
        const room = Math.min(...page.scene.things.map((thing) => Math.hypot(thing.x - x, thing.y - y) - thing.radius));
        if (room > best.room) best = { x, y, room };
      }
    return { x: best.x, y: best.y };
  }

  remove() {
    if (this.chosen === null || page.upload) return;
    this.remember();
    page.scene.things.splice(this.chosen, 1);
    this.chosen = null;
    changed();
  }

  choose(number) {
    this.chosen = number;
    this.show();
  }

  /* A point of the screen in units of the world. */
  point_of(event) {
    const box = this.layer.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * WORLD, y: ((event.clientY - box.top) / box.height) * WORLD };
  }

  grab(event, number, what) {
    event.preventDefault();
    event.stopPropagation();
    const at = this.point_of(event), thing = page.scene.things[number];
    this.dragged = { number, what, dx: thing.x - at.x, dy: thing.y - at.y, moved: false };
    this.layer.setPointerCapture(event.pointerId);
    this.choose(number);
    focus_on(this.layer, "thing", number);
  }

  drag(event) {
    if (!this.dragged) return;
    if (!this.dragged.moved) this.remember();
    this.dragged.moved = true;
    const at = this.point_of(event), thing = page.scene.things[this.dragged.number];
    if (this.dragged.what === "size") thing.radius = clamp(Math.hypot(at.x - thing.x, at.y - thing.y) - 1, SMALLEST, LARGEST);
    else Object.assign(thing, { x: clamp(at.x + this.dragged.dx, 0, WORLD), y: clamp(at.y + this.dragged.dy, 0, WORLD) });
    changed();
  }

  keys(event, number) {
    const step = event.shiftKey ? 4 : 1, thing = page.scene.things[number];
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    this.chosen = number;
    if (event.key in moves) {
      const [dx, dy] = moves[event.key];
      this.edit(() => Object.assign(thing, { x: clamp(thing.x + dx, 0, WORLD), y: clamp(thing.y + dy, 0, WORLD) }));
    } else if (event.key === "+" || event.key === "-") element(event.key === "+" ? "larger" : "smaller").click();
    else if (event.key === "Delete" || event.key === "Backspace") this.remove();
    else return;
    event.preventDefault();
  }

  show() {
    draw_picture(this.canvas, current_picture());
    if ((this.chosen ?? 0) >= page.scene.things.length) this.chosen = null; // another scene was loaded
    const chosen = this.chosen === null || page.upload ? null : page.scene.things[this.chosen];
    keeping_focus(this.layer, "thing", () => {
      this.layer.replaceChildren(...(page.upload ? [] : page.scene.things).map((thing, i) => this.handle(thing, i)));
      if (chosen) this.layer.append(this.size_handle(chosen, this.chosen));
    });
    for (const id of ["smaller", "larger", "delete"]) element(id, HTMLButtonElement).disabled = !chosen;
    for (const button of buttons_in("colors")) {
      button.disabled = !chosen;
      button.ariaPressed = String(chosen?.color === button.title);
    }
    for (const button of buttons_in("add_things")) button.disabled = page.scene.things.length >= MOST_THINGS;
    element("undo", HTMLButtonElement).disabled = this.past.length === 0;
    const said = page.scene.things.map((thing) => `a ${describe(thing)}`).join(", ") || "an empty picture";
    element("picture_note").textContent = `Drawn: ${said}.`;
  }

  handle(thing, number) {
    const place = `${Math.round(thing.x)} from the left, ${Math.round(thing.y)} from the top`;
    const handle = make_svg("circle", {
      cx: thing.x, cy: thing.y, r: thing.radius, class: number === this.chosen ? "thing chosen" : "thing",
      tabindex: 0, role: "button", "data-thing": number,
      "aria-label": `${describe(thing)}, ${place}. Arrow keys move it, plus and minus resize it, Delete removes it.`,
    });
    handle.addEventListener("pointerdown", (event) => this.grab(event, number, "place"));
    handle.addEventListener("keydown", (event) => this.keys(event, number));
    handle.addEventListener("focus", () => this.chosen !== number && this.choose(number));
    return handle;
  }

  size_handle(thing, number) {
    const reach = (thing.radius + 1) * Math.SQRT1_2;
    const handle = make_svg("circle", { cx: thing.x + reach, cy: thing.y + reach, r: 1.6, class: "resize" });
    handle.addEventListener("pointerdown", (event) => this.grab(event, number, "size"));
    return handle;
  }
}
