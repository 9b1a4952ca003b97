"""What `gradkernels demo` runs: a story (story.py), a text to learn (text.py), a task of long time lags (task.py)."""
