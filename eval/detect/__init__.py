"""Detection and instance segmentation: COCO folders, detectors over our backbones, metrics."""
