"""One file for each verb; only a job knows all the rooms."""
