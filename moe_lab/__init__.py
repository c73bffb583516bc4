"""moe-lab: an instrument for routing in Mixture-of-Experts models."""

__version__ = "0.1.0"
