"""Other ways to let a language model see, each in one file and small enough to train on a laptop."""
