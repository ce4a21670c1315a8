"use strict";
/* With ?embed in its address, a page is a part of another one: it has no header and no footer (small.css). */
document.documentElement.classList.toggle("embed", new URLSearchParams(location.search).has("embed"));
