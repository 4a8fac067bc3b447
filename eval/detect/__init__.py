"""Detectors over our backbones. Nothing here needs mmdet until it is asked for."""
