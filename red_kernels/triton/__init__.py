"""The Triton kernels and their launchers, one op a file; `launch.py` holds every block size. Imported where they run, never before."""
