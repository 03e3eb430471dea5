"""Reports: where a competition stands, on one page."""
