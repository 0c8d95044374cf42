"""The recipe: what a person writes in YAML to say what to run, checked before anything runs.

Belongs here: the fields, their meaning, and errors that name file, field and remedy; one module for each section of
the YAML, `recipe` for the whole, and `reading` for loading a file. Not: how a field is carried out; that is in the
rsft_pipeline module of the section's name.
"""
