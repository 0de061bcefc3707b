"""Seeing and touching a live page from outside its workflow."""
