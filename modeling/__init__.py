"""The Granulon model family: configuration, controller, aggregation, model and processor.

These files are self-contained and flat: they are the remote code of every Granulon checkpoint on the Hub, byte for byte.
Import them as ``granulon_hf.modeling``; a second import path would make a second set of classes.
"""

# Before any file here: importing the Auto classes makes granulon_hf register these files, which must not be half read by then.
import transformers.models.auto  # noqa: F401
