"""Clean: suspicion of labels, ranked, reviewed on a page, written to a journal."""
