"""Steps: what a round does with the store, one module for each step of the loop.

Belongs here: reading a step's input, calling the method, writing its output whole or not at all.
Not: the method itself (prompts, sampling, scoring, acceptance, training, evaluation), nor calling
the steps and showing their outcome (the assets).

Every step can be repeated: what is there already is kept, and what is replaced is replaced as a whole.

A step is named after what it does, not after what it makes. `rows` says which rows they read, `gates` what must hold
between them.
"""
