"use strict";
/* With ?embed in its address, a page is a part of another one. It has no header and no footer (small.css), tells the page
   around it how high it is, and is told whether that one is light or dark. Both by messages: a page from the disk may not
   look into another one. */
if (new URLSearchParams(location.search).has("embed")) {
  const root = document.documentElement;
  root.classList.add("embed");
  const tell = () => parent.postMessage({ height: Math.ceil(document.body.getBoundingClientRect().height) }, "*");
  window.addEventListener("DOMContentLoaded", () => new ResizeObserver(tell).observe(document.body));
  window.addEventListener("message", ({ source, data }) => {
    if (source === parent && ["light", "dark", "auto"].includes(data.theme)) root.dataset.theme = data.theme;
  });
}
