"use strict";
/* Rotary positions alone: a query and a key of four pairs of numbers, drawn as arrows. As minivlm/rope.py.

   They are turned by `apply_rotary` of rope.js, which is what turns queries and keys in the model. */

const HEAD_DIM = 8, PAIRS = HEAD_DIM / 2, FARTHEST = 20;
// Half-split: elements i and i + 4 are a pair, so the first row holds the first numbers of all pairs.
const QUERY = Float32Array.of(0.9, 0.6, 0.8, 0.5, 0.2, 0.6, -0.4, 0.7);
const KEY = Float32Array.of(0.7, 0.9, 0.5, 0.8, 0.6, -0.2, 0.6, 0.4);

/* A vector [Dh] at a position. */
function turned(vector, position, theta) {
  return apply_rotary(new Tensor(vector, 1, HEAD_DIM), [position], HEAD_DIM, theta).data;
}

/* The part of the dot product that each pair gives [Dh / 2]; the score is their sum. */
function scores_of_pairs(query, key) {
  return Array.from({ length: PAIRS }, (_, i) => query[i] * key[i] + query[i + PAIRS] * key[i + PAIRS]);
}

function score_of(query, key) {
  return scores_of_pairs(query, key).reduce((a, b) => a + b, 0);
}

/* What the sliders say. The base is chosen by its power of ten. */
function settings() {
  const number = (id) => Number(element(id, HTMLInputElement).value);
  return { m: number("query_position"), n: number("key_position"), shift: number("shift"), theta: 10 ** number("theta") };
}

/* Everything that is shown, as numbers. */
function computed({ m, n, shift, theta }) {
  const query = turned(QUERY, m + shift, theta), key = turned(KEY, n + shift, theta);
  const score = score_of(turned(QUERY, m, theta), turned(KEY, n, theta)), shifted = score_of(query, key);
  const distances = Array.from({ length: 2 * FARTHEST + 1 }, (_, i) => i - FARTHEST);
  const curve = distances.map((distance) => score_of(turned(QUERY, distance, theta), KEY));
  const speeds = Array.from({ length: PAIRS }, (_, i) => theta ** ((-2 * i) / HEAD_DIM)); // radians a position
  return { query, key, pairs: scores_of_pairs(query, key), score, shifted, distances, curve, speeds };
}

function show() {
  const chosen = settings(), found = computed(chosen), { m, n, shift, theta } = chosen;
  const say = (id, value) => (element(id).textContent = value);
  say("query_position_value", m);
  say("key_position_value", n);
  say("shift_value", shift);
  say("theta_value", Math.round(theta).toLocaleString("en-US"));
  element("theta").setAttribute("aria-valuetext", element("theta_value").textContent);
  say("query_at", m);
  say("key_at", n);
  say("score", shown(found.score));
  say("query_shifted", m + shift);
  say("key_shifted", n + shift);
  say("score_shifted", shown(found.shifted));
  say("said", sentence(chosen, found));
  element("pairs").replaceChildren(...found.speeds.map((speed, i) => drawn_pair(i, speed, chosen, found)));
  draw_curve(m - n, found);
}

function sentence({ m, n, shift }, { score, shifted }) {
  const apart = m === n ? "at the same position" : `${Math.abs(m - n)} apart, the query ${m > n ? "after" : "before"} the key`;
  if (shift === 0) return `They stand ${apart}: score ${shown(score)}. Now shift both.`;
  const same = Math.abs(score - shifted) < 5e-4;
  const why = "Both arrows of a pair turned by the same angle, so the angle between them stayed.";
  return `Shifted by ${shift}, they are still ${apart}, and the score is ${same ? "the same" : "another"}: ${shown(shifted)}. ${why}`;
}

/* Three decimals, with a minus sign; what rounds to zero has none. */
function shown(number) {
  const text = number.toFixed(3);
  return Number(text) === 0 ? "0.000" : text.replace("-", "−");
}

/* One pair: the circle, both arrows as they are at position 0, and turned. */
function drawn_pair(i, speed, { m, n, shift }, { query, key, pairs }) {
  const degrees = (angle) => (angle * 180) / Math.PI, whole = (position) => Math.round(degrees(speed * position) % 360);
  const arrows = [
    arrow(QUERY[i], QUERY[i + PAIRS], "query faint"), arrow(KEY[i], KEY[i + PAIRS], "key_arrow faint"),
    arrow(query[i], query[i + PAIRS], "query", "q"), arrow(key[i], key[i + PAIRS], "key_arrow", "k"),
  ];
  const said = `Pair ${i}: the query has turned by ${whole(m + shift)} degrees, the key by ${whole(n + shift)}.`;
  const drawing = make_svg("svg", { viewBox: "-60 -60 120 120", role: "img", "aria-label": said },
    make_svg("circle", { r: 45, class: "dial" }), make_svg("path", { d: "M-45 0H45M0 -45V45", class: "dial" }), ...arrows);
  const slow = degrees(speed), decimals = slow < 0.1 ? 3 : slow < 1 ? 2 : 1;
  const caption = make("figcaption", {},
    make("b", {}, `pair ${i}`), make("br"), `${slow.toFixed(decimals)}° a position`, make("br"), `turned: q ${whole(m + shift)}°, k ${whole(n + shift)}°`,
    make("br"), "adds ", make("span", { className: "part" }, shown(pairs[i])));
  return make("figure", {}, drawing, caption);
}

/* From the middle to (a, b); a unit is 45, and b points up. */
function arrow(a, b, kind, name = "") {
  const [x, y] = [45 * a, -45 * b], length = Math.hypot(x, y), [u, v] = [x / length, y / length];
  const corner = (back, side) => `${x - back * u - side * v} ${y - back * v + side * u}`;
  const shaft = make_svg("path", { d: `M0 0L${corner(6, 0)}`, class: "shaft" });
  const head = make_svg("path", { d: `M${x} ${y}L${corner(9, 4)}L${corner(9, -4)}Z`, class: "tip" });
  const label = make_svg("text", { x: x + 9 * u, y: y + 9 * v + 3.5 }, name);
  return make_svg("g", { class: `arrow ${kind}` }, shaft, head, ...(name ? [label] : []));
}

/* The score for every distance, and where the reader is. */
function draw_curve(distance, { distances, curve }) {
  const [least, most] = [Math.min(0, ...curve) - 0.1, Math.max(0, ...curve) + 0.1];
  const x = (d) => 30 + ((d + FARTHEST) / (2 * FARTHEST)) * 360, y = (score) => 125 - ((score - least) / (most - least)) * 118;
  const line = distances.map((d, i) => `${i ? "L" : "M"}${x(d).toFixed(1)} ${y(curve[i]).toFixed(1)}`).join("");
  const ticks = [-20, -10, 0, 10, 20].flatMap((d) => [
    make_svg("path", { d: `M${x(d)} 125v4`, class: "dial" }),
    make_svg("text", { x: x(d), y: 142, class: "tick" }, String(d).replace("-", "−")),
  ]);
  const here = curve[distances.indexOf(distance)], svg = element("curve", SVGSVGElement);
  svg.setAttribute("aria-label", `The score for distances from −20 to 20. At ${distance}, where you are, it is ${shown(here)}.`);
  svg.replaceChildren(
    make_svg("path", { d: "M30 125H390", class: "dial" }), make_svg("path", { d: `M30 ${y(0)}H390`, class: "zero" }), ...ticks,
    make_svg("text", { x: 24, y: y(0) + 3.5, class: "tick end" }, "0"),
    make_svg("path", { d: line, class: "line" }), make_svg("circle", { cx: x(distance), cy: y(here), r: 5, class: "here" }));
}

for (const slider of document.querySelectorAll("input")) slider.addEventListener("input", show);
show();
