"""
All that is used of LLM-Compressor and compressed-tensors, in one room.

No other module of the package imports them. Each file names what it uses, and `tests/host` has a
test of each: where a new release of theirs differs, those tests fail. Modules here know nothing of
tuning; of the package they import `formats` only.
"""
