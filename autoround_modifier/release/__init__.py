"""Several checkpoints of one model, quantized, evaluated, judged and published by one file."""
