"""Image towers, one file each."""
