"""``python -m spdf_jax``: the command line of `spdf_jax.main`."""

import sys

from spdf_jax import processes
from spdf_jax.main import keep_standard_streams, main

if __name__ == "__main__":
    keep_standard_streams()
    processes.keep_memory()
    processes.end(main(sys.argv))
