"""What can be wrong with a page without anybody saying so."""

from __future__ import annotations

from playwright.sync_api import Page, Route

# Texts whose contrast with what is behind them is below the least, each with its ratio. Colors may be
# transparent: those behind them shine through. WCAG 2 says how luminance and contrast are computed.
FAINT = """(least) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const cached = compute => {
    const known = new Map();
    return key => known.get(key) || known.set(key, compute(key)).get(key);
  };
  const rgba = cached(color => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  });
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const behind = cached(element => over(
    rgba(getComputedStyle(element).backgroundColor),
    element.parentElement ? behind(element.parentElement) : [255, 255, 255]));
  const luminance = color => color.map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = new Map();
  const article = document.querySelector("article") || document.body;
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (element.closest("script, style, svg, mjx-container")) continue;
    const ground = behind(element), ink = over(rgba(getComputedStyle(element).color), ground);
    const [dark, light] = [luminance(ground), luminance(ink)].sort((a, b) => a - b);
    const ratio = (light + 0.05) / (dark + 0.05);
    const colors = `${ink.map(Math.round)} on ${ground.map(Math.round)}`;
    if (ratio < least) found.set(colors, `"${text.slice(0, 40)}": contrast ${ratio.toFixed(2)}, ${colors}`);
  }
  return [...found.values()];
}"""


class Watcher:
    """Collects errors of a page, and addresses that it asks for outside of its own; those are refused."""

    def __init__(self, page: Page, own: tuple[str, ...]) -> None:
        self.complaints: list[str] = []
        self._own = (*own, "data:", "blob:")
        page.route("**/*", self._pass_or_refuse)
        page.on("pageerror", lambda error: self.complaints.append(f"error in a script: {error}"))
        page.on(
            "console",
            lambda said: (
                said.type in ("error", "warning") and self.complaints.append(f"console: {said.text}")
            ),
        )
        page.on("requestfailed", lambda request: self.complaints.append(f"not loaded: {request.url}"))
        page.on(
            "response",
            lambda answer: (
                answer.status >= 400 and self.complaints.append(f"status {answer.status}: {answer.url}")
            ),
        )

    def _pass_or_refuse(self, route: Route) -> None:
        if route.request.url.startswith(self._own):
            route.continue_()
        else:
            self.complaints.append(f"asks for {route.request.url}")
            route.abort()

    def take(self) -> list[str]:
        """What was collected since the last time."""
        taken, self.complaints = self.complaints, []
        return taken


def faint_texts(page: Page, least: float) -> list[str]:
    """Texts of the article whose contrast is below `least`."""
    found: list[str] = page.evaluate(FAINT, least)
    return found


def mathematics(page: Page) -> tuple[int, int]:
    """How many formulas are drawn, and how many are not."""
    page.evaluate("window.MathJax && window.MathJax.startup && window.MathJax.startup.promise")
    formulas = page.locator(".math")
    drawn = formulas.filter(has=page.locator("mjx-container:not(:has([data-mml-node=merror]))")).count()
    return drawn, formulas.count() - drawn


def width(page: Page) -> int:
    """Pixels from left to right, with what can only be seen by scrolling sideways.

    The theme puts pages into a box that scrolls by itself, so that the page is never wider than the window:
    the box is measured as well. What scrolls inside of it, such as a line of code or a table, does not count.
    A page that draws itself anew for a window of another size does so with the next frame, so wait for that.
    """
    widest: int = page.evaluate("""async () => {
      for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
      return Math.max(...[...document.querySelectorAll("html, .content")].map((box) => box.scrollWidth));
    }""")
    return widest
