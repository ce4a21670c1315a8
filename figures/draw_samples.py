"""Draws figures/samples/: the pictures of `minivlm demo` and their prompts.

Run: python figures/draw_samples.py
"""

from pathlib import Path

from minivlm.world.demo import write_samples

if __name__ == "__main__":
    write_samples(Path(__file__).parent / "samples")
