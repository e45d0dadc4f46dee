"""What the paper and its notebooks report, as data: for the page that sets our results beside it.

Source: arXiv 2311.12424v3; cell outputs of the official ``jupyter_notebooks/*.ipynb`` (MIT
licence); values that are in no output were read off the paper's figures, and say so.
"""

from __future__ import annotations

# Squared error / d after 0, 1, ... 40 examples; d = 20, 1280 prompts. Looped: one block, b = 20,
# T = 15. Standard: 12 layers. Source: Figures_LR.ipynb.
# fmt: off
LINEAR_REGRESSION: dict[str, list[float]] = {
    "standard": [
        1.06, 0.92, 0.959, 0.843, 0.77, 0.769, 0.696, 0.638, 0.615, 0.546, 0.519, 0.424, 0.426,
        0.334, 0.305, 0.247, 0.212, 0.161, 0.112, 0.0592, 0.0204, 0.00771, 0.00384, 0.00262, 0.0017,
        0.00135, 0.0013, 0.000962, 0.00085, 0.000818, 0.000743, 0.000656, 0.00072, 0.000605,
        0.00056, 0.000584, 0.000559, 0.000546, 0.000532, 0.000521, 0.000482,
    ],
    "looped": [
        1.06, 0.921, 0.964, 0.847, 0.773, 0.771, 0.699, 0.637, 0.616, 0.546, 0.519, 0.424, 0.428,
        0.334, 0.307, 0.248, 0.212, 0.162, 0.116, 0.0596, 0.0242, 0.011, 0.00575, 0.00418, 0.00285,
        0.00231, 0.00183, 0.0018, 0.00143, 0.00146, 0.00114, 0.00116, 0.00116, 0.00105, 0.001,
        0.000965, 0.000806, 0.00095, 0.000828, 0.000816, 0.000779,
    ],
    "least squares": [
        1.06, 0.916, 0.958, 0.839, 0.771, 0.765, 0.694, 0.635, 0.608, 0.544, 0.515, 0.419, 0.425,
        0.333, 0.303, 0.248, 0.207, 0.159, 0.11, 0.048, 1.49e-09, 2.01e-12, 7.23e-13, 4.28e-13,
        2.91e-13, 2.31e-13, 1.77e-13, 1.73e-13, 1.58e-13, 1.44e-13, 1.17e-13, 1.19e-13, 1.35e-13,
        1.41e-13, 1.3e-13, 1.24e-13, 1.06e-13, 1.05e-13, 1.06e-13, 9.86e-14, 1.04e-13,
    ],
    "3-nearest neighbours": [
        1.06, 1.96, 1.61, 1.33, 1.11, 1.22, 1.04, 0.978, 0.987, 0.961, 0.904, 0.902, 0.871, 0.894,
        0.858, 0.812, 0.836, 0.744, 0.893, 0.796, 0.769, 0.8, 0.828, 0.768, 0.758, 0.795, 0.761,
        0.71, 0.774, 0.718, 0.733, 0.689, 0.737, 0.707, 0.657, 0.696, 0.691, 0.679, 0.681, 0.672,
        0.71,
    ],
    "averaging": [
        1.06, 22.2, 11.1, 7.32, 5.42, 4.63, 3.89, 3.1, 2.65, 2.18, 2.04, 1.82, 1.97, 1.6, 1.47,
        1.58, 1.28, 1.32, 1.24, 1.08, 1.13, 1.09, 0.899, 0.96, 0.853, 0.789, 0.826, 0.756, 0.753,
        0.791, 0.658, 0.644, 0.693, 0.631, 0.64, 0.61, 0.614, 0.595, 0.545, 0.535, 0.525,
    ],
}

# Probe errors after 0, 1, ... 20 layers or loop steps: mean squared error over d = 20 coordinates
# and all prefixes. The standard model has 20 layers. Source: model_probing_plot_result.ipynb.
PROBES: dict[str, dict[str, list[float]]] = {
    "X^T y": {
        "standard": [
            0.5856, 0.6121, 0.5604, 0.5391, 0.4776, 0.4493, 0.4478, 0.4292, 0.4306, 0.4308, 0.4307,
            0.4579, 0.5086, 0.5442, 0.5725, 0.5997, 0.6073, 0.6138, 0.6210, 0.6168, 0.6191,
        ],
        "looped": [
            0.5814, 0.5650, 0.5521, 0.5382, 0.5143, 0.4899, 0.4941, 0.4675, 0.4491, 0.4285, 0.4211,
            0.4097, 0.3866, 0.3980, 0.3836, 0.3773, 0.3666, 0.3675, 0.3634, 0.3614, 0.3596,
        ],
    },
    "w_OLS": {
        "standard": [
            0.4932, 0.5223, 0.4830, 0.4717, 0.4308, 0.4001, 0.3756, 0.3610, 0.3526, 0.3428, 0.3363,
            0.3691, 0.4076, 0.4460, 0.4782, 0.4953, 0.5201, 0.5266, 0.5218, 0.5166, 0.5223,
        ],
        "looped": [
            0.4966, 0.4779, 0.4782, 0.4689, 0.4500, 0.4424, 0.4327, 0.4177, 0.3838, 0.3495, 0.3358,
            0.3343, 0.3203, 0.3217, 0.3106, 0.3176, 0.3013, 0.3106, 0.3036, 0.3009, 0.2983,
        ],
    },
}

# What predicting zero scores there, by arithmetic: with d = 20 and n = 41, the mean over i of
# E[(X^T y)_j^2] = i (i + d + 1) / n^2, and of E[w_j^2] = min(i, d) / d.
PROBES_OF_ZERO = {"X^T y": 1022 / 1681, "w_OLS": 21 / 40}

# Accuracy and its standard deviation over five seeds on each held-out set, in the order of
# ``tabular_data.OPENML_IDS``. Looped: b = 30, T = 15. Source: Openml.ipynb.
OPENML: dict[str, list[tuple[float, float]]] = {
    "looped": [
        (0.6622, 0.0083), (0.5044, 0.0076), (0.7205, 0.0112), (0.4011, 0.0098), (0.4156, 0.0048),
        (0.4624, 0.0045), (0.5681, 0.0149), (0.7568, 0.0061), (0.5098, 0.0053), (0.6485, 0.0077),
    ],
    "standard": [
        (0.6268, 0.008), (0.5112, 0.007), (0.6564, 0.0065), (0.395, 0.0097), (0.4059, 0.0037),
        (0.4634, 0.0041), (0.4832, 0.0055), (0.6681, 0.007), (0.5326, 0.0039), (0.65, 0.0045),
    ],
}
# fmt: on

# Read off the paper's figures; no numbers are published.
READ_OFF = {
    "sparse_lr": "looped is below standard and close to lasso (alpha = 0.01): about 0.13 after 8 "
    "examples, standard 0.24; about 0 from 11 on (d = 20)",
    "dt": "after 100 examples looped has about 0.03, standard about 0.07, XGBoost on signs about "
    "0.33, a greedy tree on signs about 0.50 (d = 20, depth 4)",
    "relu_2nn": "after 100 examples looped has about 0.18, standard about 0.17, a 2-layer network "
    "by Adam about 0.18, 3-nearest neighbours 0.48, least squares 0.58 (d = 20, 100 hidden units)",
}
