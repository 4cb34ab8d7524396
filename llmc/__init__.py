"""llmc: from a trained language model to a running server, proved at every joint to be the same model."""

__version__ = "0.1.0"
