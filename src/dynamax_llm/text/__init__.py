"""Text read from files, folders and datasets, as documents and as batches of tokens."""
