// Sphinx's search fetches each page that it has found, to quote it. From the disk a browser allows no fetch, so the
// text of all pages comes from pages.js (docs/book/excerpts.py), for which a script element is enough.
"use strict";
(() => {
  const root = new URL(".", document.currentScript.src).href; // of _static/
  const pages = new Promise((loaded) => {
    const script = document.createElement("script");
    script.src = `${root}pages.js`;
    script.onload = () => loaded(window.pagesOfTheBook);
    script.onerror = () => loaded({});
    document.head.append(script);
  });
  window.fetch = async (address) => {
    const url = new URL(address, document.baseURI);
    const page = url.href.slice(new URL("..", root).href.length).split(/[?#]/)[0];
    return new Response((await pages)[page] ?? "");
  };
})();
