"use strict";
/* A link that holds picture and prompt: index.html#prompt=caption+en&ground=200&thing=circle,red,20,30,12,d62828

   Whoever writes such a link may write anything into it, so everything is checked. */

function as_link() {
  const link = new URLSearchParams({ prompt: page.prompt });
  if (page.upload) return `#${link}`;
  link.set("ground", String(page.scene.background));
  for (const { shape, color, x, y, radius, rgb } of page.scene.things) {
    const hex = rgb.map((value) => value.toString(16).padStart(2, "0")).join("");
    link.append("thing", [shape, color, ...[x, y, radius].map((value) => Number(value.toFixed(3))), hex].join(","));
  }
  return `#${link}`;
}

/* Put the scene of the address into the page. Returns whether there was one. */
function read_link() {
  const link = new URLSearchParams(location.hash.slice(1));
  page.prompt = link.get("prompt")?.slice(0, MAX_PROMPT) || page.prompt;
  if (!link.has("ground")) return false;
  const things = link.getAll("thing").map(read_thing).filter((thing) => thing !== null).slice(0, MOST_THINGS);
  const ground = Math.round(Number(link.get("ground")));
  page.scene = { background: Number.isFinite(ground) ? clamp(ground, 0, 255) : 215, things };
  Object.assign(page, { upload: null, sample: null, token: null });
  changed();
  return true;
}

/** @param {string} text @returns {Thing?} */
function read_thing(text) {
  const [shape, color, ...rest] = text.split(","), [x, y, radius] = rest.map(Number);
  const known = DRAWN_WORLD.shapes.includes(shape) && Object.hasOwn(DRAWN_WORLD.colors, color);
  if (!known || ![x, y, radius].every(Number.isFinite)) return null;
  const has_rgb = /^[0-9a-f]{6}$/.test(rest[3]);
  const byte = (i) => parseInt(rest[3].slice(i, i + 2), 16);
  const place = { x: clamp(x, 0, WORLD), y: clamp(y, 0, WORLD), radius: clamp(radius, SMALLEST, LARGEST) };
  return { shape, color, ...place, rgb: has_rgb ? [byte(0), byte(2), byte(4)] : DRAWN_WORLD.colors[color] };
}
