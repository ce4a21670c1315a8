"use strict";
/* The three masks of the small page, and why a token may look at another one, or not. As minivlm/masks.py.

   All three are `prefix_lm` of masks.js: with the prefix as it is, with none, and with the whole row as a prefix. */

const ROW = [
  ["image 1", "image"], ["image 2", "image"], ["image 3", "image"],
  ["<bos>", "prompt"], ["Describe", "prompt"], ["this", "prompt"], ["↵", "prompt"],
  ["a", "answer"], ["red", "answer"], ["star", "answer"], ["<eos>", "answer"],
].map(([name, kind]) => ({ name, kind }));
const PREFIX = ROW.filter(({ kind }) => kind !== "answer").length;
const PAD = { name: "<pad>", kind: "padding" };
const KINDS = { prefix_lm: "prefix-LM", causal: "causal", everything: "everything visible" };
const SIDES = { none: "no padding", left: "left padding", right: "right padding" };

/* The row, filled up to two tokens more. */
function tokens_of(side) {
  return { none: ROW, left: [PAD, PAD, ...ROW], right: [...ROW, PAD, PAD] }[side];
}

/* Real tokens are numbered from 0; padding repeats a number, which nobody reads. */
function number_positions(is_real) {
  let count = 0;
  return is_real.map((real) => Math.max((count += real) - 1, 0));
}

/* T rows of T numbers, 1 = may look. */
function mask_of(kind, side) {
  const is_real = tokens_of(side).map(({ kind }) => (kind === "padding" ? 0 : 1)), positions = number_positions(is_real);
  const prefix_length = { prefix_lm: PREFIX, causal: 0, everything: is_real.length }[kind];
  return prefix_lm(positions, positions, prefix_length).map((row) => row.map((seen, s) => seen & is_real[s]));
}

/* Why the token in row t may look at the one in column s, or not. */
function why(kind, tokens, t, s) {
  const query = tokens[t], key = tokens[s], [q, k] = [query, key].map(({ name }) => `“${name}”`);
  const may = `${q} may look at ${k}`, may_not = `${q} may not look at ${k}`;
  if (key.kind === "padding") return `${may_not}: it only fills the row up, and nobody looks at padding.`;
  if (query.kind === "padding") {
    const verdict = mask_of(kind, tokens[0] === PAD ? "left" : "right")[t][s] ? may : may_not;
    return `${verdict}. It makes no difference: it is padding, and nobody reads what comes out of it.`;
  }
  if (t === s) return `${may}: every token sees itself.`;
  if (s < t) return `${may}: it comes before it in the row. ${before(query, key)}`;
  const next = key.kind === "answer" && s === t + 1;
  if (key.kind === "answer") {
    if (kind !== "everything") return `${may_not}: it does not exist yet. ${next ? `It is what the model has to say after ${q}.` : NOT_YET[query.kind]}`;
    return next
      ? `${may}, which it has to predict: in training, this gives the answer away.`
      : `${may}, which does not exist yet when the model answers: it learns to rely on what it will not have.`;
  }
  if (kind === "causal") return `${may_not}: it comes later in the row. This hides what is given: nobody has to predict ${k}.`;
  return `${may}, although it comes later: picture and prompt are given as a whole, so there is nothing to give away.`;
}

const NOT_YET = {
  image: "Picture and prompt are read before the answer is written.",
  prompt: "Picture and prompt are read before the answer is written.",
  answer: "The answer is written token by token.",
};

function before(query, key) {
  if (query.kind !== "answer") return "Picture and prompt are given.";
  return key.kind === "answer" ? "It has been written already." : "The answer is about what is given.";
}

/* What a token sees in all. */
function overview(kind, tokens, t, row) {
  const { name, kind: part } = tokens[t], seen = row.reduce((a, b) => a + b, 0);
  const count = `${seen} of ${tokens.length} tokens`;
  if (part === "padding") return `“${name}” fills the row up. It sees ${count}, which makes no difference: nobody reads what comes out of it.`;
  const padded = tokens.includes(PAD) ? " Nobody sees padding." : "";
  if (kind === "everything") return `“${name}” sees every token, also those that come later: ${count}.${padded}`;
  if (kind === "causal") return `“${name}” sees itself and what comes before it: ${count}.${padded}`;
  if (part === "answer") return `“${name}” is a token of the answer. It sees picture and prompt, what was written before it, and itself: ${count}.${padded}`;
  const owner = part === "image" ? "picture" : "prompt";
  return `“${name}” belongs to the ${owner}. It sees all of picture and prompt, also what comes later, and nothing of the answer: ${count}.${padded}`;
}
