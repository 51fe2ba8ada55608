"""Runs a saved checkpoint in Python with its weights packed in memory."""
