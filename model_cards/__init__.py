"""Jinja templates of the cards that are written beside models, zoos and generated networks."""
