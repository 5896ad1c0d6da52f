"""Files of any kind as rows: which files, what they hold, and the contract their rows keep."""
