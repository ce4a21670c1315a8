"""The drawn world: scenes, questions about them, and the pictures and batches made from them."""
