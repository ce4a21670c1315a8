"use strict";
/* The picture of the page: a scene that began as a sample, or a picture that was uploaded, with the boxes of the answer. */

class Editor extends SceneEditor {
  constructor() {
    super();
    this.sample = element("sample", HTMLSelectElement);
    this.sample.onchange = () => {
      this.remember();
      this.chosen = null;
      load_sample(Number(this.sample.value));
    };
    DRAWN_WORLD.samples.forEach((_, i) => this.sample.append(make("option", { value: i }, `sample ${i + 1}`)));
    const upload = element("upload", HTMLInputElement);
    upload.onchange = () => this.upload(upload.files?.[0]);
  }

  /** @param {File} [file] */
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
    element("link", HTMLAnchorElement).href = as_link();
    this.sample.value = page.upload ? "" : String(page.sample ?? "");
    if (page.upload) element("picture_note").textContent = "Your picture, in the 64 × 64 pixels that the model sees.";
  }
}

function load_sample(number) {
  const { background, things } = structuredClone(DRAWN_WORLD.samples[number]);
  Object.assign(page, { scene: { background, things }, sample: number, upload: null, token: null });
  changed();
}

/** A box of the answer, with its name, and its outline if the answer has one. @param {Box} box */
function drawn_box({ x0, y0, x1, y1, name, codes }) {
  const frame = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  const label = make_svg("text", { x: x0, y: y0 > 5 ? y0 - 1 : y1 + 3.5, class: "box_name" }, name);
  /** @type {SVGElement[]} */
  const drawn = [make_svg("rect", { ...frame, class: "box_under" }), make_svg("rect", { ...frame, class: "box" }), label];
  if (codes) drawn.unshift(drawn_mask(codebook.decode(codes), frame));
  return drawn;
}

/* A mask [64, 64] stretched over a box: one small rectangle for each run of pixels that lie inside. */
function drawn_mask(mask, { x, y, width, height }) {
  const side = Math.sqrt(mask.length), [across, down] = [width / side, height / side];
  let path = "";
  for (let row = 0; row < side; row++)
    for (let from = 0, to; from < side; from = to) {
      const inside = mask[row * side + from] > 0;
      for (to = from + 1; to < side && mask[row * side + to] > 0 === inside; ) to++;
      if (inside) path += `M${x + from * across} ${y + row * down}h${(to - from) * across}v${down}h${(from - to) * across}z`;
    }
  return make_svg("path", { d: path, class: "outlined" });
}

/* The pixels of a file, RGB; white lies under what is transparent. */
async function read_picture(file) {
  const bitmap = await createImageBitmap(file), { width, height } = bitmap;
  const canvas = make("canvas", { width, height }), pen = pen_of(canvas);
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0);
  const rgba = pen.getImageData(0, 0, width, height).data, data = new Uint8ClampedArray((rgba.length / 4) * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) for (let c = 0; c < 3; c++) data[j++] = rgba[i + c];
  return { width, height, data };
}
