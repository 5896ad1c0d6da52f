"""The `gad` command: thin files that parse, call and print; `app.py` holds the table and the error boundary."""
