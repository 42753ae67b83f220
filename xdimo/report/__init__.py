"""Derived numbers to tables and plots; no torch here."""

# What this room writes, by name.
PLOTS = ("speedup", "throughput", "mfu", "memory", "steps", "roofline")
TABLES = ("summary.md", "summary.zh.md", "summary.csv", "summary.json")
