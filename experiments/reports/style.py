"""Colours and style of all pictures."""

BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK = (
    # Okabe and Ito (2008): distinct for every common kind of colour vision.
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK)
REMOVED = "#D0D0D0"

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "figure.titleweight": "bold",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.dpi": 120,
}
