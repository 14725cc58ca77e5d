"""Weights in few bits: grids, roundings, and the walk that quantizes a whole model."""
