"""Which sets are taken, and what the style of each of their icons is called."""

from __future__ import annotations

import re
from collections.abc import Callable

LICENCES = frozenset("MIT Apache-2.0 CC0-1.0 CC-BY-4.0 ISC OFL-1.1 Unlicense BSD-3-Clause".split())

# Emoji sets: (style, whether it has its own colours).
EMOJI = {
    "noto": ("noto emoji", True),
    "noto-v1": ("blob emoji", True),
    "twemoji": ("twemoji", True),
    "fluent-emoji-flat": ("fluent flat emoji", True),
    "fluent-emoji": ("fluent gradient emoji", True),
    "emojione": ("emojione", True),
    "fxemoji": ("firefox emoji", True),
    "streamline-emojis": ("outlined cartoon emoji", True),
    "fluent-emoji-high-contrast": ("solid emoji", False),
    "emojione-monotone": ("stencil emoji", False),
}
# Their skin tones differ too little from the flat set's, or not at all.
WITHOUT_TONES = ("fluent-emoji", "fluent-emoji-high-contrast")
FLAGS = {"circle-flags": "round flag", "flag": "flat flag", "flagpack": "rounded flag", "cif": "detailed flag"}

# Colour sets: (style, style of the icons whose name ends in -flat or -duo).
COLOUR = {
    "icon-park": ("two-colour outline", "two-colour outline"),
    "streamline-color": ("two-tone outline", "two-tone flat"),
    "streamline-flex-color": ("two-tone curvy outline", "two-tone curvy flat"),
    "streamline-plump-color": ("two-tone plump outline", "two-tone plump flat"),
    "streamline-sharp-color": ("two-tone sharp outline", "two-tone sharp flat"),
    "streamline-freehand-color": ("hand-drawn duotone", "hand-drawn duotone"),
    "streamline-ultimate-color": ("filled line art", "filled line art"),
    "streamline-cyber-color": ("angular line art", "angular line art"),
    "streamline-kameleon-color": ("round flat badge", "round blue badge"),
    "streamline-stickies-color": ("sticker", "lime sticker"),
    "fluent-color": ("fluent colour", "fluent colour"),
    "glyphs-poly": ("flat multicolour", "flat multicolour"),
    "marketeq": ("blue line art", "blue line art"),
    "flat-color-icons": ("flat colour", "flat colour"),
    "flat-ui": ("flat badge", "flat badge"),
}
# Fixed two-tone palettes that may be turned to another hue.
RECOLOURABLE = frozenset(
    "icon-park streamline-color streamline-flex-color streamline-plump-color streamline-sharp-color"
    " streamline-freehand-color streamline-cyber-color marketeq".split()
)

StyleOf = Callable[[str], str | None]


def _always(style: str) -> StyleOf:
    return lambda name: style


def _by_last(styles: dict[str, str | None], other: str | None = None) -> StyleOf:
    """The style that the last part of the name stands for."""
    return lambda name: styles.get(name.rsplit("-", 1)[-1], other)


def _if_matches(pattern: str, style: str | None, other: str | None) -> StyleOf:
    expression = re.compile(pattern)
    return lambda name: style if expression.search(name) else other


def _solar(name: str) -> str | None:
    if name.endswith("bold-duotone"):
        return "duotone"
    last = name.rsplit("-", 1)[-1]
    return (
        None
        if name.endswith("line-duotone")
        else {"linear": "outline", "bold": "solid", "broken": "broken line"}.get(last)
    )


def _healthicons(name: str) -> str | None:
    return None if "24px" in name else "outline" if name.endswith("outline") else "solid"


# One-colour sets: icon name -> style, or None for a variant that is not taken.
MONO: dict[str, StyleOf] = {
    "mdi": _if_matches("outline", "outline", "solid"),
    "tabler": _if_matches("-filled$", "solid", "outline"),
    "ph": _by_last(
        {"fill": "solid", "thin": "thin line", "duotone": "duotone", "bold": None, "light": None}, "outline"
    ),
    "solar": _solar,
    "fluent": _by_last({"filled": "solid", "regular": "outline"}),
    "material-symbols": _if_matches("(outline|rounded|sharp)$", None, "solid"),
    "lucide": _always("outline"),
    "hugeicons": _always("outline"),
    "pinhead": _always("solid"),
    "healthicons": _healthicons,
    "fa7-solid": _always("solid"),
    "streamline-freehand": _always("hand-drawn"),
    "streamline-pixel": _always("pixel art"),
    "pixelarticons": _always("pixel art"),
    "memory": _always("pixel art"),
    "pixel": _always("pixel art"),
    "dinkie-icons": _if_matches("small", None, "pixel art"),
    "pepicons-print": _if_matches("-(off|circle|filled)$", None, "offset print"),
    "pepicons-pencil": _if_matches("-(off|circle|filled)$", None, "pencil line"),
    "iconmind": _if_matches("duotone-bold$", "duotone", None),
    "temaki": _always("solid"),
    "roentgen": _always("solid"),
    "maki": _always("solid"),
    "osmic": _always("solid"),
    "mingcute": _by_last({"fill": "solid", "line": "outline"}),
    "streamline-ultimate": _if_matches("-bold$", "solid", "thin line"),
    "iconoir": _if_matches("solid$", "solid", "outline"),
    "boxicons": _if_matches("filled$", "solid", "outline"),
    "clarity": _if_matches("solid", "solid", "outline"),
    "streamline-cyber": _always("angular line"),
    "lucide-lab": _always("outline"),
    "icon-park-solid": _always("solid"),
    "streamline-block": _always("block"),
    "duo-icons": _always("duotone"),
    "gis": _always("solid"),
    "covid": _always("outline"),
    "guidance": _always("thin line"),
    "at-icons": _always("outline"),
    "carbon": _always("outline"),
}

# Sets whose icon names begin with their category, and categories of them that the set's own table lacks.
CATEGORY_SETS = (
    "streamline-ultimate-color",
    "streamline-freehand-color",
    "streamline-freehand",
    "streamline-ultimate",
    "streamline-pixel",
)
MORE_CATEGORIES = {
    "streamline-pixel": (
        "interface-essential computers-devices-electronics food-drink business-product business-products content-files"
        " internet-network social-rewards entertainment-events-hobbies shopping-shipping school-science email phone"
        " design ecology weather travel health beauty coding-apps-websites building-real-estate map-navigation music"
        " photography video-movies user transportation logo-social-medias logos constellations pet-animals romance"
    ).split()
}
