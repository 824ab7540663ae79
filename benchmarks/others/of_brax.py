"""Networks of Brax's agents."""

import jax
from brax.training import networks

from benchmarks.others import Model, floats, model


def made(network, *inputs) -> Model:
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    params = jax.eval_shape(network.init, key)
    return Model(lambda p, *inputs: network.apply(None, p, *inputs), params, inputs)


@model("brax")
def brax_policy(published):
    sizes = (32,) * 4 if published else (7, 6)
    network = networks.make_policy_network(16, 27, hidden_layer_sizes=sizes)
    return made(network, floats(3, 27))


@model("brax")
def brax_value(published):
    sizes = (256,) * 5 if published else (7, 6)
    network = networks.make_value_network(27, hidden_layer_sizes=sizes)
    return made(network, floats(3, 27))


@model("brax")
def brax_twin_q(published):
    sizes = (256, 256) if published else (7, 6)
    network = networks.make_q_network(27, 8, hidden_layer_sizes=sizes, layer_norm=True)
    return made(network, floats(3, 27), floats(3, 8))


@model("brax")
def brax_policy_from_images(published):
    side = 64 if published else 36
    network = networks.make_policy_network_vision(
        {"pixels/view": (side, side, 3)},
        16,
        hidden_layer_sizes=(256, 256) if published else (7, 6),
    )
    return made(network, {"pixels/view": floats(2, side, side, 3)})
