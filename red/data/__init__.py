"""Text into the rows that a training reads: sources, streams, conversations, packing, caches of tokens."""
