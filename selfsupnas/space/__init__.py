"The search space, its networks, their costs and the derivation."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "grid": "Edge SearchSpace",
    "operations": "OPERATIONS",
    "supernet": "build_supernet RoutingNetwork",
    "architecture": "Architecture draw_architecture load_architecture save_architecture",
    "network": "StaticNetwork",
    "cost": "count_cost",
    "budget": "CostTable measure_costs static_cost",
    "derivation": "derive",
    "compiled": "compile_regions"})
