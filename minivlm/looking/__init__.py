"""What the command line and the notebooks draw.

drawing.py draws boxes and masks on pictures, plots.py makes figures of a model's internals, and hover.py
makes a page to explore them. Only drawing.py is imported here: the others need matplotlib, which takes half a
second to import.
"""

from minivlm.looking.drawing import draw_boxes, draw_masks, drawn_size

__all__ = ["draw_boxes", "draw_masks", "drawn_size"]
