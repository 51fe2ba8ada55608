"""From tuned weights to files, and back."""
