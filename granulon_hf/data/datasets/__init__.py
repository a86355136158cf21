"""The sets: one module each, which says how its rows become samples."""
