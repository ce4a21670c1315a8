"use strict";
/* What the answer depends on: hide one patch after the other, and see how much less sure the model becomes. As
   `occlusion` and `log_odds` in minivlm/looking/measures.py. Nothing inside of the model is looked at. */

/* pixel_values [C, height, width] with one patch filled with the median color, which is that of the ground where the
   ground covers more than half of the picture. */
function hide_patch(pixel_values, number, patch_size) {
  const [C, height, width] = pixel_values.shape, hidden = new Tensor(pixel_values.data.slice(), C, height, width);
  const top = Math.floor(number / (width / patch_size)) * patch_size, left = (number % (width / patch_size)) * patch_size;
  for (let c = 0; c < C; c++) {
    const channel = hidden.data.subarray(c * height * width, (c + 1) * height * width);
    const median = Float32Array.from(channel).sort()[Math.floor((channel.length - 1) / 2)];
    for (let y = top; y < top + patch_size; y++) channel.fill(median, y * width + left, y * width + left + patch_size);
  }
  return hidden;
}

/* How sure logits [V] are of a word: log(p / (1 - p)). Near 1 a probability hardly changes, but its log-odds do. */
function log_odds(logits, id) {
  let largest = -Infinity, sum = 0;
  for (let i = 0; i < logits.length; i++) if (i !== id) largest = Math.max(largest, logits[i]);
  for (let i = 0; i < logits.length; i++) if (i !== id) sum += Math.exp(logits[i] - largest);
  return logits[id] - largest - Math.log(sum);
}

/* Log-odds of a whole answer, summed over its words: prompt and answer are read in one pass. */
function sureness(model, prefix_ids, answer_ids, pixel_values, breaks = {}) {
  const ids = [...prefix_ids, ...answer_ids];
  const { hidden_states } = model.prefill(ids, pixel_values, unrecorded, breaks, prefix_ids.length);
  let sum = 0;
  answer_ids.forEach((id, i) => {
    const writer = new Tensor(hidden_states.row(prefix_ids.length - 1 + i), 1, hidden_states.width);
    sum += log_odds(model.language_model.logits(writer).data, id);
  });
  return sum;
}

/* Patch by patch: yields how much the sureness falls when it is hidden, so that a page can show it as it comes. */
function* occlusion(model, prefix_ids, answer_ids, pixel_values, breaks = {}) {
  const { image_size, patch_size } = model.config.vision_config;
  const whole = sureness(model, prefix_ids, answer_ids, pixel_values, breaks);
  for (let n = 0; n < (image_size / patch_size) ** 2; n++)
    yield whole - sureness(model, prefix_ids, answer_ids, hide_patch(pixel_values, n, patch_size), breaks);
}
