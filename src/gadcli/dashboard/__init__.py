"""The picture of a run: the same one live, by `gad monitor`, as one plain line per step, and as a report. No torch."""

from gadcli.dashboard.live import live, watch
from gadcli.dashboard.plain import plain_line
from gadcli.dashboard.screen import render
from gadcli.dashboard.view import RunView

__all__ = ["RunView", "live", "plain_line", "render", "watch"]
