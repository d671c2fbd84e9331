"""The parts of benchmarks/starts.py (trained students) and benchmarks/untrained.py (students before any training), and of
benchmarks/push.py (what brings a quarter of the width nearer to the teacher).

    rows         what is compared: starts, variants, learning rates, seeds, steps of measurement
    teachers     the functions that are distilled, and the same function in other bases
    lines        finished results, a line of JSON each, and how result files are written
    trained      one teacher at one width: which runs are needed, which rate is taken
    schedule     several such studies run in one queue, the most important run first
    assembled    the finished runs put together: the content of starts*.json
    tables       Markdown tables of it
    cells        one untrained student: made, measured
    untrained    the grids of cells and their tables
    variations   push.py: other fits of the same student
    recipes      … other ways to train its projections
    refitted, retrained, push_tables   … their cells and runs, and the tables
    autoencoder  the linear auto-encoder in which RED's paper explains the collapse
"""
