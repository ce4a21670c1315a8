"use strict";
/* The picture of the page: a scene that began as a sample, or a picture that was uploaded, with the boxes of the answer. */

class Editor extends SceneEditor {
  constructor() {
    super();
    element("sample").onchange = (event) => {
      this.remember();
      this.chosen = null;
      load_sample(Number(event.target.value));
    };
    DRAWN_WORLD.samples.forEach((_, i) => element("sample").append(make("option", { value: i }, `sample ${i + 1}`)));
    element("upload").onchange = (event) => this.upload(event.target.files[0]);
  }

  async upload(file) {
    if (!file) return;
    try {
      page.upload = resize(await read_picture(file), WORLD);
      this.choose(null);
      changed();
    } catch {
      element("picture_note").textContent = `${file.name} is not a picture that this browser can read.`;
    }
  }

  show() {
    super.show();
    for (const box of page.result ? text_to_boxes(answer_text(), WORLD, WORLD) : []) this.layer.append(...drawn_box(box));
    element("link").href = as_link();
    element("sample").value = page.upload ? "" : page.sample ?? "";
    if (page.upload) element("picture_note").textContent = "Your picture, in the 64 × 64 pixels that the model sees.";
  }
}
