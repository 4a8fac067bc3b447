"""Detection and instance segmentation with our backbones, by torchvision or transformers."""
