"Search, retrain, evaluate, one search and many budgets: a dataclass of parameters and a function each."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "configs": "SearchConfig RetrainConfig EvaluateConfig ParetoConfig",
    "searching": "SearchResult load_search load_supernet search",
    "retraining": "RetrainResult load_network load_retrain retrain",
    "evaluation": "EvaluateResult evaluate load_evaluation",
    "pareto_front": "ParetoResult load_pareto pareto"})
