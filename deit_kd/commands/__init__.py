"""The verbs of the command line: each reads its arguments and calls one job."""
