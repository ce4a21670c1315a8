"""What the command line and the notebooks draw.

drawing.py draws boxes and masks on pictures, plots.py makes figures of what goes on inside a model,
hover.py a page to explore it. Only the first is imported here: figures need matplotlib, which takes half a
second.
"""

from minivlm.looking.drawing import BOX_COLORS, draw_boxes, draw_masks, side_by_side

__all__ = ["BOX_COLORS", "draw_boxes", "draw_masks", "side_by_side"]
