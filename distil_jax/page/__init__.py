"""The result of one work folder, or of several beside each other, as one HTML page and its plots as PNG.

record.py reads what a finished folder holds; elements.py and style.py are the page's words and looks, figures.py its
plots; results.py, benchmarks.py, training.py, inside.py and facts.py are its sections; whole.py puts them together,
command.py is `distil-jax report DIR`. Nothing here needs a model, a config file or JAX.

A page has no script, loads nothing, and escapes all that is not ours.
"""
