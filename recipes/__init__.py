"""Whole runnable configurations, installed with the package: `sane-hf train sane-digits`."""
