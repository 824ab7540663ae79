"""Jraph's graph networks, with layers of Haiku as in its examples."""

import haiku as hk
import jax
import jax.numpy as jnp
import jraph

from benchmarks.others import Model, floats, model

# A ring of six nodes, and itself.
RING = [*range(6)]
SENDERS = jnp.array(RING + RING, jnp.int32)
RECEIVERS = jnp.array([*RING[1:], 0, *RING], jnp.int32)


def made(network, features: int) -> Model:
    """A network of a graph's nodes and edges."""

    def function(nodes, edges):
        graph = jraph.GraphsTuple(
            nodes=nodes,
            edges=edges,
            senders=SENDERS,
            receivers=RECEIVERS,
            globals=jnp.ones((1, 1)),
            n_node=jnp.array([6]),
            n_edge=jnp.array([12]),
        )
        return network(graph)

    net = hk.without_apply_rng(hk.transform(function))
    inputs = floats(6, features), floats(12, 3)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Model(net.apply, jax.eval_shape(net.init, key, *inputs), inputs)


def mlp(*sizes):
    def update(features):
        return hk.nets.MLP(sizes)(features)

    return jraph.concatenated_args(update)


@model("jraph")
def jraph_gcn(published):
    """Two layers, for Cora, as Kipf and Welling (2017)."""
    features, width, classes = (1433, 16, 7) if published else (4, 7, 3)

    def network(graph):
        graph = graph._replace(edges=None, globals=None)
        for update in (
            lambda nodes: jax.nn.relu(hk.Linear(width)(nodes)),
            hk.Linear(classes),
        ):
            layer = jraph.GraphConvolution(update, symmetric_normalization=True)
            graph = layer(graph)
        return graph.nodes

    return made(network, features)


@model("jraph", published=False)
def jraph_gat(published):
    """Attention with one head, and a layer."""
    width = 64 if published else 7

    def network(graph):
        graph = graph._replace(globals=None, edges=None)
        layer = jraph.GAT(
            attention_query_fn=lambda nodes: hk.Linear(width)(nodes),
            attention_logit_fn=lambda sent, received, edges: hk.Linear(1)(
                jax.nn.leaky_relu(jnp.concatenate((sent, received), axis=1))
            ),
            node_update_fn=jax.nn.relu,
        )
        return hk.Linear(3)(layer(graph).nodes)

    return made(network, 16 if published else 4)


@model("jraph")
def jraph_graph_network(published):
    """Of `ogb_examples`: edges, nodes and globals by layers."""
    features, width = (9, 128) if published else (4, 7)

    def network(graph):
        graph = jraph.GraphMapFeatures(
            hk.Linear(width), hk.Linear(width), hk.Linear(width)
        )(graph)
        update = mlp(width, width)
        return jraph.GraphNetwork(update, update, mlp(width, 2))(graph).globals

    return made(network, features)
