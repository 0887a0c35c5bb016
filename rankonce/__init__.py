"""RankOnce: rank many candidates for a member in one forward pass of a language model."""

__version__ = "0.1.0"
