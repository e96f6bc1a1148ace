"""`distil-jax inspect`: what the models read of a text, token by token, and what of it is learned.

samples.py finds the texts and lays both tokenizations over their bytes, expected.py asks the models what they expect,
terminal.py and sheet.py show it, command.py is the command.
"""
