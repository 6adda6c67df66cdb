"Data sets, their splits, views and batches; what users type, taken from its module when it is used."
from selfsupnas import lazily

__getattr__, __dir__ = lazily(__name__, {
    "files": "PairDataset SegmentationSpec UnreadableFile",
    "datasets": "load_dataset",
    "splits": "LabelSplit load_split make_split save_split",
    "augment": "StrongView WeakView cutmix cutmix_boxes denormalise normalise",
    "loaders": "Stream draw_batches to_device"})
