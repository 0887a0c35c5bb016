"""Supervised fine-tuning at the score rows, through the renderer and packer that serve."""
