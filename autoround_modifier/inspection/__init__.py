"""
What a saved checkpoint is good for: which engines run it, with which kernels and commands, and what
that takes of memory. No weight is read.
"""
