"""`python -m distil_jax` is the command `distil-jax`."""

import sys

from distil_jax.cli import main

sys.exit(main())
