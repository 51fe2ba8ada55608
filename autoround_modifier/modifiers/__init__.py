"""Steps of LLM-Compressor recipes, and what runs them."""
