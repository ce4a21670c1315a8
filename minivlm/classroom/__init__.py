"""For a class: student copies of the notebooks, their progress, and whether a machine is ready."""
