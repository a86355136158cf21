"""The Granulon model family: configuration, controller, aggregation, model and processor.

These files are self-contained and flat: they are the remote code of every Granulon checkpoint on the Hub, byte for byte.
Import them as ``granulon_hf.modeling``; a second import path would make a second set of classes.
"""
