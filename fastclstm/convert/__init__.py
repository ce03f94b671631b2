"""Layers from other libraries' weights, and back: `torch` and `keras`, imported when first asked for."""
