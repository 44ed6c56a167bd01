"""Data: sources of text, puzzles, filters, token shards and the loader."""
