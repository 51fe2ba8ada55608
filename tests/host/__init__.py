"""What is relied on of LLM-Compressor and compressed-tensors: a test file for each of `host/`."""
