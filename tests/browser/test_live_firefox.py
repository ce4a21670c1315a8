"""The main tests of the live pages once more, in Firefox: their `page` is the one of this file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_live_page
import test_live_small
from conftest import fresh_page
from playwright.sync_api import Browser, Page

folder, ask, live = test_live_page.folder, test_live_page.ask, test_live_page.live
rotary, mask = test_live_small.rotary, test_live_small.mask

test_it_answers_when_it_opens = test_live_page.test_it_answers_when_it_opens
test_a_thing_is_dragged_and_resized = test_live_page.test_a_thing_is_dragged_and_resized
test_everything_can_be_done_with_the_keyboard = test_live_page.test_everything_can_be_done_with_the_keyboard
test_outlines_are_drawn = test_live_page.test_outlines_are_drawn
test_a_link_brings_everything_back = test_live_page.test_a_link_brings_everything_back
test_any_token_layer_and_head = test_live_page.test_any_token_layer_and_head
test_a_shift = test_live_small.test_a_shift_turns_the_arrows_and_leaves_the_score
test_it_says_why = test_live_small.test_it_says_why
test_the_table_is_walked_with_the_keyboard = test_live_small.test_the_table_is_walked_with_the_keyboard


@pytest.fixture
def page(firefox: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    yield from fresh_page(firefox, f"firefox_{request.node.name}")
