__version__ = "0.1.0"


def load(name: str):
    "The trained network of a preset, by name: `selfsupnas.zoo` has the list."
    from selfsupnas.zoo import load
    return load(name)


def lazily(package: str, homes: dict):
    "Module functions `__getattr__` and `__dir__` of a package: names, by the module that each is taken from when it is used."
    from importlib import import_module
    home = {name: module for module, names in homes.items() for name in names.split()}

    def getattr_(name):
        if name not in home: raise AttributeError(f"{package} has no {name}; it has {', '.join(sorted(home))}")
        return getattr(import_module(f"{package}.{home[name]}"), name)
    return getattr_, lambda: sorted(home)
