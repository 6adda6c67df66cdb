"Neural architecture search for semantic segmentation, with a jigsaw pretext task and unlabelled images."
__version__ = "0.2.0"


def lazily(package: str, homes: dict):
    "Module functions `__getattr__` and `__dir__` of a package: names, by the module that each is taken from when it is used."
    from importlib import import_module
    home = {name: module for module, names in homes.items() for name in names.split()}

    def getattr_(name):
        if name not in home: raise AttributeError(f"{package} has no {name}; it has {', '.join(sorted(home))}")
        return getattr(import_module(f"{package}.{home[name]}"), name)
    return getattr_, lambda: sorted(home)


__getattr__, __dir__ = lazily(__name__, {
    "stages.configs": "SearchConfig RetrainConfig EvaluateConfig ParetoConfig",
    "stages.searching": "search",
    "stages.retraining": "retrain",
    "stages.evaluation": "evaluate",
    "stages.pareto_front": "pareto",
    "zoo": "load"})
