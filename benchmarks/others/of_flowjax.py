"""FlowJAX: log-densities of its flows."""

import equinox as eqx
import jax
from flowjax import bijections, distributions, flows
from jax import numpy as jnp

from benchmarks.others import Model, floats, model


def made(flow, published: bool, **options) -> Model:
    size = 20 if published else 4

    def make():
        normal = distributions.Normal(jnp.zeros(size))
        return flow(jax.random.key(0), base_dist=normal, **options)

    params, static = eqx.partition(make(), eqx.is_inexact_array)

    def apply(params, x):
        return eqx.combine(params, static).log_prob(x)

    return Model(apply, params, (floats(3, size),), fan_out_last=False)


def widths(published: bool) -> dict[str, int]:
    return {
        "nn_width": 128 if published else 10,
        "flow_layers": 8 if published else 2,
    }


@model("flowjax")
def flowjax_masked_autoregressive(published):
    return made(flows.masked_autoregressive_flow, published, **widths(published))


@model("flowjax")
def flowjax_coupling_spline(published):
    spline = bijections.RationalQuadraticSpline(knots=6, interval=3)
    more = widths(published)
    return made(flows.coupling_flow, published, transformer=spline, **more)


@model("flowjax")
def flowjax_coupling_affine(published):
    return made(flows.coupling_flow, published, **widths(published))


@model("flowjax")
def flowjax_planar(published):
    layers = 8 if published else 2
    return made(flows.planar_flow, published, flow_layers=layers, width_size=8, depth=1)
