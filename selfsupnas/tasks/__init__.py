"What a network learns from: labels, a jigsaw, a teacher."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "permutations": "permutation_set",
    "jigsaw": "cut_and_shuffle jigsaw_accuracy jigsaw_loss",
    "teacher": "EMATeacher",
    "consistency": "CONSISTENCY Consistency consistency_loss",
    "losses": "class_weights_from pixel_cross_entropy"})
