"""The style of pictures: colours that eyes read evenly, strips of frames with keys, the other theme."""

import subprocess
import sys

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgba  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fastclstm import viz  # noqa: E402


def lab(rgb):
    """CIE L*a*b* of sRGB under D65, which knows nothing of the space that the maps are made in."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz = xyz / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("name", viz.THEMES)
@pytest.mark.parametrize("kind", ["amounts", "signed", "frames"])
def test_maps_are_even(kind, name):
    with matplotlib.rc_context(viz.theme(name)):
        colors = lab(viz.colours(kind)(np.linspace(0, 1, 33))[:, :3])
    lightness = colors[:, 0]
    for half in (lightness[:17], lightness[16:]) if kind == "signed" else (lightness,):
        even = np.linspace(half[0], half[-1], len(half))
        assert np.abs(half - even).max() < 6
        assert abs(half[-1] - half[0]) > 60
    if kind == "signed":  # both signs weigh the same
        assert np.abs(lightness - lightness[::-1]).max() < 6


@pytest.mark.parametrize("name", viz.THEMES)
def test_words_and_lines_can_be_read_on_their_paper(name):
    def luminance(colour):
        return ((lab(np.array([to_rgba(colour)[:3]]))[0, 0] + 16) / 116) ** 3 + 0.05

    paper = luminance(viz.THEMES[name]["paper"])
    for colour, least in ((viz.THEMES[name]["ink"], 7), *((series, 3) for series in viz.SERIES[name])):
        contrast = luminance(colour) / paper
        assert max(contrast, 1 / contrast) > least  # of WCAG


def strip(name="light"):
    frames = np.random.default_rng(0).random((4, 8, 6))
    with matplotlib.rc_context(viz.theme(name)):
        return viz.filmstrip(Figure(), [
            viz.Row("seen", frames[:2], limit=1), viz.Row("made", frames[2:], limit=1, first=2),
            viz.Row("rain", 9 * frames - 3, "signed", unit="mm/h"), viz.Row("pooled", frames[:2], span=2),
        ])  # fmt: skip


def test_a_strip_has_its_images_in_their_places_and_a_key_for_each_kind():
    figure = strip()
    images = [axes for axes in figure.axes if axes.images]
    places = [axes.get_position().bounds for axes in images]
    lefts = [round(left, 6) for left, *_ in places[4:8]]  # of the columns
    assert [round(place[0], 6) for place in places] == lefts[:2] + lefts[2:] + lefts + lefts[::2]
    width, height = figure.get_size_inches()
    for (_, _, wide, high), axes in zip(places, images, strict=True):
        rows, columns = axes.images[0].get_array().shape
        assert wide * width / columns == pytest.approx(high * height / rows)
    keys = [axes for axes in figure.axes if not axes.images]
    assert [axes.get_ylabel() for axes in keys] == ["", "mm/h", ""]
    assert keys[1].get_ylim() == pytest.approx((-images[4].images[0].get_clim()[1], images[4].images[0].get_clim()[1]))
    assert {text.get_text() for text in figure.texts} == {
        "seen",
        "made",
        "rain",
        "pooled",
        *(f"t = {n}" for n in range(4)),
    }
    for (_, bottom, _, high), axes in zip(places, images, strict=True):
        assert -1e-9 <= bottom < bottom + high <= 1, axes


def pixels(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def curves(name):
    with matplotlib.rc_context(viz.theme(name)):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([1, 2], [3, 1], marker="o", label="ours")
        axes.bar([1, 2], [1, 2], color=["C1", "C3"], alpha=0.5)
        axes.fill_between([1, 2], [1, 2], [2, 3], alpha=0.3, color="C4")
        axes.scatter([1, 2], [2, 2], color="C5")
        axes.set(title="title", xlabel="epoch")
        axes.legend()
        return figure


@pytest.mark.parametrize("draw", [strip, curves])
@pytest.mark.parametrize(("one", "other"), [("light", "dark"), ("dark", "light")])
def test_repainted_it_is_as_if_drawn_in_the_other_theme(draw, one, other):
    figure = draw(one)
    before = pixels(figure)
    viz.repaint(figure, other)
    np.testing.assert_array_equal(pixels(figure), pixels(draw(other)))
    assert (pixels(figure) != before).any()


def test_a_film_has_every_frame(tmp_path):
    image = pytest.importorskip("PIL.Image")
    figure = strip()
    drawn = figure.axes[0].images[0]
    viz.animate(tmp_path / "film.gif", figure, lambda t: drawn.set_data(np.full((8, 6), t / 3)), 3)
    with image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3
        assert film.info["duration"] == viz.FRAME_MILLISECONDS


def test_themes_and_kinds_that_there_are():
    with pytest.raises(ValueError, match="theme: name must be one of 'light', 'dark', got 'blue'"):
        viz.theme("blue")
    with pytest.raises(ValueError, match="colours: kind must be one of 'frames', 'amounts', 'signed', got 'jet'"):
        viz.colours("jet")


def test_what_is_no_row_of_images_is_told():
    for images in (np.zeros((3, 4, 4, 1)), np.zeros((0, 4, 4)), np.zeros((2, 4, 4), complex), "rain"):
        with pytest.raises(ValueError, match=r"Row 'rain': images must be real numbers \(T, H, W\), .*, got "):
            viz.Row("rain", images)
    with pytest.raises(ValueError, match="at least one Row"):
        viz.filmstrip(Figure(), [])
    images = np.array([[[1.0, np.inf], [np.nan, -3.0]]])
    assert viz.Row("rain", images).end == 3
    viz.filmstrip(Figure(), [viz.Row("rain", images)]).canvas.draw()
    assert viz.Row("mask", images > 0).end == 1


def test_what_does_not_fit_a_strip_is_told(tmp_path):
    row = viz.Row("rain", np.zeros((4, 8, 8)))
    for rows, options, words in (
        ([row], {"titles": ["now"]}, "titles must be one for each of 4 columns, got 1"),
        ([row], {"width": 1.0}, "4 columns and the labels do not fit a width of 1 inches"),
        ([row.images], {}, "at least one Row, and nothing else"),
    ):
        with pytest.raises(ValueError, match=words):
            viz.filmstrip(Figure(), rows, **options)
    with pytest.raises(ValueError, match="Row 'rain': span must be an integer >= 1, got 0"):
        viz.Row("rain", row.images, span=0)
    with pytest.raises(ValueError, match="animate: count must be an integer >= 1, got 0"):
        viz.animate(tmp_path / "film.gif", Figure(), lambda t: None, 0)
    assert viz.Row("packed", np.full((1, 2, 2), -128, np.int8)).end == 128


def test_without_matplotlib_it_is_said_what_to_install():
    code = "import sys; sys.modules['matplotlib'] = None; from fastclstm import viz"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: fastclstm.viz needs Matplotlib: pip install 'fastclstm[viz]'" in done.stderr
