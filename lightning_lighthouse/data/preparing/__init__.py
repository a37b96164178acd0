"""Documents to a prepared folder: read, tokenized, packed, mixed, split. `prepare.prepare` does all of it."""
