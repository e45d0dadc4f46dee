"""The paper's experiments, its published values, and the page that compares ours with them."""
