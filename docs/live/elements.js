"use strict";
/* Elements, found and made, for every page. Text stays text: nothing is ever read as HTML. */

/** The element of an id, which has to be of a kind: element("prompt", HTMLInputElement).
 * @template {Element} [T=HTMLElement] @param {string} id @param {new () => T} [kind] @returns {T} */
function element(id, kind) {
  const found = document.getElementById(id), wanted = kind ?? HTMLElement;
  if (found instanceof wanted) return /** @type {any} */ (found);
  throw new Error(`this page has no ${wanted.name} #${id}`);
}

/* The buttons below an element. */
function buttons_in(id) {
  return element(id).querySelectorAll("button");
}

/** What draws on a canvas.
 * @param {HTMLCanvasElement} canvas */
function pen_of(canvas) {
  const pen = canvas.getContext("2d");
  if (pen === null) throw new Error("this browser does not draw on a canvas");
  return pen;
}

/** Give the focus to what has this data-NAME in a part of the page.
 * @param {Element} part @param {string} name @param {string | number} value */
function focus_on(part, name, value) {
  const found = part.querySelector(`[data-${name}="${value}"]`);
  if (found instanceof HTMLElement || found instanceof SVGElement) found.focus({ preventScroll: true });
}

/** Draw a part of the page anew; the focus goes to the new element with the same data-NAME as the old one.
 * @param {Element} part @param {string} name @param {() => void} draw */
function keeping_focus(part, name, draw) {
  const active = document.activeElement, value = part.contains(active) ? active?.getAttribute(`data-${name}`) : null;
  draw();
  if (value) focus_on(part, name, value);
}

/** A new element; what begins with "on" is a listener.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag @param {Record<string, any>} attributes @param {(Node | string)[]} children @returns {HTMLElementTagNameMap[T]} */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") Object.assign(made, { [name]: value });
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** @template {keyof SVGElementTagNameMap} T
 * @param {T} tag @param {Record<string, any>} attributes @param {(Node | string)[]} children @returns {SVGElementTagNameMap[T]} */
function make_svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
