"use strict";
/* Contrastive losses, cell by cell: what each asks of the matrix of n pictures and n captions. As minivlm/losses.py.

   A matrix is an array of n rows. Picture i belongs to caption i, and to no other: that is all that a loss is told. */

/* Embeddings, n times [1, D] each, of any length -> cosines [n, n], pictures down, captions across */
function similarity(image_embeds, text_embeds) {
  const [images, texts] = [image_embeds, text_embeds].map((embeds) => embeds.map(l2_normalize));
  return images.map((image) => texts.map((text) => image.reduce((sum, value, i) => sum + value * text[i], 0)));
}

function l2_normalize({ data }) {
  const length = Math.sqrt(data.reduce((sum, value) => sum + value * value, 0));
  return Float64Array.from(data, (value) => value / Math.max(length, 1e-12));
}

/* CLIP: each picture chooses one caption, by a softmax over its row, and each caption one picture, over its column.
   cosines [n, n] -> shares of the rows and of the columns [n, n], the cost of each row and column, and the loss */
function clip_loss(cosines, logit_scale) {
  const logits = cosines.map((row) => row.map((cosine) => Math.exp(logit_scale) * cosine));
  const rows = logits.map(log_softmax), columns = turn(turn(logits).map(log_softmax));
  const cost = (matrix) => matrix.map((row, i) => -row[i]); // the pair itself lies on the diagonal
  const [row_costs, column_costs] = [cost(rows), cost(columns)];
  const loss = (mean(row_costs) + mean(column_costs)) / 2;
  return { rows: each_cell(rows, Math.exp), columns: each_cell(columns, Math.exp), row_costs, column_costs, loss };
}

/* SigLIP: does this picture belong to this caption? A sigmoid for each cell, whatever the others are.
   cosines [n, n] -> shares [n, n] of yes, the cost of each cell [n, n], and the loss */
function siglip_loss(cosines, logit_scale, logit_bias) {
  const logits = cosines.map((row) => row.map((cosine) => Math.exp(logit_scale) * cosine + logit_bias));
  const shares = each_cell(logits, (logit) => 1 / (1 + Math.exp(-logit)));
  const costs = each_cell(logits, (logit, i, j) => softplus(i === j ? -logit : logit));
  const loss = costs.flat().reduce((sum, cost) => sum + cost, 0) / costs.length;
  return { logits, shares, costs, loss };
}

/* -log(sigmoid(-x)), also where x is large */
function softplus(x) {
  return Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
}

function log_softmax(logits) {
  const largest = Math.max(...logits);
  const total = largest + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - largest), 0));
  return logits.map((logit) => logit - total);
}

function turn(matrix) {
  return matrix[0].map((_, j) => matrix.map((row) => row[j]));
}

function each_cell(matrix, change) {
  return matrix.map((row, i) => row.map((value, j) => change(value, i, j)));
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
