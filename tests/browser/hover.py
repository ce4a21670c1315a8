"""Driving the picture of minivlm/looking/hover.py as a hand would."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

SHARE = r"{name}: (\d+) %"  # as a patch says it


def explore(page: Page, picture: Locator) -> None:
    """Move over patches, and choose each of the maps: the picture and the words below it have to follow."""
    patches, about = picture.locator("rect"), picture.locator(".about")
    picture.scroll_into_view_if_needed()
    expect(about).to_have_text("Move the mouse over the picture.")
    plain = picture.locator("svg").screenshot()
    for number in (0, patches.count() // 2, patches.count() - 1):
        patch = patches.nth(number)
        patch.hover()
        expect(about).to_have_text(patch.locator("title").text_content() or "")
        expect(patch).to_have_attribute("stroke", "#000")
        assert picture.locator("svg").screenshot() != plain, "the patch under the mouse looks like the others"
        about.hover()
        expect(patch).to_have_attribute("stroke", "#fff")

    looks = {plain}
    titles = picture.locator("rect > title").all_text_contents()
    buttons = picture.locator("button")
    assert buttons.count() > 1
    for button in buttons.all():
        button.click()
        share = re.compile(SHARE.format(name=re.escape(button.inner_text())))
        shares = [found and int(found[1]) for found in map(share.search, titles)]
        opacities = patches.evaluate_all("all => all.map(one => one.getAttribute('fill-opacity'))")
        assert [round(float(one) / 0.8 * 100) for one in opacities] == shares
        about.hover()
        looks.add(picture.locator("svg").screenshot())
    assert len(looks) == 1 + buttons.count(), "two maps look alike"
