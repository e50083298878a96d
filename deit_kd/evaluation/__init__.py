"""Scoring students and looking into them."""
