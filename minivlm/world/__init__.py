"""The drawn world: scenes, what can be asked about them, and the pictures and batches made of them."""
