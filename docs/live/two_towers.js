"use strict";
/* The page of two towers: a batch of pairs, and what two losses make of it.

   `page` holds everything that a reader can change, `page.result` what the towers made of it. Every part of the page has a
   method `show()`. An edit calls `changed()`: towers read what is new, once a frame at most. */

const { model, tokenizer, image_processor } = load_two_towers(TWO_TOWERS);
const FEWEST_PAIRS = 2, MOST_PAIRS = 6, MAX_CAPTION = 200; // characters
const PAUSE = 700; // milliseconds without an edit before the losses are read out

const page = {
  /** @type {Pair[]} */
  pairs: [],
  number: 0, // whose picture is in the editor
  cell: [0, 0], // which one is followed: picture, caption
  logit_scale: model.logit_scale,
  logit_bias: model.logit_bias,
  /** @type {ReturnType<typeof compare>?} */
  result: null,
  upload: null, // pictures are drawn here, never uploaded
  /** @type {Part[]} */
  parts: [],
  get scene() {
    return this.pairs[this.number].scene;
  },
};

function current_picture() {
  return draw_scene(page.scene);
}

let waiting = false;
function changed() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    page.result = compare();
    show_all();
  });
}

function show_all() {
  for (const part of page.parts) part.show();
}

/* What the towers have read, by scene or caption: after an edit they read one picture or one caption. */
let read = new Map();

function compare() {
  const kept = new Map();
  const once = (key, encode) => kept.set(key, kept.get(key) ?? read.get(key) ?? encode()).get(key);
  const pictures = page.pairs.map(({ scene }) => once(JSON.stringify(scene), () => draw_scene(scene)));
  const images = pictures.map((picture, i) => once(`picture ${JSON.stringify(page.pairs[i].scene)}`,
    () => model.encode_image(to_pixel_values(picture, image_processor))));
  const texts = page.pairs.map(({ caption }) => once(`caption ${caption}`,
    () => model.encode_text(tokenizer.encode_caption(caption))));
  read = kept;
  const cosines = similarity(images, texts);
  const clip = clip_loss(cosines, page.logit_scale), siglip = siglip_loss(cosines, page.logit_scale, page.logit_bias);
  return { pictures, cosines, clip, siglip };
}

/* The result, for those who ask when there is one. */
function compared() {
  if (page.result === null) throw new Error("nothing has been compared yet");
  return page.result;
}

/* A batch of TRIES, with the temperature and the bias as they were learned. */
function load_try(number) {
  const { pairs, cell } = TRIES[number];
  Object.assign(page, { pairs: pairs.map(as_pair), number: cell[0], cell: [...cell] });
  Object.assign(page, { logit_scale: model.logit_scale, logit_bias: model.logit_bias });
  changed();
}

window.addEventListener("DOMContentLoaded", () => {
  const editor = new PairEditor();
  page.parts = [editor, new Batch(editor), new Losses(editor), new FollowedCell()];
  show_book_link();
  element("notebooks").append("In the course: ", notebook_link("02_clip_and_siglip", "02, CLIP and SigLIP"), ", and ",
    notebook_link("10_contrastive_training", "10, Contrastive training"), ".");
  load_try(0);
});
