"use strict";
/* A matrix of pictures and captions, drawn: a value and a color in each cell. And one of its cells, followed. */

class Matrix {
  /* The numbers may be buttons, and reached by the keyboard: Tab leads to one, arrow keys to the others. Costs of rows stand
     to the right, those of columns below. */
  constructor(holder, label, { reachable = false, costs_right = false, costs_below = false } = {}) {
    this.holder = holder;
    this.label = label;
    this.reachable = reachable;
    this.costs_right = costs_right;
    this.costs_below = costs_below;
    /** @type {HTMLElement[][]} */
    this.faces = []; // what holds the numbers
    /** @type {HTMLElement[][]} */
    this.cells = [];
    /** @type {HTMLCanvasElement[]} */
    this.pictures = [];
    /** @type {HTMLElement[]} */
    this.right = []; // costs of rows
    /** @type {HTMLElement[]} */
    this.below = []; // costs of columns
  }

  build(n) {
    const numbers = [...Array(n).keys()];
    const head = (text, scope) => make("th", { scope, title: text.startsWith("c") ? "what it costs" : "" }, text);
    const top = make("tr", {}, make("td", { className: "cost" }), ...numbers.map((j) => head(String(j + 1), "col")));
    if (this.costs_right) top.append(head("costs", "col"));
    this.faces = numbers.map((i) => numbers.map((j) => this.face(i, j)));
    this.cells = this.faces.map((row, i) => row.map((face, j) => this.cell(face, i, j)));
    const picture = (i) => make("canvas", { width: WORLD, height: WORLD, role: "img", ariaLabel: `picture ${i + 1}` });
    this.pictures = numbers.map(picture);
    this.right = numbers.map(() => make("td", { className: "cost" }));
    this.below = numbers.map(() => make("td", { className: "cost" }));
    const rows = numbers.map((i) => make("tr", {}, make("th", { scope: "row" }, this.pictures[i]), ...this.cells[i],
      ...(this.costs_right ? [this.right[i]] : [])));
    if (this.costs_below) rows.push(make("tr", {}, head("costs", "row"), ...this.below));
    const caption = make("caption", { className: "hidden" }, this.label);
    this.holder.replaceChildren(make("table", {}, caption, make("thead", {}, top), make("tbody", {}, ...rows)));
  }

  cell(face, i, j) {
    return make("td", { className: i === j ? "pair" : "", onclick: () => follow(i, j) }, face);
  }

  /* What holds a number. */
  face(i, j) {
    if (!this.reachable) return make("span");
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    return make("button", { type: "button", onkeydown: (event) => {
      if (!(event.key in moves)) return;
      const [down, across] = moves[event.key], next = this.faces[i + down]?.[j + across];
      event.preventDefault();
      next?.focus();
      next?.click();
    } });
  }

  /* values [n, n]; color(value) is from -1 (blue) to 1 (red); costs of rows or columns [n] */
  draw(values, color, costs = []) {
    if (this.cells.length !== values.length) this.build(values.length);
    each_cell(values, (value, i, j) => {
      const cell = this.cells[i][j], face = this.faces[i][j], shown = number_of(value);
      const followed = page.cell[0] === i && page.cell[1] === j;
      face.textContent = shown;
      cell.style.background = tint(color(value));
      cell.classList.toggle("followed", followed);
      if (!this.reachable) return;
      face.tabIndex = followed ? 0 : -1;
      face.ariaPressed = String(followed);
      face.ariaLabel = `picture ${i + 1}, caption ${j + 1}: ${shown}`;
    });
    this.pictures.forEach((canvas, i) => draw_picture(canvas, compared().pictures[i]));
    costs.forEach((cost, i) => (this.costs_right ? this.right : this.below)[i].textContent = number_of(cost));
  }
}

function follow(i, j) {
  page.cell = [i, j];
  show_all();
}

class Losses {
  /** @param {PairEditor} editor */
  constructor(editor) {
    this.cosines = new Matrix(element("cosines"), "Cosines of pictures and captions", { reachable: true });
    this.rows = new Matrix(element("clip_rows"), "CLIP: each picture chooses a caption", { costs_right: true });
    this.columns = new Matrix(element("clip_columns"), "CLIP: each caption chooses a picture", { costs_below: true });
    this.shares = new Matrix(element("siglip_shares"), "SigLIP: how much each cell is a yes");
    this.costs = new Matrix(element("siglip_costs"), "SigLIP: what each cell costs");
    const slide = (slider, change) => {
      let moving = false;
      slider.oninput = () => {
        if (!moving) editor.remember(); // one step of undo, from where it was taken to where it is let go
        moving = true;
        change(Number(slider.value));
        changed();
      };
      slider.onchange = slider.onpointerdown = () => { // no change is told of one that was let go where it was taken
        moving = false;
      };
    };
    this.temperature = element("temperature", HTMLInputElement);
    this.bias = element("bias", HTMLInputElement);
    this.learned = element("learned", HTMLButtonElement);
    slide(this.temperature, (value) => (page.logit_scale = -value));
    slide(this.bias, (value) => (page.logit_bias = value));
    this.learned.onclick = () => {
      editor.remember();
      Object.assign(page, { logit_scale: model.logit_scale, logit_bias: model.logit_bias });
      changed();
    };
  }

  show() {
    const { cosines, clip, siglip } = compared(), plain = (value) => value, n = cosines.length;
    this.cosines.draw(cosines, plain);
    this.rows.draw(clip.rows, plain, clip.row_costs);
    this.columns.draw(clip.columns, plain, clip.column_costs);
    this.shares.draw(siglip.shares, plain);
    this.costs.draw(siglip.costs, (cost) => cost / 4);
    this.temperature.value = String(-page.logit_scale);
    element("temperature_value").textContent = Math.exp(-page.logit_scale).toFixed(3);
    this.bias.value = String(page.logit_bias);
    element("bias_value").textContent = page.logit_bias.toFixed(1).replace("-", "−");
    this.learned.disabled = page.logit_scale === model.logit_scale && page.logit_bias === model.logit_bias;
    element("clip_value").textContent = clip.loss.toFixed(3);
    element("siglip_value").textContent = siglip.loss.toFixed(3);
    element("clip_guess").textContent = `Guessing would cost log ${n} = ${Math.log(n).toFixed(2)}.`;
    clearTimeout(this.pause);
    const said = `CLIP's loss ${clip.loss.toFixed(3)}, SigLIP's loss ${siglip.loss.toFixed(3)}`;
    this.pause = setTimeout(() => (element("spoken").textContent = said), PAUSE);
  }
}

/* From a cosine to what it costs, for both losses. */
class FollowedCell {
  show() {
    const [i, j] = page.cell, { cosines, clip, siglip } = compared(), is_pair = i === j;
    const scaled = Math.exp(page.logit_scale) * cosines[i][j];
    const both = `${number_of(clip.row_costs[i])} and ${number_of(clip.column_costs[j])}`;
    const line = (name, value) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value));
    const of = (name) => make("tr", { className: "of" }, make("th", { scope: "rowgroup", colSpan: 2 }, name));
    element("cell_steps").replaceChildren(
      of(`Picture ${i + 1}, caption ${j + 1}: ${is_pair ? "a pair" : "no pair"}`),
      line("cosine", number_of(cosines[i][j])),
      line("divided by the temperature", number_of(scaled)),
      of("CLIP"),
      line(`share in the row of picture ${i + 1}`, clip.rows[i][j].toFixed(3)),
      line(`share in the column of caption ${j + 1}`, clip.columns[i][j].toFixed(3)),
      line("costs", is_pair ? both : "only what it takes from the pairs"),
      of("SigLIP"),
      line("plus the bias", number_of(siglip.logits[i][j])),
      line("sigmoid: yes", siglip.shares[i][j].toFixed(3)),
      line(`right is ${is_pair ? "yes" : "no"}: costs`, number_of(siglip.costs[i][j])),
    );
  }
}
