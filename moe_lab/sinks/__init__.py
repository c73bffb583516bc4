"""Where the rows of a run go: jsonl (the truth), the terminal and W&B (its mirrors)."""
