"use strict";
/* The guided tour. In each step there is something to predict, then something to do, then what it shows, and where the
   course explains it. The texts are in tour_steps.js. */

class Tour {
  constructor(editor) {
    this.editor = editor;
    /** @type {number?} */
    this.step = null;
    /** @type {number?} */
    this.guess = null;
    element("tour_start").onclick = () => this.go(this.step === null ? 0 : null);
    this.back = element("tour_back", HTMLButtonElement);
    this.next = element("tour_next", HTMLButtonElement);
    this.back.onclick = () => this.go((this.step ?? 0) - 1);
    this.next.onclick = () => this.go((this.step ?? 0) + 1);
    this.compare = element("tour_compare", HTMLDetailsElement);
    this.compare.ontoggle = () => this.show();
    this.task = make("p", { className: "task" });
    this.began = ""; // everything that a reader can change, as a step set it up
    element("tour_course").append(course_link());
  }

  go(step) {
    this.step = step;
    this.guess = null;
    this.show();
    if (step === null) return;
    this.set_up(TOUR[step].set);
    element("tour_title").focus();
  }

  /* The setting of a step: a picture, a prompt, what is looked at. Everything else is as in the beginning. */
  set_up({ sample, ...settings }) {
    this.editor.remember(); // so that undo brings the reader's picture back
    load_sample(sample);
    Object.assign(page, { breaks: {}, temperature: 0, top_p: 1, stage: "language_model.layers.1", head: null }, settings);
    this.began = changeable();
    changed();
  }

  show() {
    element("tour").hidden = this.step === null;
    element("tour_start").textContent = this.step === null ? "Guided tour" : "Leave the tour";
    const is_changed = changeable() !== this.began || Boolean(page.result?.occlusion);
    const key = `${this.step} ${this.guess} ${is_changed}`;
    if (this.shown === key) return;
    this.shown = key;
    this.point();
    if (this.step === null) return;
    const { title, say, question, choices, right, then, todo, notebook, set } = TOUR[this.step];
    element("tour_title").textContent = `${this.step + 1} of ${TOUR.length}. ${title}`;
    element("tour_say").textContent = say;
    element("tour_question").textContent = question;
    element("tour_choices").replaceChildren(...choices.map((choice, i) => this.choice(choice, i)));
    element("tour_task").classList.toggle("later", this.guess === null);
    element("tour_when").textContent = this.guess === null ? "Then" : "Now";
    element("tour_todo").textContent = todo;
    this.compare.hidden = this.guess === null;
    element("tour_end").hidden = this.guess === null || this.step < TOUR.length - 1;
    element("tour_again").onclick = () => this.set_up(set);
    const answer = choices[right].replace(/[.]$/, "");
    const compared = `${this.guess === right ? "As you predicted." : `Rather: ${answer}.`} ${then}`;
    element("tour_then").textContent = is_changed ? compared : `Nothing has changed yet: ${todo}`;
    if (this.guess === null) this.compare.open = false;
    element("tour_notebook").replaceChildren("In the course: ", notebook_link(...notebook));
    this.back.disabled = this.step === 0;
    this.next.disabled = this.step === TOUR.length - 1;
    this.next.classList.toggle("main", this.guess !== null);
  }

  /* Outline the part of the page that the task is about, once it begins, and repeat the task there. */
  point() {
    const named = this.step !== null && this.guess !== null ? TOUR[this.step].part : null;
    for (const part of document.querySelectorAll("main section")) part.classList.toggle("named", part.matches(`.${named}`));
    if (this.step === null || named === null) return this.task.remove();
    const back = () => this.compare.querySelector("summary")?.focus();
    const button = make("button", { type: "button", onclick: back }, "Back to the tour");
    this.task.replaceChildren(make("b", {}, "Now"), ` ${TOUR[this.step].todo} `, button);
    document.querySelector(`.${named} h2`)?.after(this.task);
  }

  /* Bring that part into the window, if it is outside. The focus stays where it is. */
  scroll_to_part() {
    const part = document.querySelector(".named"), frame = part?.getBoundingClientRect();
    if (!part || !frame || (frame.top >= 0 && frame.bottom <= innerHeight)) return;
    const is_calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    part.scrollIntoView({ block: "start", behavior: is_calm ? "auto" : "smooth" });
  }

  choice(text, number) {
    const guess = () => {
      this.guess = number;
      this.show();
      buttons_in("tour_choices")[number].focus({ preventScroll: true });
      this.scroll_to_part();
    };
    return make("button", { type: "button", ariaPressed: String(this.guess === number), onclick: guess }, text);
  }
}

/* Everything that a reader can change, to be compared. */
function changeable() {
  const { scene, upload, prompt, breaks, temperature, top_p, seed, token, stage, head } = page;
  return JSON.stringify([scene, upload !== null, prompt, breaks, temperature, top_p, seed, token, stage, head]);
}
