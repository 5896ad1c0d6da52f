"""Methods compared on equal terms: arms trained from one start, the frontier of quality and variety, who wins."""
