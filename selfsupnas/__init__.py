__version__ = "0.1.0"


def load(name: str):
    "The trained network of a preset, by name: `selfsupnas.presets` has the list."
    from selfsupnas.presets import load
    return load(name)
