"""Text models, one file each."""
