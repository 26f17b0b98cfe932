"""The "torch" backend: every operation as a plain composition of torch operators, the oracle of every test."""
