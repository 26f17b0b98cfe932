"""Layers as promises: what one layer makes of the rows of the one before, computed for the rows that are read."""
