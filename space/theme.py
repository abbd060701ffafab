"""The page's colours and fonts: ink on paper by day, candlelight by night. Nothing is fetched."""

from __future__ import annotations

import gradio as gr

INK, FADED, RULE = ("#2b2521", "#ece3d5"), ("#6d6156", "#ada08f"), ("#e2d8c5", "#3b342d")
PAPER, SHEET, BUTTON = ("#f6f1e6", "#171412"), ("#fffdf8", "#211d1a"), ("#7d2e2b", "#9f443c")

# Gradio's name of each: (by day, by night). What is not here follows from these.
COLORS = {
    "body_background_fill": PAPER,
    "body_text_color": INK,
    "body_text_color_subdued": FADED,
    "background_fill_primary": SHEET,
    "background_fill_secondary": PAPER,
    "border_color_primary": RULE,
    "color_accent_soft": ("#f0dfd3", "#3a2723"),
    "block_background_fill": SHEET,
    "block_label_background_fill": ("transparent", "transparent"),
    "block_label_text_color": FADED,
    "block_title_text_color": FADED,
    "input_background_fill": ("#fbf8f1", "#1b1815"),
    "input_border_width": ("1px", "1px"),
    "input_border_color_focus": ("#b58a7d", "#8a5a50"),
    "input_placeholder_color": FADED,
    "slider_color": ("#7d2e2b", "#c9665a"),
    "button_primary_background_fill": BUTTON,
    "button_primary_background_fill_hover": ("#93403b", "#b4534a"),
    "button_primary_border_color": BUTTON,
    "button_secondary_background_fill": SHEET,
    "button_secondary_background_fill_hover": ("#f0e8d8", "#2c2622"),
    "button_secondary_border_color": RULE,
    "button_secondary_text_color": INK,
    "link_text_color": ("#7d2e2b", "#e0a296"),
}


class Folio(gr.themes.Base):
    """Gradio's base theme in these colours, in fonts of Gradio and of the reader."""

    def __init__(self):
        hues = {"primary_hue": gr.themes.colors.red, "neutral_hue": gr.themes.colors.stone}
        sans = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
        fonts = (sans, "ui-sans-serif", "system-ui", "sans-serif")
        super().__init__(**hues, radius_size=gr.themes.sizes.radius_sm, font=fonts)
        super().set(
            **{name: day for name, (day, _) in COLORS.items()},
            **{f"{name}_dark": night for name, (_, night) in COLORS.items()},
            color_accent=BUTTON[0],  # Gradio knows none for the night: style.css sets it
            block_label_border_width="0px",
            block_title_text_weight="600",
        )
