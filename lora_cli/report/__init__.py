"""What a run says: events, the console's screens, and report.html. Never decides what a run does."""
