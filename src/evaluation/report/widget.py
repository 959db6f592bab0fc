"""The gallery of a run in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.core.getipython import get_ipython
from markupsafe import Markup

from src.evaluation.report.gallery import (
    FALLBACK,
    build_gallery,
    make_enlarged,
    make_static_table,
    order_images,
)


def gallery_widget(
    images: Mapping[str, Any], details: pd.DataFrame, samples: Any = None, page_size: int = 12
) -> Any:
    """The gallery of `write_report`, browsable in JupyterLab: sort, filter, turn pages, and look at
    one image large.

    Args:
        images: (images, 3, height, width) in [0, 1] by name of the row, among them "seen".
        details: one row a test image as for `write_report`.
        samples: (images, samples, 3, height, width) in [0, 1], shown with the large image.
        page_size: images on a page.

    Returns:
        An object to end a cell with. Without a live front end (papermill, nbconvert) or without
        ipywidgets it shows a table of the first images.

    Raises:
        PerceptError: there is no row "seen", or images, details and samples do not pair up.
    """
    gallery = build_gallery(images, details, samples)
    static = make_static_table(gallery, range(min(FALLBACK, gallery["total"])))
    try:
        import ipywidgets
    except ImportError:  # the table is then all there is
        return _WidgetWithFallback(None, static)
    return _WidgetWithFallback(_make_browser(ipywidgets, gallery, page_size), static)


class _WidgetWithFallback:
    """A widget beside its static stand-in.

    A live front end shows the widget. Where a notebook is only executed there is none, and an
    executed page that carried the widget would ask the network for the scripts that draw it: there
    the stand-in alone is given.
    """

    def __init__(self, widget: Any, static: Markup):
        self.widget = widget
        self.static = static

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {}
        if self.widget is not None and _is_live():
            bundle = dict(self.widget._repr_mimebundle_())
        bundle["text/plain"] = "the gallery of reconstructions"
        bundle["text/html"] = str(self.static)
        return bundle


def _is_live() -> bool:
    """Whether a front end with a person before it runs this cell: it says which cell it is, a mere
    execution says nothing.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and bool(kernel.get_parent().get("metadata"))


def _make_browser(widgets: Any, gallery: dict[str, Any], page_size: int) -> Any:
    """The controls and the images as one ipywidgets box."""
    scores = [(score["name"], i) for i, score in enumerate(gallery["scores"])]
    sort = widgets.Dropdown(options=[("test order", -1), *scores], description="Sort by")
    direction = widgets.Dropdown(
        options=[("highest first", True), ("lowest first", False)], description="Order"
    )
    selections = ["all", "hits", "misses"] if gallery["hits"] else ["all"]
    selection = widgets.ToggleButtons(options=selections, description="Show")
    page = widgets.IntSlider(min=1, max=1, description="Page", continuous_update=False)
    chosen = widgets.Dropdown(options=[], description="Look at")
    table, large = widgets.HTML(), widgets.HTML()

    def turn_page(_: Any = None) -> None:
        order = order_images(gallery, sort.value, direction.value, selection.value)
        page.max = max(1, -(-len(order) // page_size))  # this bounds the value too
        start = (page.value - 1) * page_size
        places = order[start : start + page_size]
        table.value = "No image is left by this filter."
        if places:
            table.value = str(make_static_table(gallery, places))
        chosen.options = [(f"test image {i + 1}, id {gallery['ids'][i]}", i) for i in places]
        chosen.value = places[0] if places else None
        enlarge()

    def enlarge(_: Any = None) -> None:
        large.value = "" if chosen.value is None else str(make_enlarged(gallery, chosen.value))

    def restart(_: Any) -> None:
        page.value = 1
        turn_page()

    for control in (sort, direction, selection):
        control.observe(restart, "value")
    page.observe(turn_page, "value")
    chosen.observe(enlarge, "value")
    turn_page()
    controls = widgets.HBox([sort, direction, selection])
    return widgets.VBox([controls, page, table, chosen, large])
