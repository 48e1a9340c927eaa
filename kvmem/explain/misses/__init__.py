"""Why each run of a prompt's blocks missed, while it is served; see docs/explain.md."""
