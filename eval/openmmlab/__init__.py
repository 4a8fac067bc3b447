"""Our backbones inside mmdetection and mmsegmentation."""
