"""Detection and instance segmentation over our backbones; mmdet only where it is asked for."""
