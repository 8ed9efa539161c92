"""What one run leaves behind: its directory, metrics, log, trackers and the receipt needed to repeat it."""
