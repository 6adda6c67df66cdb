"Pictures, tables and widgets."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "plots": "plot_candidates plot_history plot_route",
    "pictures": "plot_predictions",
    "report": "to_markdown"})
