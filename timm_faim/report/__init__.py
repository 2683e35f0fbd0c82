"""Pictures and the page of a run; needs matplotlib, and does nothing without it."""
