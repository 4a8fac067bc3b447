"""Parts that two or more families share."""

from zoo.layers.compiler import keep_strides

keep_strides()
