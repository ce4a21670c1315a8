"use strict";
/* The page: what it shows, and when the model reads anew.

   `page` holds everything that a reader can change, `page.result` what the model made of it. Every part of the page is
   an object with a method `show()` that draws it from `page`; those with `streams` show words as they come. An edit
   calls `changed()`: the model answers once a frame at most, and an answer that is no longer asked for is dropped. */

const page = {
  /** @type {Scene} */
  scene: { background: 215, things: [] },
  /** @type {number?} */
  sample: null, // the number of the sample that it began as
  /** @type {Picture?} */
  upload: null, // a picture that was uploaded takes the place of the scene
  prompt: "caption en",
  /** @type {Broken} */
  breaks: {},
  temperature: 0,
  top_p: 1,
  seed: 1,
  /** @type {number?} */
  token: null, // which one is looked at: a number from the row; null for a word of the answer that tells something
  stage: "language_model.layers.1",
  /** @type {number?} */
  head: null, // null: the mean of all
  /** @type {Answer?} */
  result: null,
  /** @type {string?} */
  problem: null, // why there is no answer
  /** @type {Part[]} */
  parts: [], // everything with show()
};

/* What is known of an answer. It grows while words are written. */
class Answer {
  constructor(picture, pixel_values, prefix_ids) {
    this.picture = picture;
    this.pixel_values = pixel_values;
    this.prefix_ids = prefix_ids;
    this.trace = new Trace();
    /** @type {Word[]} */
    this.words = [];
    this.milliseconds = 0; // until the first word
    this.done = false;
    /** @type {number[]?} */
    this.occlusion = null; // patch by patch, once it was asked for
    /** @type {string?} */
    this.whole = null; // what the model says when nothing is broken, if something is
  }
}

const { model, tokenizer, image_processor, codebook } = load_checkpoint(CHECKPOINT);
const IMAGE_TOKENS = model.vision_tower.side ** 2;
const MAX_PROMPT = 200; // characters
const MAX_NEW_TOKENS = 64;
const SLICE = 30; // milliseconds of writing between two drawings

/* Ask the model again, once a frame at most. */
let asked = 0, waiting = false;
function changed() {
  asked += 1;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    answer(asked);
  });
}

/* Draw all parts again; the model is not asked. */
function show_all() {
  for (const part of page.parts) part.show();
}

function current_picture() {
  return page.upload ?? draw_scene(page.scene);
}

/* Read picture and prompt, and write word by word. `number` says which request this is: a newer one ends it. */
async function answer(number) {
  const began = performance.now(), picture = current_picture();
  const pixel_values = to_pixel_values(picture, image_processor);
  const prefix_ids = tokenizer.encode_prefix(page.prompt, IMAGE_TOKENS, page.breaks);
  const room = model.config.text_config.max_position_embeddings - MAX_NEW_TOKENS;
  const taken = `This prompt and its picture take ${prefix_ids.length} tokens`;
  page.problem = page.prompt.trim() === "" ? "The prompt is empty: ask something, or take a prompt from below."
    : prefix_ids.length > room ? `${taken}, and the model has room for ${room}: shorten it.` : null;
  if (page.problem) return show_all();
  const random = random_numbers(page.seed);
  const result = page.result = new Answer(picture, pixel_values, prefix_ids);
  const choose = (logits) => sample(logits, page.temperature, page.top_p, random);
  const options = { choose, record: result.trace.record, breaks: page.breaks, max_new_tokens: MAX_NEW_TOKENS };
  let shown = -Infinity;
  for (const word of model.stream(prefix_ids, pixel_values, options)) {
    result.words.push(word);
    result.milliseconds ||= performance.now() - began;
    if (performance.now() - shown < SLICE) continue;
    for (const part of page.parts) if (part.streams) part.show();
    await new Promise((resolve) => setTimeout(resolve)); // lets the page draw, and edits come in
    if (number !== asked) return;
    shown = performance.now();
  }
  if (Object.keys(page.breaks).length > 0) result.whole = whole_answer(result);
  result.done = true;
  show_all();
}

/* The result, for those who ask when there is one. */
function answered() {
  if (page.result === null) throw new Error("nothing has been read yet");
  return page.result;
}

/* What the model says when nothing is broken. */
function whole_answer({ pixel_values }) {
  const ids = tokenizer.encode_prefix(page.prompt, IMAGE_TOKENS);
  return tokenizer.decode([...model.stream(ids, pixel_values)].map((word) => word.token_id));
}

function answer_text() {
  return tokenizer.decode(answered().words.map((word) => word.token_id)).trim();
}

/* The token that is looked at. A word of the answer stands for the token before it, which wrote it. */
function looked_at() {
  const { prefix_ids, words } = answered(), first = prefix_ids.length, last = first + words.length - 1;
  const telling = first + (words.length > 4 ? 2 : 0); // in a caption, the color of the first thing
  const token = Math.min(page.token ?? telling, last);
  const is_answer = token >= first;
  return { token, is_answer, is_patch: token < IMAGE_TOKENS, looks: is_answer ? token - 1 : token, word: token - first };
}

/* A token's name for the eye: spaces and newlines can be seen. */
function shown_name(id) {
  return tokenizer.names[id].replaceAll("▁", "·").replaceAll("\n", "↵");
}

window.addEventListener("DOMContentLoaded", () => {
  const editor = new Editor();
  page.parts = [editor, new Prompt(), new Chips(), new Looking(), new Levels(), new NextWord(), new Lens(), new Mask(),
    new Breaks(), new Tour(editor)];
  element("looking_notebook").append(notebook_link("09_looking_inside", "09"));
  show_book_link();
  read_link() || load_sample(2);
  window.addEventListener("hashchange", read_link);
  changed();
});
