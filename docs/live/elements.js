"use strict";
/* Elements of a page, found and made, and numbers for the eye. */

function element(id) {
  return document.getElementById(id);
}

/* A new element; text stays text. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function make_svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function percent(share) {
  return share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}

/* Two decimals where there is room; a minus that is as wide as a digit. */
function number_of(value) {
  const text = value.toFixed(Math.abs(value) >= 9.995 ? 1 : 2);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

/* A color behind a number from -1 (blue) to 1 (red), pale enough to read it. */
function tint(value) {
  return `rgb(${value < 0 ? "43 108 196" : "209 31 47"} / ${0.55 * clamp(Math.abs(value), 0, 1)})`;
}

function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}

/* A link where the page is part of the book; elsewhere the name alone. */
function notebook_link(file, name) {
  return BOOK === null ? `notebook ${name}` : make("a", { href: `${BOOK}notebooks/${file}.html` }, `notebook ${name}`);
}

/* The way back to the book, where the page is part of one. */
function show_book_link() {
  if (BOOK !== null) element("book_link").replaceChildren(make("a", { href: `${BOOK}index.html` }, "minivlm, the book"));
  element("book_link").hidden = BOOK === null;
}
