"""Parts that the reference recipe does not use: the word loss, and one loss over several batches."""
