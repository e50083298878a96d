"""One file for each command; only a job knows all the rooms."""
