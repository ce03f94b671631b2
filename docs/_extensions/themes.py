"""The gallery's pictures in both themes, of which the page shows the one that suits it.

For sphinx-gallery: ``image_scrapers = (themes.scrape,)``. Examples draw in the light theme.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from fastclstm import viz

_IMAGE = """
.. image:: /{path}
   :alt: {told}
   :class: sphx-glr-single-img only-{theme}
"""


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the figures that a block left open, close them, and return the reST that shows them."""
    told = Path(block_vars["src_file"]).stem.replace("_", " ")
    shown = []
    for number in plt.get_fignums():
        figure = plt.figure(number)
        for theme in ("light", "dark"):
            if theme == "dark":
                viz.repaint(figure, "dark")
            saved = Path(next(block_vars["image_path_iterator"]))
            figure.savefig(saved)
            path = saved.relative_to(gallery_conf["src_dir"]).as_posix()
            shown.append(_IMAGE.format(path=path, told=told, theme=theme))
    plt.close("all")
    return "".join(shown)
