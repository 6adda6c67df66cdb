"Search, retrain, evaluate, one search and many budgets: a dataclass of parameters and a function each."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "searching": "SearchConfig load_search load_supernet search",
    "retraining": "RetrainConfig load_network load_retrain retrain",
    "evaluation": "EvaluateConfig benchmark load_evaluation",
    "pareto": "FrontConfig front load_front"})
