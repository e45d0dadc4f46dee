"""The paper's experiments, its published values, and the page that holds ours against them."""
