"""Measuring an engine, and servers."""
