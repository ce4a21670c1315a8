"""How good a model is: the table that `minivlm eval` prints, and the measures in it."""

from minivlm.evaluation.answers import answer_all, evaluate, make_questions
from minivlm.evaluation.scoring import score

__all__ = ["answer_all", "evaluate", "make_questions", "score"]
