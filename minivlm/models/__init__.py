"""One file per system, each a composition of towers; and `load`, which opens a checkpoint folder."""
