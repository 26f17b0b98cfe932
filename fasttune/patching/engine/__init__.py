"""patch, unpatch, patched: exchange the classes of a live model's modules, and put them back."""
