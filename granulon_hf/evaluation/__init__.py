"""Evaluation and analysis."""
