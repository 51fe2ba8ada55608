"""
Which engine reads what of a checkpoint, told from names, shapes and ``config.json`` alone, and
which kernel runs it on which hardware.

Nothing here knows LLM-Compressor or a session: what a recipe will save is checked before the run
by the same functions as a folder afterwards. The tables of kernels need no PyTorch, so this file
imports nothing.
"""
