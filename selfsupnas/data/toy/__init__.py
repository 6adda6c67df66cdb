"Embedded datasets: drawn street scenes, and the blue marble."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {"streetscenes": "draw_scene", "bluemarble": "bluemarble_tiles"})
