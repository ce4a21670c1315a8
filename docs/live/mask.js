"use strict";
/* Who may look at whom, drawn: a row for each token that looks, a column for each that is seen. */

class Mask {
  show() {
    const result = page.result;
    if (!result || result.words.length === 0) return;
    const T = result.prefix_ids.length, length = T + result.words.length, canvas = element("mask_canvas", HTMLCanvasElement);
    const mask = model.mask(length, T, page.breaks), { looks } = looked_at();
    const color = (name) => { // light or dark: a pen does not know the style sheet
      canvas.style.color = `var(--${name})`;
      return getComputedStyle(canvas).color;
    };
    canvas.width = canvas.height = length;
    const pen = pen_of(canvas);
    const unseen = color("unseen"), kinds = [["image", 0, IMAGE_TOKENS], ["prompt", IMAGE_TOKENS, T], ["answer", T, length]];
    mask.forEach((row, t) => {
      for (const [kind, from, to] of kinds) {
        const seen = color(kind);
        for (let s = from; s < to; s++) {
          pen.globalAlpha = row[s] && t !== looks ? 0.7 : 1;
          pen.fillStyle = row[s] ? seen : unseen;
          pen.fillRect(s, t, 1, 1);
        }
      }
    });
    const seen = mask[looks].reduce((a, b) => a + b, 0);
    const sees = seen === 1 ? "itself alone" : `${seen} tokens`;
    const rule = page.breaks.causal_mask
      ? "Broken: picture and prompt see what lies before them only."
      : "Picture and prompt see each other in both directions; the answer sees them and its own past.";
    const said = `The token that is looked at, in row ${looks + 1} of ${length}, sees ${sees}. ${rule}`;
    element("mask_said").textContent = said;
    canvas.setAttribute("aria-label", said);
  }
}
