"use strict";
/* With ?embed in its address, a page is a part of another one: it has no header and no footer (small.css), and tells
   the page around it how high it is. A page from the disk may not look into another one, so it is told by a message. */
if (new URLSearchParams(location.search).has("embed")) {
  document.documentElement.classList.add("embed");
  const tell = () => parent.postMessage({ height: Math.ceil(document.body.getBoundingClientRect().height) }, "*");
  window.addEventListener("DOMContentLoaded", () => new ResizeObserver(tell).observe(document.body));
}
