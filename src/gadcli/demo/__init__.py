"""`gad demo`: three stages on the embedded model, with a before/after table."""
