"""A published folder: how it is found, read, checked and written."""
