"Search, retrain, evaluate, one search and many budgets: a dataclass of parameters and a function each."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "searching": "SearchConfig SearchResult load_search load_supernet search",
    "retraining": "RetrainConfig RetrainResult load_network load_retrain retrain",
    "evaluation": "EvaluateConfig EvaluateResult evaluate load_evaluation",
    "pareto_front": "ParetoConfig ParetoResult load_pareto pareto"})
