"""Models and their memories."""
