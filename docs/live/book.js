"use strict";
/* Ways to the book, which this page may be part of: BOOK is where it is, or null. */

/* A link where the page is part of the book; elsewhere the name alone. */
function notebook_link(file, name) {
  return BOOK === null ? `notebook ${name}` : make("a", { href: `${BOOK}notebooks/${file}.html` }, `notebook ${name}`);
}

/* Where all notebooks are. */
function course_link() {
  if (BOOK === null) return "its notebooks are in the folder notebooks of minivlm, and begin with 00_tour.ipynb";
  return make("a", { href: `${BOOK}index.html` }, "its notebooks are in the book");
}

/* The way back to the book, where the page is part of one. */
function show_book_link() {
  if (BOOK !== null) element("book_link").replaceChildren(make("a", { href: `${BOOK}index.html` }, "minivlm, the book"));
  element("book_link").hidden = BOOK === null;
}
