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
    changed();
  }

  show() {
    element("tour").hidden = this.step === null;
    element("tour_start").textContent = this.step === null ? "Guided tour" : "Leave the tour";
    const key = `${this.step} ${this.guess}`;
    if (this.step === null || this.shown === key) return;
    this.shown = key;
    const { title, say, question, choices, right, then, todo, notebook, set } = TOUR[this.step];
    element("tour_title").textContent = `${this.step + 1} of ${TOUR.length}. ${title}`;
    element("tour_say").textContent = say;
    element("tour_question").textContent = question;
    element("tour_choices").replaceChildren(...choices.map((choice, i) => this.choice(choice, i)));
    element("tour_guessed").hidden = this.guess === null;
    element("tour_todo").textContent = todo;
    element("tour_again").onclick = () => this.set_up(set);
    const answer = choices[right].replace(/[.]$/, "");
    element("tour_then").textContent = `${this.guess === right ? "As you predicted." : `Rather: ${answer}.`} ${then}`;
    if (this.guess === null) element("tour_compare", HTMLDetailsElement).open = false;
    element("tour_notebook").replaceChildren("In the course: ", notebook_link(...notebook));
    this.back.disabled = this.step === 0;
    this.next.disabled = this.step === TOUR.length - 1;
  }

  choice(text, number) {
    const guess = () => {
      this.guess = number;
      this.show();
      buttons_in("tour_choices")[number].focus();
    };
    return make("button", { type: "button", ariaPressed: String(this.guess === number), onclick: guess }, text);
  }
}
