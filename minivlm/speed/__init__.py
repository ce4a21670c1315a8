"""Running fast: what is put onto a loaded model from outside, and changes results by rounding at most."""
