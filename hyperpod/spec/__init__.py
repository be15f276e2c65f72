"""Pure builders: from records to what other programs read. No input, no output."""
