"""One HTML page that shows trained models loop by loop; ``python -m looped_fast.demo``."""
