"""What decoder blocks saw during calibration, and how they run again."""
