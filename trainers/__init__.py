"""Training: text and a configuration in, a run folder out.

A run folder (llmc/manifest.py, kind "run") holds `model/`, a Hugging Face folder that `llmc convert` reads. Knows
nothing of conversion, engines or serving.
"""
