"""Students in the tools that people run models with: `python -m benchmarks.clients.students FOLDER` makes them, each other script loads them in
one tool and compares with what transformers computed. docs/clients/ keeps what the scripts printed."""
