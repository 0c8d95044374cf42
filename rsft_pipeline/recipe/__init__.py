"""The recipe: what a person writes in YAML to say what to run, checked before anything does.

Belongs here: the fields, their meaning, and errors that name file, field and remedy; a file for each section of the
YAML, `recipe` for the whole, and `reading` for how a file becomes one. Does not: how any field is carried out, which
the module of the section's name does.
"""
