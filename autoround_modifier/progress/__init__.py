"""What happens during a run, for whoever listens: progress bars, reports."""
