"""`python -m pe_jax` is `pe-jax`."""

import sys

from pe_jax.cli import main

sys.exit(main())
