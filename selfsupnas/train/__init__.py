"One loop for search and retraining."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "config": "TrainingConfig",
    "batches": "TrainingData load_training_data",
    "step": "Objective",
    "loop": "train"})
