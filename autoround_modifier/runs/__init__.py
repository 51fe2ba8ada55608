"""What a run leaves on the disk: finished blocks, files, reports."""
