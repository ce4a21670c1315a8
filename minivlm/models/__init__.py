"""One file per system, each built from towers, and `load`, which opens a checkpoint folder."""
