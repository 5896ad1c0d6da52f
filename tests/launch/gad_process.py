"""The `gad` command line with the small worker in place of the real one: `python gad_process.py train seqkd …`."""

from __future__ import annotations

import sys

from gadcli.launch import supervisor as launch

launch.WORKER_MODULE = "small_worker"  # before the parent is imported: it is a default of its request

from gadcli.cli import app  # noqa: E402

sys.exit(app.run(sys.argv[1:]))
