"""Your own pictures: lines of a JSONL file, checked one by one, and the batches made from them."""
