"""What a run was, what came of it, and what it cost: written down while it runs (run.json), then shown (report.html, the student's model card).

    recording.py    run.json and channels.safetensors, while training
    measuring.py    effective rank, memory, forecasts: the facts that have to be taken while the models are there
    run.py          reads a run's folder again, whoever wrote it
    settings.py     which settings somebody chose
    words.py        what the facts say, in sentences and tables that know no HTML; units.py writes their numbers
    figures.py      the pictures, drawn with drawing.py
    report.py       the page; page.py has its style, which the demo's report shares
    card.py         the model card
    command.py      red report
    provenance.py   versions, commit, device
"""
