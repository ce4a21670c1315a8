"""How good a model is: the table that `minivlm eval` prints, and the measures in it."""
