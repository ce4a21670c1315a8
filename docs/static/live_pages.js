/* Small live pages inside of a chapter (docs/book/live_pages.py): each says how high it is, and is told whether this page
   is light or dark, also when the reader changes it. */
(() => {
  const frames = () => [...document.querySelectorAll("iframe.live")];
  const tell = (frame) => frame.contentWindow.postMessage({ theme: document.body.dataset.theme }, "*");
  window.addEventListener("message", (event) => {
    const frame = frames().find(({ contentWindow }) => contentWindow === event.source);
    if (!frame || !(event.data.height > 0)) return;
    frame.style.height = `${event.data.height}px`;
    tell(frame);
  });
  new MutationObserver(() => frames().forEach(tell)).observe(document.body, { attributeFilter: ["data-theme"] });
})();
