"use strict";
/* Numbers for the eye: in few letters, and as colors. */

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
