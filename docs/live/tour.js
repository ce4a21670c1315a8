"use strict";
/* The guided tour. In each step there is something to predict, then something to do, then what it shows, and where the
   course explains it. The texts are in tour_steps.js. */

class Tour {
  constructor() {
    this.step = null;
    this.guess = null;
    element("tour_start").onclick = () => this.go(this.step === null ? 0 : null);
    element("tour_back").onclick = () => this.go(this.step - 1);
    element("tour_next").onclick = () => this.go(this.step + 1);
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
    page.parts.find((part) => part instanceof Editor).remember(); // so that undo brings the reader's picture back
    load_sample(sample);
    Object.assign(page, { breaks: {}, temperature: 0, top_p: 1, stage: "language_model.layers.1", head: null }, settings);
    changed();
  }

  show() {
    const running = this.step !== null;
    element("tour").hidden = !running;
    element("tour_start").textContent = running ? "Leave the tour" : "Guided tour";
    const key = `${this.step} ${this.guess}`;
    if (!running || this.shown === key) return;
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
    if (this.guess === null) element("tour_compare").open = false;
    element("tour_notebook").replaceChildren("In the course: ", notebook_link(...notebook));
    element("tour_back").disabled = this.step === 0;
    element("tour_next").disabled = this.step === TOUR.length - 1;
  }

  choice(text, number) {
    const guess = () => {
      this.guess = number;
      this.show();
      element("tour_choices").children[number].focus();
    };
    return make("button", { type: "button", ariaPressed: String(this.guess === number), onclick: guess }, text);
  }
}
