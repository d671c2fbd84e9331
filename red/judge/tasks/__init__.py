"""Tasks of lm-evaluation-harness that need no network: `lm_eval --include_path` takes this folder too."""
