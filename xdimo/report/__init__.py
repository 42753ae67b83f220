"""Derived numbers to tables and plots; no torch here."""
