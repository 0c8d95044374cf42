"""Steps: what a round does with the store, one file for each step of the loop.

Belongs here: reading a step's input, calling the method, writing its output whole or not at all.
Not: the method itself (prompts, sampling, scoring, acceptance, training, evaluation), nor who calls
the steps and shows their outcome (the assets).

Every step can be repeated: what is there already is kept, and what is replaced is replaced whole.

A file is called by what it does, so that no step takes the name of what it makes; all of them stand on `rows`.
"""
