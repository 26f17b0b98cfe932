"""Which tokens are real, and who sees whom: read off the very mask that a layer is given."""
