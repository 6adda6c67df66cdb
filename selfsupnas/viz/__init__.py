"Pictures, tables and widgets."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "curves": "plot_candidates plot_cost_accuracy plot_front plot_history plot_runs",
    "routes": "plot_gate_history plot_image_routes plot_route",
    "predictions": "plot_jigsaw plot_predictions plot_views",
    "tables": "read_records run_summary summarise to_markdown write_page"})
