"""The gallery's pictures in both themes, of which the page shows the one that suits it.

For sphinx-gallery: ``image_scrapers = (themes.scrape,)``. Examples draw in the light theme.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from sphinx_gallery.scrapers import figure_rst

from fastclstm import viz


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the figures that a block left open, close them, and return the reST that shows them."""
    shown = []
    for number in plt.get_fignums():
        figure = plt.figure(number)
        for theme in ("light", "dark"):
            if theme == "dark":
                viz.repaint(figure, "dark")
            path = next(block_vars["image_path_iterator"])
            figure.savefig(path)
            rst = figure_rst([path], gallery_conf["src_dir"])
            shown.append(rst.replace("sphx-glr-single-img", f"sphx-glr-single-img only-{theme}"))
    plt.close("all")
    return "".join(shown)
