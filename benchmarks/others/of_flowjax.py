"""FlowJAX: log-densities of its flows."""

import equinox as eqx
import jax
from flowjax import bijections, distributions, flows
from jax import numpy as jnp

from benchmarks.others import Model, floats, model


def made(flow, published: bool, size: int = 63, **options) -> Model:
    """A flow of so many dimensions: 63 are those of BSDS300."""
    size = size if published else 4

    def make():
        normal = distributions.Normal(jnp.zeros(size))
        return flow(jax.random.key(0), base_dist=normal, **options)

    params, static = eqx.partition(make(), eqx.is_inexact_array)

    def apply(params, x):
        return eqx.combine(params, static).log_prob(x)

    return Model(apply, params, (floats(3, size),), fan_out_last=False)


def widths(published: bool) -> dict[str, int]:
    """Five flows with two hidden layers of 512, as Papamakarios et al. (2017)."""
    return {
        "nn_width": 512 if published else 10,
        "nn_depth": 2 if published else 1,
        "flow_layers": 5 if published else 2,
    }


@model("flowjax")
def flowjax_masked_autoregressive(published):
    return made(flows.masked_autoregressive_flow, published, **widths(published))


@model("flowjax", published=False)
def flowjax_coupling_spline(published):
    spline = bijections.RationalQuadraticSpline(knots=6, interval=3)
    more = widths(published)
    return made(flows.coupling_flow, published, transformer=spline, **more)


@model("flowjax")
def flowjax_coupling_affine(published):
    return made(flows.coupling_flow, published, **widths(published))


@model("flowjax")
def flowjax_planar(published):
    """80 flows of 40 latents, as the longest of Rezende and Mohamed (2015)."""
    layers = 80 if published else 2
    return made(flows.planar_flow, published, 40, flow_layers=layers)
