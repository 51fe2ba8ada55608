"""
The command line. Each command is one file, and imports what it runs when it runs: `--help` answers
without PyTorch.
"""
