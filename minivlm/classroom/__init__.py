"""For a class: student copies of the notebooks, the students' progress, and whether a machine is ready."""
