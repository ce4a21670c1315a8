"""What make_checkpoint.py knows of each family: configs, the small files of its folders, its tokenizer."""
