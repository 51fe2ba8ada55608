"""What a run did, as a file beside the checkpoint, as a page and as a model card."""
