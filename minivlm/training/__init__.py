"""Every training run: the loop that all share, what each run trains, and how."""
