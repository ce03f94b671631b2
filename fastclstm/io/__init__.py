"""Weights in and out: safetensors files, and files that appear complete or not at all."""
