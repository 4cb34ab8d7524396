"""Text to token rows: finding and reading files, training a tokenizer, storing tokens, packing them into rows."""
