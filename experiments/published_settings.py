"""Settings that are published, at full size: what `--preset NAME` stands for.

Errors are published of networks that were trained on all training images, most of them
of the best epoch on the test images. Here the `validation` share is held out, and the
last epoch counts. What else differs is said beside each.
"""

from typing import Any

from experiments.tasks.images import Recipe

OF_LOUIZOS: dict[str, Any] = {
    **{"dataset": "mnist", "lam": (0.1,), "epochs": 200, "decay_from": 1.0},
    **{"gate_learning_rate": None, "compact": False},
}
# Constraints on the gated weights; weights don't decay.
OF_GALLEGO: dict[str, Any] = {
    **{"dataset": "mnist", "epochs": 200, "batch_size": 128, "decay_from": 1.0},
    **{"learning_rate": 7e-4, "gate_learning_rate": None, "weight_decay": 0.0},
    **{"constraint": "lagrangian", "multiplier_rate": 1e-4, "target_warm_up": 0.0},
    **{"test_rule": "median", "polyak": 0.0, "compact": False},
}
MNIST: dict[str, dict[str, Any]] = {
    # Louizos et al. 2018, table 1: 219-214-100 at 1.4 %, 20-25-45-462 at 0.9 %. In the
    # authors' code the norm of LeNet-5 is not multiplied by the number of examples, nor
    # are its weights averaged.
    "louizos2018-mlp": {**OF_LOUIZOS, "model": "mlp", "weight_decay": 5e-4},
    "louizos2018-lenet5": {
        **{**OF_LOUIZOS, "model": "lenet5"},
        **{"weight_decay": 5e-4 / 60_000, "polyak": 0.0},
    },
    # Gallego-Posada et al. 2022: 26.6 % of the parameters at 1.77 %, 7.75 % at 1.01 %,
    # last epoch.
    "gallego2022-mlp": {**OF_GALLEGO, "model": "mlp", "target_density": (0.33,)},
    "gallego2022-lenet5": {**OF_GALLEGO, "model": "lenet5", "target_density": (0.1,)},
}

WIDE = Recipe(
    epochs=200, weight_decay=5e-4, drops=(0.3, 0.6, 0.8), drop_factor=0.2
)  # Zagoruyko and Komodakis 2016
WRN_28_10: dict[str, Any] = {
    **{"dataset": "cifar10", "depth": 28, "factor": 10, "examples": None},
    **{"recipe": WIDE, "keep_prob": 0.7, "gates_on": "maps"},
}
WIDE_RESNET: dict[str, dict[str, Any]] = {
    # Louizos et al. 2018: 3.83 %, with a running average of the weights; that its gates
    # hardly move is what Gale et al. 2019 found.
    "louizos2018": {
        **WRN_28_10,
        **{"gate_learning_rate": None, "detached": False, "masked_norm": False},
        **{"target": None, "lam": 0.001},
    },
    # Gallego-Posada et al. 2022: 4.10 ± 0.16 % at 69.6 % of the multiply-accumulates,
    # last epoch. There each layer's weights have the constraint, here the
    # multiply-accumulates of all.
    "gallego2022": {
        **WRN_28_10,
        **{"gate_learning_rate": 6.0, "detached": True, "masked_norm": True},
        **{"target": 0.7, "constraint": "lagrangian", "restart": True},
        **{"multiplier_rate": 7e-4, "warm_up": 0.0},
    },
}

LONG = Recipe(epochs=400)
OF_ZHUANG: dict[str, Any] = {
    **{"dataset": "cifar10", "base": LONG, "tune": LONG, "chosen_by": 45_000},
    # As in the authors' code, all classifiers are trained once.
    **{"heads": Recipe(epochs=100), "auxiliary": "once"},
}
CONTROLS = ("thinet", "channel_pruning", "width_multiplier", "width_multiplier_plus")
CHANNEL_PRUNING: dict[str, dict[str, Any]] = {
    # Zhuang et al. 2018, table 1: 6.20 % and + 0.31 points with half of the channels.
    "zhuang2018-resnet56": {
        **OF_ZHUANG,
        **{"model": "resnet56", "ratio": 0.5, "losses": 3},
        "method": (*CONTROLS, "random_dcp", "dcp"),
    },
    # 6.01 %, - 0.17 points with 30 % of the channels removed, DCP-Adapt - 0.58.
    "zhuang2018-vgg19": {
        **OF_ZHUANG,
        **{"model": "vgg19", "ratio": 0.3, "losses": 2, "epsilon": 0.001},
        "method": (*CONTROLS, "slimming", "random_dcp", "dcp", "dcp_adapt"),
    },
}
