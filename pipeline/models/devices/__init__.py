"""Where a model computes, what moves between host and device, and products that a GPU can write in float32."""
