"""`python -m d2m_hpc`, the same as `d2m`."""

from d2m_hpc.cli import main

main()
